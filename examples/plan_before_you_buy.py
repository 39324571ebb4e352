"""Which GPU does a model need? A table of models and GPUs, before anything is bought or downloaded.

    python examples/plan_before_you_buy.py
    python examples/plan_before_you_buy.py --model gemma-2-9b --gpu rtx3060 l4 --seq-len 4096 --picture plan.png

It asks the command line, as you would: `qlora-kit plan --model … --gpu … --json`. Where a run does not fit, the plan
says which settings would make it fit.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
from typing import Any

from qlora_kit.__main__ import main as qlora_kit

GIB = 2**30


def main() -> None:
    """Plan every model on every GPU, and print what fits."""
    args = parse_args()
    settings = ["--bits", args.bits, "--r", args.r, "--batch-size", args.batch_size, "--seq-len", args.seq_len]
    table = [["", *args.gpu]]
    for model in args.model:
        plans = [plan("--model", model, "--gpu", gpu, *settings) for gpu in args.gpu]
        table.append([model, *map(in_words, plans)])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        print("   ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    if args.picture:
        plan("--model", args.model[-1], "--gpu", args.gpu[-1], *settings, "--plot", args.picture)
        print(f"\n{args.model[-1]} on {args.gpu[-1]}, moment by moment: {args.picture}")


def plan(*flags: str) -> dict[str, Any]:
    """What `qlora-kit plan --json` says; a wrong flag ends the script with one message."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        qlora_kit(["plan", *flags, "--no-baselines", "--json"])
    return json.loads(said.getvalue())  # type: ignore[no-any-return]


def in_words(found: dict[str, Any]) -> str:
    """What the run needs, of what the GPU has, and what to change where it does not fit."""
    need, has = found["plan"]["device_bytes"] / GIB, found["budget"]["n_bytes"] / GIB
    if found["budget"]["fits"]:
        return f"{need:.1f} of {has:.0f} GiB"
    changes = [change for change in (*found["savings"], found["together"]) if change and change["fits"]]
    return f"{need:.1f} GiB: " + (f"fits with {changes[0]['flags']}" if changes else "does not fit")


def parse_args() -> argparse.Namespace:
    """The flags; numbers stay text, for the command line reads them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["llama-3.1-8b", "qwen2.5-14b", "qwen2.5-32b"])
    parser.add_argument("--gpu", nargs="+", default=["rtx4070", "rtx4090"])
    parser.add_argument("--bits", default="4")
    parser.add_argument("--r", default="16")
    parser.add_argument("--batch-size", default="1")
    parser.add_argument("--seq-len", default="2048")
    parser.add_argument("--picture", help="draw the plan of the last model on the last GPU into this PNG file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
