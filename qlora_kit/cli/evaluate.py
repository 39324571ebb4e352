"""`qlora-kit eval`: base, adapter and release side by side on the same tokens; of other tasks their own figures."""

from __future__ import annotations

import json as jsonlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from qlora_kit.cli.flags import Command, as_given
from qlora_kit.config.rules import Checked, flag, setting
from qlora_kit.config.settings import DEFAULT_ASKED, RunConfig
from qlora_kit.errors import Fault, UserError
from qlora_kit.system import quiet

if TYPE_CHECKING:
    from qlora_kit.evaluate.evaluate import Evaluation
    from qlora_kit.evaluate.judge import Judgement
    from qlora_kit.runs.finished import FinishedRun


@dataclass(frozen=True, kw_only=True)
class EvalFlags(Checked):
    """The flags of this command alone."""

    run: str | None = setting(None, "finished run: its base and its trained model are evaluated", metavar="FOLDER")
    release: str | None = setting(
        None, "also evaluate this model, on the same tokens: folder or hub id", metavar="MODEL"
    )
    base: str | None = setting(None, "where the run's base is now, if it has moved", metavar="MODEL")
    json: bool = setting(False, "print JSON instead of a table")


SETTINGS = {
    "model": "model to evaluate instead of a run: folder or hub id",
    "revision": "",
    "bits": "load --model in so many bits; unset: as it was saved",
    "tokenizer": "",
    "data": "data to evaluate on; unset: what the run held out",
    "columns": "",
    "seq_len": "longest example in tokens; unset: the run's",
    "exact_match": f"prompts to answer, to count exact matches; unset: as the run, else {DEFAULT_ASKED}",
    "batch_size": "examples in a forward pass (default: the run's)",
    "device": "",
    "trust_remote_code": "",
}
OF_A_MODEL = ("model", "revision", "bits", "tokenizer")  # what a run has of its own
WIDTH = 10_000  # columns where the output is no terminal: a line is never broken


def run(
    given: Mapping[str, Any],
    run: str | None = None,
    release: str | None = None,
    base: str | None = None,
    json: bool = False,
) -> None:
    """Evaluate the run, or the model in `given`, and print what was found, as a table or `json`.

    Progress goes to standard error. `given` holds those settings that were given, by name. Raises `UserError`.
    """
    _check(given, run, release, base)
    quiet.quiet_libraries()
    from qlora_kit.evaluate.evaluate import Evaluation
    from qlora_kit.model.device import resolve_device
    from qlora_kit.runs import finished, messages
    from qlora_kit.system.progress import say_line

    found = None if run is None else finished.find_run(run, given, base)
    config = RunConfig.from_flat(given) if found is None else found.config
    quiet.quiet_progress_bars()
    say = Console(stderr=True, highlight=False)
    for line in messages.opening(config, resolve_device(config.base.device)):
        say_line(say, line)
    with finished.memory_errors(config.base.device):
        result = _of_model(config, given, say) if found is None else _of_run(found, given, release, say)
    if json:
        print(jsonlib.dumps(result.to_dict(), indent=2, ensure_ascii=False))
        return
    console = Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH)
    if not isinstance(result, Evaluation):
        _show_judgement(result, console)
        return
    for line in _lines(result):
        say_line(console, line)
    console.print(_table(result))


def _of_run(run: FinishedRun, given: Mapping[str, Any], release: str | None, say: Console) -> Evaluation | Judgement:
    from qlora_kit.evaluate import evaluate
    from qlora_kit.evaluate.judge import judge_run

    if run.generates:
        return evaluate.evaluate(run, given.get("data"), release, say)
    _check_exact_match(run.config, run.config.base.task)
    return judge_run(run, given.get("data"), release, say)


def _of_model(config: RunConfig, given: Mapping[str, Any], say: Console) -> Evaluation | Judgement:
    from qlora_kit.evaluate import evaluate
    from qlora_kit.evaluate.judge import judge_model
    from qlora_kit.model.device import resolve_device
    from qlora_kit.model.task_models import GENERATION
    from qlora_kit.runs import finished

    opened = finished.open_model(config.base, resolve_device(config.base.device), "bits" not in given)
    if opened.task == GENERATION:
        return evaluate.evaluate_model(config, opened, given["data"], say)
    _check_exact_match(config, opened.task)
    return judge_model(config, opened, given["data"], say)


def _check_exact_match(config: RunConfig, task: str | None) -> None:
    """Raises `UserError` for prompts to be answered by what writes no text."""
    if config.evaluation.exact_match:
        rule = f"has no meaning for {task}"
        raise UserError.of("--exact-match", config.evaluation.exact_match, rule, "Drop --exact-match.")


def _show_judgement(judgement: Judgement, console: Console) -> None:
    from qlora_kit.system.progress import say_line

    say_line(console, f"data: {judgement.source}, for {judgement.task.name}, at most {judgement.seq_len} tokens each")
    if judgement.warning is not None:
        say_line(console, judgement.warning)
    judge = judgement.task.judge
    for name, own in judgement.models.items():
        cut = f"; {own.truncated:,} are cut" if own.truncated else ""
        say_line(console, f"{name} ({own.model}): {judge.said(own.scores.metrics)}{cut}")
        for table in judge.tables(own.scores):
            console.print(table)


def _check(given: Mapping[str, Any], run: str | None, release: str | None, base: str | None) -> None:
    """The rules that join several flags. Raises one `UserError` with every fault."""
    faults = []
    if run is not None:
        rule = "cannot go with --run, which has its own"
        remedy = "Give one of the two (--release adds a model, --base says where a base moved)."
        faults += [Fault(flag(name), given[name], rule, remedy) for name in OF_A_MODEL if name in given]
    elif "model" not in given:
        faults.append(Fault("--run", None, "is missing, and so is --model", "Give --run RUN or --model MODEL."))
    else:
        others = {"--release": release, "--base": base}
        rule, remedy = "needs --run", "Evaluate each model on its own with --model."
        faults += [Fault(name, value, rule, remedy) for name, value in others.items() if value is not None]
        if "data" not in given:
            faults.append(Fault("--data", None, "is needed: a model holds no data out", "Give --data FILE."))
    if faults:
        raise UserError(faults)


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


COMMAND = Command(
    run=run,
    example="qlora-kit eval --run runs/chat --release release/chat",
    flags=EvalFlags,
    settings=SETTINGS,
    read=as_given,
)
