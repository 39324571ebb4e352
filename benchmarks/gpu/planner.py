"""Predicted and measured peaks of one model, every way to train it: a row a case."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys

from gpu.phases import MODELS


def rehearse(model: str) -> None:
    """One case on the CPU: predicted and measured live bytes."""
    from memory import Case, measure_cpu, predict

    case = Case("gpt2", "qlora4", 1, 16, 4)
    print(json.dumps({**dataclasses.asdict(case), "for": model, **predict(case), **measure_cpu(case)}), flush=True)


def main() -> int:
    """Print the rows of the model that is named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    if args.tiny:
        rehearse(args.model)
        return 0
    from planner_accuracy import run_model

    run_model(args.model)
    return 0


if __name__ == "__main__":
    sys.exit(main())
