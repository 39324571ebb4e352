"""Does the shape of Llama-3.1-8B train inside 6 GiB, and with a long context inside 8? By a cap on the allocator."""

from __future__ import annotations

import argparse
import json
import sys

GIB = 1 << 30
CASES = {"6gib": (2, 2048, 16, 6 * GIB, 5), "8gib": (1, 32_768, 32, 8 * GIB, 2)}  # rows, tokens, r, cap, steps
MODEL = "llama-3.1-8b"


def main() -> int:
    """Print one row: planned, and trained."""
    from fit import planned, settings, train_inside

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case", choices=list(CASES))
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    rows, tokens, r, cap_bytes, steps = CASES[args.case]
    config = settings("gpt2", rows, 16, 4) if args.tiny else settings(MODEL, rows, tokens, r)
    row = {"case": args.case, "model": config.base.model, "rows": rows, "tokens": config.data.seq_len, "r": r}
    row |= planned(config)
    row |= {"status": "rehearsed"} if args.tiny else train_inside(config, cap_bytes, steps)
    print(json.dumps(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
