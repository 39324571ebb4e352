"""Everything that only a GPU can show, in one call that ends in time.

    python benchmarks/on_gpu.py --minutes 8 --out DIR     # on a machine with a GPU
    python benchmarks/on_gpu.py --dry-run                 # the phases, with estimates
    python benchmarks/on_gpu.py --rehearse --out DIR      # every phase on a CPU, with tiny shapes
    python benchmarks/on_gpu.py --keep DIR                # put what was measured there among the committed results

Each phase runs in a process of its own with a limit of its own; what it finds is in DIR/results.jsonl as soon as it is
found. Phases that `--have` holds already are left out unless `--again`. It needs no git, no network and no data but its
own: put the repository on PYTHONPATH. At the end a table says what held, what fell short and by how much.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from gpu.journal import DONE, FILE, KEPT, Found, Journal, by_phase, held_in, held_lines, kept_lines, read_lines
from gpu.phases import phases
from gpu.promises import table
from gpu.runner import Phase, descendants, run_phases

BENCHMARKS = Path(__file__).resolve().parent
RESULTS = BENCHMARKS / "results"
TABLE = "table.md"
REHEARSED = "A rehearsal on a CPU with tiny shapes: that every phase runs is what it shows, the values mean nothing."
CLOSING_S = 10.0  # of the minutes: for the last lines and the table
MACHINE_S = 90.0  # a first import of the libraries from a cold disk


def paths() -> dict[str, str]:
    """The environment in which phases find the package, the benchmarks, and nothing beyond this machine."""
    own = [str(BENCHMARKS), str(BENCHMARKS.parent), os.environ.get("PYTHONPATH", "")]
    given = [str(Path(path).resolve()) for part in own for path in part.split(os.pathsep) if path]
    return {
        "PYTHONPATH": os.pathsep.join(given),  # absolute: a phase runs in a folder of its own
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2"),
        "OMP_WAIT_POLICY": "passive",
    }


def machine(rehearsal: bool) -> dict[str, Any]:
    """Device, capability, versions and commit; found in a process of its own, for this one imports no torch.

    Exits where there is no CUDA device, or it does not answer.
    """
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if rehearsal else {}
    command = [sys.executable, "-W", "ignore", "-m", "gpu.machine"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=MACHINE_S, check=True, env={**os.environ, **hidden}
        )
    except subprocess.SubprocessError as error:
        said = getattr(error, "stderr", None) or ""
        sys.exit(f"the device does not answer: {error}\n{said}")
    where: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if not rehearsal and where["capability"] is None:
        print("no CUDA device on this machine: --rehearse runs every phase on the CPU", file=sys.stderr)
        sys.exit(2)
    return where


def chosen(args: argparse.Namespace, where: dict[str, Any]) -> list[Phase]:
    """The phases to run: those asked for, less those that are held already; those held longest ago have no place."""
    found = phases(args.rehearse, where["capability"] or (9, 0), where["memory_bytes"])
    if args.only:
        names = args.only.split(",")
        unknown = sorted(set(names) - {phase.name for phase in found})
        if unknown:
            sys.exit(f"no phase is called {', '.join(unknown)}: there are {', '.join(p.name for p in found)}")
        found = [phase for phase in found if phase.name in names]
    if args.again or args.rehearse:
        return found
    held = held_in(args.have, where["device"])
    for phase in found:
        if phase.name in held and held[phase.name].status == DONE:
            print(f"{phase.name}: held already in {args.have.name} (--again runs it)")
    return [phase for phase in found if phase.name not in held or held[phase.name].status != DONE]


def end_without_fail(at_s: float) -> None:
    """End this process and all that it started at `time.monotonic()` `at_s`, whatever hangs by then."""

    def wait() -> None:
        time.sleep(max(at_s - time.monotonic(), 0))
        print("time is over: ended with what is written so far", file=sys.stderr, flush=True)
        for pid in descendants(os.getpid()):
            try:
                os.kill(pid, 9)
            except ProcessLookupError:
                continue
        os._exit(3)

    threading.Thread(target=wait, daemon=True).start()


def dry_run(to_run: list[Phase], held: dict[str, Found]) -> None:
    """Print the phases with what they are thought to take, or took when they were recorded."""
    total_s, beside_s = 0.0, 0.0
    for phase in to_run:
        known = held.get(phase.name)
        took_s = known.seconds if known is not None and known.status == DONE else phase.estimate_s
        beside_s = max(beside_s, took_s) if phase.together else beside_s
        total_s += 0 if phase.together else took_s
        beside = ", beside others" if phase.together else ""
        print(f"{took_s:5.0f} s, at most {phase.limit_s:3.0f}{beside}  {phase.name}: {phase.teaches}")
    print(f"{total_s + beside_s:5.0f} s in all")


def run(args: argparse.Namespace, began_s: float) -> int:
    """Run the phases and write the table; 1 where a promise fell short or a phase was not done."""
    os.environ.update(paths())
    end_s = began_s + 60 * args.minutes
    end_without_fail(end_s)
    where = machine(args.rehearse)
    to_run = chosen(args, where)
    journal = Journal(args.out, where, args.rehearse)
    with tempfile.TemporaryDirectory(prefix="on_gpu_", ignore_cleanup_errors=True) as scratch:
        run_phases(to_run, journal, Path(scratch), end_s - CLOSING_S, say=partial(print, flush=True))
    lines = read_lines(journal.file) if journal.file.exists() else []
    found = by_phase(lines, args.rehearse)
    before = [] if args.rehearse else held_lines(args.have, where["device"])
    text, fell_short = table(by_phase([*before, *lines], args.rehearse))
    text = f"{REHEARSED}\n\n{text}" if args.rehearse else text
    (args.out / TABLE).write_text(text, encoding="utf-8")
    print(text)
    undone = [p.name for p in to_run if p.name not in found or found[p.name].status != DONE]
    for name in undone:
        print(f"{name}: {found[name].status if name in found else 'not begun'}")
        print("\n".join(f"    {line}" for line in (found[name].tail if name in found else "").splitlines()[-12:]))
    return int(bool(undone) or (fell_short and not args.rehearse))


def keep(folder: Path) -> int:
    """Put what was measured in `folder` among the committed results, the best go of each phase."""
    from common import place_of

    lines = [line for line in read_lines(folder / FILE) if not line["rehearsal"]]
    if not lines:
        print(f"{folder.name} holds nothing that was measured on a GPU", file=sys.stderr)
        return 2
    file = RESULTS / KEPT.format(place=place_of(lines[-1]["where"]["device"]))
    before = read_lines(file) if file.exists() else []
    fresh = [json.dumps(line) for line in kept_lines([*before, *lines])]
    partial = file.with_suffix(".partial")
    partial.write_text("\n".join(fresh) + "\n", encoding="utf-8")
    partial.replace(file)
    print(f"{len(fresh)} lines in {file.name}; `python benchmarks/readme.py` makes the tables")
    return 0


def main() -> int:
    """Parse the command line and do what it says."""
    began_s = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="it has ended by then, whatever hangs")
    parser.add_argument("--out", type=Path, help="where results.jsonl and the table are written")
    parser.add_argument("--have", type=Path, default=RESULTS, help="results that there are already")
    parser.add_argument("--again", action="store_true", help="also the phases that --have holds")
    parser.add_argument("--only", help="comma-separated names of phases")
    parser.add_argument("--dry-run", action="store_true", help="print the phases with what they are thought to take")
    parser.add_argument("--rehearse", action="store_true", help="every phase on the CPU, with tiny shapes")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="put the results in DIR among the committed ones")
    args = parser.parse_args()
    if args.keep is not None:
        return keep(args.keep)
    if args.dry_run:
        dry_run(phases(rehearsal=False), held_in(args.have))
        return 0
    if args.out is None:
        parser.error("--out DIR is needed: where results are written")
    return run(args, began_s)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # at once: a thread that still waits for a process that cannot be ended does not hold it up
