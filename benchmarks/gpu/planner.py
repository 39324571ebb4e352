"""Predicted and measured peaks of one model, every way to train it: a row a case."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys

from gpu.phases import MODELS
from gpu.tiny import tiny_model


def rehearse(model: str) -> None:
    """One case on the CPU: predicted for CUDA, and live bytes measured."""
    from memory import Case, measure_cpu, predict

    case = Case(tiny_model(), "qlora4", 1, 16, 4)
    found = {**predict(case), **measure_cpu(case)}
    del found["error"]  # of the CPU's kernels
    print(json.dumps({**dataclasses.asdict(case), "stands_for": model, **found}), flush=True)


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
