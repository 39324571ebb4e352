"""The peak and the time of a step of each contender of a case, one after the other: a row each."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from typing import Any

from gpu.tiny import tiny_model

ROUNDS, WARM_UP = 10, 3
TINY_ROUNDS, TINY_WARM_UP = 2, 1


@dataclasses.dataclass(frozen=True)
class Place:
    """Where contenders run, and for how long."""

    device: str
    rounds: int
    warm_up: int


def place(tiny: bool, rounds: int = ROUNDS, warm_up: int = WARM_UP) -> Place:
    """The GPU, or for a rehearsal the CPU."""
    return Place("cpu", TINY_ROUNDS, TINY_WARM_UP) if tiny else Place("cuda", rounds, warm_up)


def case_of(text: str, tiny: bool) -> Any:
    """`llama-3-8b:2x2048` as a `step.Case`; for a rehearsal a tiny one."""
    from step import Case

    return Case(tiny_model(), 2, 16, 4) if tiny else Case.parse(text)


def measure(case: Any, name: str, where: Place, **changes: Any) -> dict[str, Any]:
    """The row of the contender `name` with `changes` of its settings."""
    from step import steps_in_turn

    found: dict[str, Any] = {}
    with case.described() as folder:
        job = case.job(name, folder, where.device, **changes)
        steps_in_turn({name: job}, where.rounds, where.warm_up, found.update)
    return {"case": dataclasses.asdict(case), "contender": name, **found[name]}


def main() -> int:
    """Print the rows; a contender that failed is a row that says so."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case")
    parser.add_argument("contenders")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    case = case_of(args.case, args.tiny)
    for name in args.contenders.split(","):
        print(json.dumps(measure(case, name, place(args.tiny))), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
