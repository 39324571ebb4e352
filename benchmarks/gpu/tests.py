"""The tests that need a GPU, chosen by their marker: a row for each as soon as it is over, and one for all of them."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).resolve().parents[2] / "tests"
WORKERS = "6"
ALONE = "memory_of_paged_states"  # looks at all of the device's memory, so that nothing else may run meanwhile
MARK = "mark.gpu"  # only the files that have it are read: the others may want what is not installed there


class Rows:
    """Prints the outcome of every test."""

    def __init__(self) -> None:
        self.outcomes: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: Any) -> None:
        """A test's call is over, or what is around it failed or skipped it."""
        if report.when != "call" and report.outcome == "passed":
            return
        self.outcomes[report.outcome] += 1
        row = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2)}
        if report.outcome == "failed":
            row["why"] = report.longreprtext[-1500:]
        if report.outcome != "skipped":
            print("\n" + json.dumps(row), flush=True)

    def pytest_collectreport(self, report: Any) -> None:
        """A file that cannot be read is a failure of its own."""
        if report.failed:
            self.outcomes["uncollected"] += 1
            print(
                "\n" + json.dumps({"file": report.nodeid, "outcome": "uncollected", "why": report.longreprtext[-800:]})
            )


def files() -> list[str]:
    """The test files that have a test for a GPU."""
    return [str(file) for file in sorted(TESTS.glob("**/test_*.py")) if MARK in file.read_text(encoding="utf-8")]


def main() -> int:
    """Run the tests; 0 also where some failed, for that is a finding."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="two files, on the CPU: there the tests are skipped")
    parser.add_argument("--alone", action="store_true", help="those that want the device for themselves")
    args = parser.parse_args()
    rows = Rows()
    options = ["-q", "-m", "gpu", "-W", "default", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    options += ["-k", ALONE if args.alone else f"not {ALONE}"]
    if importlib.util.find_spec("xdist") is not None and not args.tiny and not args.alone:
        options += ["-n", WORKERS]
    options += ["--rootdir", str(TESTS.parent), "-c", str(TESTS.parent / "pyproject.toml")]
    code = pytest.main([*options, *(files()[:2] if args.tiny else files())], [rows])
    print("\n" + json.dumps({"all": dict(rows.outcomes)}), flush=True)
    return 0 if code in (0, 1, 2, 5) else int(code)


if __name__ == "__main__":
    sys.exit(main())
