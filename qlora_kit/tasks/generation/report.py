"""Models that write, evaluated side by side: loss, perplexity and exact match in a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from qlora_kit.data.audit import AuditReport
from qlora_kit.tasks.evaluation import Evaluation

if TYPE_CHECKING:
    from rich.console import RenderableType


def evaluation_lines(evaluation: Evaluation) -> list[RenderableType]:
    """What the figures were taken on, what to mind, and the table."""
    report: AuditReport = evaluation.encoded.report
    lines: list[RenderableType] = [
        f"data: {evaluation.source}: {report.kept:,} examples, {report.supervised_tokens:,} supervised tokens, at "
        f"most {evaluation.seq_len} tokens each"
    ]
    dropped = report.examples - report.kept
    if report.truncated or dropped:
        lines.append(
            f"{report.truncated:,} are cut at {evaluation.seq_len} tokens, and {dropped:,} are left out, with nothing "
            "supervised in them"
        )
    return [*lines, *([] if evaluation.warning is None else [evaluation.warning]), _table(evaluation)]


def _table(evaluation: Evaluation) -> Table:
    table = Table(box=None, padding=(0, 3, 0, 0), pad_edge=False)
    table.add_column("", no_wrap=True)
    table.add_column("loaded as", overflow="fold")
    exact = f"exact match of {evaluation.prompts:,}"
    for heading in ("loss", "perplexity", *([exact] if evaluation.prompts else [])):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, own in evaluation.models.items():
        metrics = own.scores.metrics
        cells = [f"{metrics['loss']:.4f}", f"{metrics['perplexity']:,.2f}"]
        if own.exact_match is not None:
            cells.append(f"{own.exact_match:.1%}")
        table.add_row(name, own.model, *cells)
    return table
