"""`qlora-kit eval`: base, adapter and release side by side on the same tokens."""

from __future__ import annotations

import json as jsonlib
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from qlora_kit import quiet
from qlora_kit.errors import UserError

if TYPE_CHECKING:
    from qlora_kit.evaluating import Evaluation

WIDTH = 10_000  # columns where the output is no terminal: a line is never broken


def run(
    given: Mapping[str, Any],
    run: str | None = None,
    release: str | None = None,
    base: str | None = None,
    json: bool = False,
) -> None:
    """Evaluate the run and print what was found, as a table or `json`; progress goes to standard error.

    `given` holds those settings that were given, by name. Raises `UserError`.
    """
    if run is None:
        raise UserError.of("--run", run, "is missing", "Give the folder of a finished run.")
    quiet.quiet_libraries()
    from qlora_kit import evaluating, narration, reopening
    from qlora_kit.base import resolve_device
    from qlora_kit.progress import say_line

    found = reopening.find_run(run, given, base)
    if not found.generates:
        rule = f"was trained for {found.config.base.task}, whose figures are in its evaluation.json"
        raise UserError.of("--run", run, rule, "Use `qlora-kit predict` for other data.")
    quiet.quiet_progress_bars()
    say = Console(stderr=True, highlight=False)
    for line in narration.opening(found.config, resolve_device(found.config.base.device)):
        say_line(say, line)
    with reopening.memory_errors(found.config.base.device):
        evaluation = evaluating.evaluate(found, given.get("data"), release, say)
    if json:
        print(jsonlib.dumps(evaluation.to_dict(), indent=2, ensure_ascii=False))
        return
    console = Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH)
    for line in _lines(evaluation):
        say_line(console, line)
    console.print(_table(evaluation))


def _lines(evaluation: Evaluation) -> list[str]:
    """What the figures were taken on, and what to mind."""
    report = evaluation.report
    lines = [
        f"data: {evaluation.source}: {report.kept:,} examples, {report.supervised_tokens:,} supervised tokens, at "
        f"most {evaluation.seq_len} tokens each"
    ]
    dropped = report.examples - report.kept
    if report.truncated or dropped:
        lines.append(
            f"{report.truncated:,} are cut at {evaluation.seq_len} tokens, and {dropped:,} are left out, with nothing "
            "supervised in them"
        )
    return lines + ([] if evaluation.warning is None else [evaluation.warning])


def _table(evaluation: Evaluation) -> Table:
    table = Table(box=None, padding=(0, 3, 0, 0), pad_edge=False)
    table.add_column("", no_wrap=True)
    table.add_column("loaded as", overflow="fold")
    exact = f"exact match of {evaluation.asked:,}"
    for heading in ("loss", "perplexity", *([exact] if evaluation.asked else [])):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, score in evaluation.scores.items():
        cells = [f"{score.loss.mean:.4f}", f"{score.loss.perplexity:,.2f}"]
        if score.exact_match is not None:
            cells.append(f"{score.exact_match:.1%}")
        table.add_row(name, score.model, *cells)
    return table
