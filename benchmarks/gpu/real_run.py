"""A real run, as a user has it: trained, killed, resumed, evaluated, merged and proven, planned beside measured.

A row a part. The run that is killed is held against one that is not.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SAVE_EVERY = 15  # steps
PART_S = 110  # no part takes longer


@dataclass(frozen=True)
class Sizes:
    """How much is trained, on which device."""

    device: str
    steps: int
    save_steps: int
    exact_match: int
    optim: str

    @property
    def flags(self) -> list[str]:
        """The flags of `train`."""
        rates = ["--bits", "4", "--r", "16", "--lr", "2e-3", "--optim", self.optim, "--batch-size", "16"]
        lengths = ["--max-steps", str(self.steps), "--save-steps", str(self.save_steps), "--keep-checkpoints", "4"]
        rest = ["--exact-match", str(self.exact_match), "--device", self.device, "--profile"]
        return ["--model", "demo", "--data", "demo", *rates, *lengths, *rest]


def say(part: str, **row: Any) -> None:
    """Print a row."""
    print(json.dumps({"part": part, **row}), flush=True)


def start(*arguments: str) -> subprocess.Popen[str]:
    """A command of the kit, at work."""
    command = [sys.executable, "-W", "ignore", "-m", "qlora_kit", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def run(part: str, *arguments: str) -> bool:
    """Run a command of the kit to its end; where it fails, a row says so with what it printed last."""
    began_s = time.monotonic()
    process = start(*arguments)
    said, how = _end_of(process)
    if process.returncode:
        say(part, status=how, said=said[-1500:])
    else:
        say(part, status="ok", seconds=round(time.monotonic() - began_s, 1))
    return process.returncode == 0


def _end_of(process: subprocess.Popen[str]) -> tuple[str, str]:
    """What a command printed, and how it failed if it did; one that takes too long is ended."""
    try:
        said, _ = process.communicate(timeout=PART_S)
    except subprocess.TimeoutExpired:
        process.kill()
        said, _ = process.communicate()
        return said, f"failed: not done in {PART_S} s"
    return said, f"failed: exit code {process.returncode}"


def killed_at(sizes: Sizes, out: Path) -> int:
    """Train, and kill the process when a checkpoint is whole and a step after it done; gives that checkpoint's step.

    0 where it ended before it could be killed.
    """
    working = out.with_name(out.name + ".partial")
    process = start("train", *sizes.flags, "--out", str(out))
    until_s = time.monotonic() + PART_S
    while process.poll() is None and time.monotonic() < until_s:
        whole = sorted(working.glob("checkpoints/checkpoint-*/trainer_state.json"))
        if whole and _last_step(working) > sizes.save_steps:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            return sizes.save_steps
        time.sleep(0.02)
    said, how = _end_of(process)
    say("kill", status=f"{how}, and was to be killed before", said=said[-1500:])
    return 0


def lines_of(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics."""
    file = folder / "metrics.jsonl"
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def _last_step(folder: Path) -> int:
    return max((line["step"] for line in lines_of(folder)), default=0)


def losses(folder: Path) -> dict[int, float]:
    """The loss of every step; of one that was done twice, the last."""
    return {line["step"]: line["loss"] for line in lines_of(folder) if "loss" in line}


def largest_gap(one: dict[int, float], other: dict[int, float]) -> float:
    """The largest difference of two losses of the same step, as a share of the other's."""
    return max(abs(one[step] - other[step]) / max(abs(other[step]), 1e-3) for step in other)


def compare(whole: Path, resumed: Path, sizes: Sizes) -> None:
    """A row on the run that was killed beside the one that was not."""
    one, other = losses(resumed), losses(whole)
    paged = [record(folder)["results"].get("paged_bytes") for folder in (resumed, whole)]
    row: dict[str, Any] = {"lost_steps": sizes.steps - len(one), "steps": len(one)}
    if set(one) == set(other):
        row["loss_gap"] = largest_gap(one, other)
    if paged[1]:
        row["paged_share"] = (paged[0] or 0) / paged[1]
    say("resumed beside whole", status="ok", paged_bytes=paged, **row)


def record(folder: Path) -> dict[str, Any]:
    """The run's record."""
    content: dict[str, Any] = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    return content


def planned_beside_measured(folder: Path) -> None:
    """A row on the plan and the profile of the run."""
    profile = json.loads((folder / "profile.json").read_text(encoding="utf-8"))
    row = {"peak_bytes": profile["peak_bytes"], "results": record(folder)["results"]}
    predicted = (profile.get("predicted") or {}).get("peak_bytes")
    if predicted:
        row |= {"predicted_peak_bytes": predicted, "plan_error": abs(predicted / profile["peak_bytes"] - 1)}
    say("planned beside measured", status="ok", **row)


def main() -> int:
    """Every part in turn; one that fails ends it, as those after it need it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="a few steps, on the CPU")
    args = parser.parse_args()
    on_gpu = Sizes("cuda", 40, SAVE_EVERY, 32, "paged_adamw_8bit")
    sizes = Sizes("cpu", 8, 4, 4, "adamw") if args.tiny else on_gpu
    whole, resumed, release = Path("whole"), Path("resumed"), Path("release")
    if not run("whole", "train", *sizes.flags, "--out", str(whole)):
        return 1
    planned_beside_measured(whole)
    at = killed_at(sizes, resumed)
    if not at:
        return 1
    say("kill", status="ok", checkpoint=at)
    if not run("resume", "train", *sizes.flags, "--resume", str(resumed)):
        return 1
    compare(whole, resumed, sizes)
    evaluates = ["eval", "--run", str(resumed), "--exact-match", str(sizes.exact_match), "--device", sizes.device]
    ok = run("evaluate", *evaluates)
    merged = run("merge", "merge", "--run", str(resumed), "--out", str(release))
    say("proof", proof_passed=int(merged and (release / "merge_report.json").is_file()))
    return 0 if ok and merged else 1


if __name__ == "__main__":
    sys.exit(main())
