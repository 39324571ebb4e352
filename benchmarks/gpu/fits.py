"""Does the shape of Llama-3.1-8B train inside 6 GiB, and with a long context inside 8? By a cap on the allocator."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from gpu.tiny import tiny_model

GIB = 1 << 30
CASES = {"6gib": (2, 2048, 16, 6 * GIB, 5), "8gib": (1, 32_768, 32, 8 * GIB, 2)}  # rows, tokens, r, cap, steps
MODEL = "llama-3.1-8b"


def trained(flat: dict[str, Any], cap_bytes: int, steps: int, tiny: bool) -> dict[str, Any]:
    """The steps inside the cap; in a rehearsal on the CPU, which has none."""
    from contenders import Lean
    from fit import train_inside
    from step import job_of

    if not tiny:
        return train_inside(job_of("lean", flat, "cuda"), cap_bytes, steps)
    contender = Lean(job_of("lean", flat, "cpu"))
    return {"status": "rehearsed", "losses": [contender.step() for _ in range(2)]}


def main() -> int:
    """Print one row, planned and trained."""
    from fit import gpu_here, planned, settings

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case", choices=list(CASES))
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    rows, tokens, r, cap_bytes, steps = CASES[args.case]
    flat = settings(tiny_model(), 2, 16, 4) if args.tiny else settings(MODEL, rows, tokens, r)
    row = {"case": args.case, "model": MODEL, "rows": rows, "tokens": tokens, "r": r, **planned(flat, gpu_here())}
    print(json.dumps({**row, **trained(flat, cap_bytes, steps, args.tiny)}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
