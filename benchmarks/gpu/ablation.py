"""Ours, and ours with one piece of the lean step off in turn, as far as time goes: a row each."""

from __future__ import annotations

import argparse
import json
import sys

from gpu.speed import case_of, measure, place

ROUNDS, WARM_UP = 6, 3


def main() -> int:
    """Print the rows: `without` is the piece that is off, None for the whole."""
    from step import pieces

    from qlora_kit.config.settings import LeanConfig

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    case, where = case_of(args.case, args.tiny), place(args.tiny, ROUNDS, WARM_UP)
    usual = LeanConfig().resolved(where.device)
    acting = {name: off for name, off in pieces().items() if LeanConfig(**off).resolved(where.device) != usual}
    chosen = dict(list(acting.items())[:1]) if args.tiny else acting
    for piece, off in {None: {}, **chosen}.items():
        print(json.dumps({**measure(case, "lean", where, **off), "without": piece}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
