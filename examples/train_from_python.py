"""Train from Python, and read what the run left.

    python examples/train_from_python.py
    python examples/train_from_python.py --model gpt2-large --data my.jsonl --eval-fraction 0.1 --lr 2e-4 --max-steps 99

Without flags the demo's tiny model takes a few steps on a CPU; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from qlora_kit import AdapterConfig, BaseConfig, DataConfig, EvalConfig, OptimConfig, RunConfig, UserError, train


def main() -> None:
    """Train, then say how the loss went and where the adapter is."""
    args = parse_args()
    try:
        result = train(config_of(args))
    except UserError as error:  # a mistake in the settings or the data, with its remedy
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    losses = training_losses(result.folder)
    print(f"loss: {losses[0]:.3f} at the first step, {losses[-1]:.3f} at step {result.steps}")
    if result.eval_loss is not None:
        print(f"held-out loss: {result.eval_loss:.3f}")
    print(f"adapter, as PEFT reads it: {result.adapter}")
    print(f"next: qlora-kit generate --run {result.folder}")


def config_of(args: argparse.Namespace) -> RunConfig:
    """The settings of the run. Every group has defaults; a rule that is broken raises `UserError` here."""
    return RunConfig(
        base=BaseConfig(model=args.model, bits=args.bits),
        adapter=AdapterConfig(r=args.r),
        data=DataConfig(data=args.data, eval_fraction=args.eval_fraction, seq_len=args.seq_len),
        optim=OptimConfig(lr=args.lr, batch_size=args.batch_size, max_steps=args.max_steps),
        evaluation=EvalConfig(eval_steps=args.max_steps),
        out=args.out,
        overwrite=True,
    )


def training_losses(run: Path) -> list[float]:
    """The loss of every step, from the run's metrics: a line of JSON for each step and evaluation."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def parse_args() -> argparse.Namespace:
    """The flags; what is not given is the demo's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--data", default="demo")
    parser.add_argument("--eval-fraction", type=float, default=0.0)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-steps", type=int, default=20)
    parser.add_argument("--out", default="runs/from-python")
    return parser.parse_args()


if __name__ == "__main__":
    main()
