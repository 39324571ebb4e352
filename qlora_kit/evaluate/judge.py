"""The figures of a task other than writing text, for what a run trained, a release, or any model, on labelled data."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console

from qlora_kit import data
from qlora_kit.config.settings import BaseConfig, RunConfig
from qlora_kit.errors import UserError, said_of
from qlora_kit.model.device import resolve_device
from qlora_kit.model.source import load_model_config
from qlora_kit.runs import finished, messages
from qlora_kit.runs.finished import FinishedRun, Opened
from qlora_kit.system.progress import counted, say_line
from qlora_kit.tasks import inputs, registry
from qlora_kit.tasks.registry import Asked, Scores, Task

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Judged:
    """What one model reaches: what it is in words, the scores, and how many examples are cut."""

    model: str
    scores: Scores
    truncated: int


@dataclass(frozen=True)
class Judgement:
    """What models of one task reach, by name (adapter or full, release; or model), and on what."""

    task: Task
    source: str
    seq_len: int
    models: dict[str, Judged]
    warning: str | None

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, ready for JSON."""
        own = {
            name: {"model": one.model, "truncated": one.truncated, **one.scores.metrics, "report": one.scores.report}
            for name, one in self.models.items()
        }
        return {
            "task": self.task.name,
            "data": self.source,
            "seq_len": self.seq_len,
            "warning": self.warning,
            "models": own,
        }


def judge_run(run: FinishedRun, source: str | None, release: str | None, console: Console) -> Judgement:
    """Score what `run` trained, and `release` where one is given, on `source`, or without one on what it held out.

    Progress goes to `console`. Raises `UserError`, before any model is loaded for all but weights that cannot be read.
    """
    device = resolve_device(run.config.base.device)
    with console.status("checking the base"):
        warning = None if run.config.base.full else finished.check_base(run)
    opened = {"full" if run.config.base.full else "adapter": finished.open_run(run, device)}
    if release is not None:
        opened["release"] = _open_release(run, release, device)
    return _judge(run.config, run.seq_len, opened, source, warning, console)


def judge_model(config: RunConfig, opened: Opened, source: str, console: Console) -> Judgement:
    """Score the model `opened` alone, whose labels are those in its config.json.

    Progress goes to `console`. Raises `UserError`.
    """
    config = dataclasses.replace(config, base=_with_labels(opened.config))
    return _judge(config, config.data.seq_len, {"model": opened}, source, None, console)


def _open_release(run: FinishedRun, release: str, device: torch.device) -> Opened:
    own = run.config.base
    config = BaseConfig(model=release, bits=16, device=own.device, trust_remote_code=own.trust_remote_code)
    with said_of("--release", instead_of="--model"):
        opened = finished.open_model(config, device, as_saved=True)
    labels = _with_labels(opened.config).labels
    if opened.task != own.task or labels != own.labels:
        rule = f"is for {opened.task} with the labels {labels}, and the run for {own.task} with {own.labels}"
        raise UserError.of("--release", release, rule, "Give a release of this run, or --model with it alone.")
    return opened


def _with_labels(config: BaseConfig) -> BaseConfig:
    """The settings with the labels that the model itself names."""
    architecture = load_model_config(config)
    if not registry.task_named(config.task).model.has_labels:
        return config
    names = tuple(architecture.id2label[number] for number in range(architecture.num_labels))
    several = getattr(architecture, "problem_type", None) == "multi_label_classification"
    return dataclasses.replace(config, labels=names, multi_label=several)


def _judge(
    config: RunConfig,
    seq_len: int | None,
    opened: dict[str, Opened],
    source: str | None,
    warning: str | None,
    console: Console,
) -> Judgement:
    task = registry.task_named(config.base.task)
    examples, described, unread = inputs.examples_to_score(config, source)
    for line in messages.unread_lines(unread):
        say_line(console, line)
    most = min(data.resolve_seq_len(seq_len, one.tokenizer, one.positions) for one in opened.values())
    encoded = {
        name: inputs.encode(_settings_of(config, one), examples, one.tokenizer, most, "--data")
        for name, one in opened.items()
    }
    models = {}
    for name, one in opened.items():
        rows = encoded[name]
        with console.status(f"loading {one.title}"):
            model = one.load()
        inputs.check_vocabulary(one.tokenizer, model)
        own = _settings_of(config, one)
        with counted(console, name, len(rows)) as tick:
            collate = task.collator(one.tokenizer, most, own.base)
            batches = inputs.batches_of(rows, collate, own.optim.batch_size, model.device, tick)
            asked = Asked(rows.rows, batches, one.tokenizer)
            scores = task.judge.score(model, asked, own.base)
        models[name] = Judged(one.title, scores, rows.report.truncated)
        del model  # before the next one is loaded
    return Judgement(task, described, most, models, warning)


def _settings_of(config: RunConfig, opened: Opened) -> RunConfig:
    """The settings for another model of the same task and labels."""
    own = dataclasses.replace(opened.config, labels=config.base.labels, multi_label=config.base.multi_label)
    return dataclasses.replace(config, base=own)
