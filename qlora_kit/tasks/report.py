"""Reports that several tasks have: of a model on held-out data, as a file and a table; how long rows are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from qlora_kit.data.audit import AuditReport
from qlora_kit.system.files import write_json
from qlora_kit.tasks.evaluation import Scores

REPORT_FILE = "evaluation.json"


def write_scores(scores: Scores, folder: Path) -> None:
    """Write the figures and the report into `folder`."""
    write_json(folder / REPORT_FILE, {"metrics": scores.metrics, **scores.report})


def table(report: Mapping[str, Any], counted: str = "examples") -> Table:
    """Precision, recall and F1 class by class, and how many of what is `counted` each has."""
    found = Table("", box=None, padding=(0, 3, 0, 0), pad_edge=False)
    for heading in ("precision", "recall", "F1", counted):
        found.add_column(heading, justify="right")
    for name, own in report.items():
        if isinstance(own, Mapping):
            figures = [f"{own[key]:.1%}" for key in ("precision", "recall", "f1-score")]
            found.add_row(Text(str(name)), *figures, f"{own['support']:,.0f}")
    return found


def length_lines(report: AuditReport, seq_len: int) -> list[tuple[str, str]]:
    """How long rows are, and how many are cut at `seq_len`."""
    lengths = (report.length_min, report.length_median, report.length_p95, report.length_max)
    return [
        ("tokens: min / median / p95 / max", " / ".join(f"{length:g}" for length in lengths)),
        (f"truncated to {seq_len} tokens", str(report.truncated)),
    ]
