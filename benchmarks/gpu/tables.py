"""What README.md and docs/ say of GPUs, from the committed journals; without one, that nothing is measured yet."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from gpu.journal import DONE, Found, devices_in, held_in
from gpu.promises import contenders, planner_errors, table

NOT_VALIDATED = "; not yet validated on hardware"
SPEEDS = {  # the phases that hold a case's contenders
    "llama-3-8b, 2 × 2048": ("speed-llama", "speed-peft", "speed-unsloth"),
    "gpt2-large, 8 × 1024": ("speed-gpt2",),
}
NAMES = {
    "stock": "stock PEFT and Trainer, fp32 AdamW",
    "peft-loop": "plain PEFT loop",
    "lean": "qlora_kit",
    "unsloth": "Unsloth",
}


def speed_and_promises(results: Path) -> str:
    """A table of the contenders and one of the promises for each GPU in `results`."""
    parts = []
    for device in devices_in(results):
        found = held_in(results, device)
        parts += [f"On {device}, measured:", "", *_contenders(found), table(found)[0].strip(), ""]
    return "\n".join(parts).strip() or "How fast it is on a GPU, and whether the plans hold there, is not yet measured."


def _contenders(found: Mapping[str, Found]) -> list[str]:
    lines = []
    for case, phases in SPEEDS.items():
        by_phase = {name: go.rows for name, go in found.items()}
        rows = [row for phase in phases for row in contenders(by_phase, phase) if row.get("status") == "ok"]
        stock = next((row for row in rows if row["contender"] == "stock"), None)
        lines += [_contender(case, row, stock) for row in rows]
    head = ["| | | peak (GB) | reserved (GB) | tokens/s | of stock |", "|---|---|--:|--:|--:|--:|"]
    return [*head, *lines, ""] if lines else []


def _contender(case: str, row: Mapping[str, Any], stock: Mapping[str, Any] | None) -> str:
    sizes = (f"{row[key] / 10**9:.2f}" for key in ("peak_bytes", "reserved_bytes"))
    of_stock = "" if stock is None else f"{stock['step_s'] / row['step_s']:.2f} ×"
    cells = [case, NAMES.get(row["contender"], row["contender"]), *sizes, f"{row['tokens_per_s']:,.0f}", of_stock]
    return f"| {' | '.join(cells)} |"


def validated(text: str, results: Path) -> str:
    """`text` about predicted peaks, with how far they were from measured ones in the place of that none was."""
    said = []
    for device in devices_in(results):
        errors = planner_errors({name: go.rows for name, go in held_in(results, device).items()})
        if errors:
            far = f"{median(errors):.2%} at the median, {max(errors):.2%} at most"
            said.append(f"{len(errors)} cases on {device} differ by {far}")
    return text.replace(NOT_VALIDATED, f" ({'; '.join(said)})") if said else text


def limits(results: Path) -> str:
    """The line on GPUs among what the kit cannot do."""
    devices = devices_in(results)
    if not devices:
        return (
            "- Nothing here has been measured on a GPU yet: every predicted peak is marked so, and the code paths for\n"
            "  CUDA (paged optimizers, bf16 or fp16 by device) are written and not yet validated on hardware."
        )
    undone = {name for device in devices for name, go in held_in(results, device).items() if go.status != DONE}
    missing = f" Not yet measured there: {', '.join(sorted(undone))}." if undone else ""
    return f"- What was measured on GPUs was measured on {', '.join(devices)} alone.{missing}"


def longest_context(results: Path) -> str | None:
    """The sentences on what trained inside 6 and 8 GiB; None where neither was shown."""
    lines = []
    for device in devices_in(results):
        found = held_in(results, device)
        rows = [row for phase in ("fit-6gib", "fit-8gib") if phase in found for row in found[phase].rows]
        lines += [_shown(row, device) for row in rows if row.get("status") in ("trained", "does not fit")]
    return "\n".join(lines) or None


def _shown(row: Mapping[str, Any], device: str) -> str:
    cap = f"{row['cap_bytes'] / 2**30:.0f} GiB"
    what = f"{row['model']} at {row['rows']} × {row['tokens']:,}, r = {row['r']}"
    if row["status"] == "does not fit":
        return f"Shown on {device}: {what} does not fit into {cap}."
    return f"Shown on {device}: {what} trains inside {cap} (peak {row['peak_bytes'] / 2**30:.2f} GiB allocated)."
