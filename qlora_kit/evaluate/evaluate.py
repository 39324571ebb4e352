"""What a run trained, its base where that says something, a release, or any model alone, scored on the same tokens."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from qlora_kit import data
from qlora_kit.config.settings import DEFAULT_ASKED, BaseConfig, RunConfig
from qlora_kit.errors import Faults, UserError, named, said_of
from qlora_kit.memory import preflight
from qlora_kit.model.device import resolve_device
from qlora_kit.model.source import load_model_config
from qlora_kit.model.tokenizer import load_tokenizer
from qlora_kit.runs import finished, inputs, messages
from qlora_kit.runs.finished import FinishedRun, Opened
from qlora_kit.system.progress import counted, say_line
from qlora_kit.tasks.evaluation import Evaluation, ModelScores
from qlora_kit.tasks.task import Asked, Task

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Scored:
    """What every model is scored on: encoded examples, and those whose prompts are asked; the settings have the task.

    `batch_size` and the labels of `config` are those of the run, or of the model that is scored alone.
    """

    task: Task
    config: RunConfig
    source: str
    tokenizer: PreTrainedTokenizerBase
    encoded: Any
    prompted: list[Any]
    seq_len: int
    unread: inputs.Unread

    @property
    def longest_tokens(self) -> int:
        """The tokens of the longest row."""
        return max(len(row.input_ids) for row in self.encoded.rows)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A loaded model, its name in the results, what it is in words, and how to switch to it."""

    name: str
    title: str
    model: Any
    switched: AbstractContextManager[Any] = dataclasses.field(default_factory=nullcontext)


def read_scored(run: FinishedRun, source: str | None) -> Scored:
    """The data in `source`, or without one what the run held out, laid out and cut as the run did it.

    Raises `UserError` where there is none, or it cannot be read or encoded.
    """
    tokenizer = finished.run_tokenizer(run)
    seq_len = data.resolve_seq_len(run.seq_len, tokenizer, finished.run_positions(run))
    found = _read(run.task, run.config, source, tokenizer, seq_len)
    return dataclasses.replace(found, prompted=[]) if run.is_plain_text else found


def _read(
    task: Task, config: RunConfig, source: str | None, tokenizer: PreTrainedTokenizerBase, seq_len: int
) -> Scored:
    examples, described, unread = inputs.examples_to_score(config, source)
    return Scored(
        task=task,
        config=config,
        source=described,
        tokenizer=tokenizer,
        encoded=task.encode_held_out(config, examples, tokenizer, seq_len, "data"),
        prompted=task.prompted(examples)[: config.evaluation.exact_match or DEFAULT_ASKED],
        seq_len=seq_len,
        unread=unread,
    )


def evaluate(run: FinishedRun, source: str | None, release: str | None, console: Console) -> Evaluation:
    """Score the base of `run` where its task has a use for that, what it trained, and `release` where one is given.

    One model is loaded at a time. `source` is as in `read_scored`. Progress goes to `console`. Raises `UserError`,
    before any model is loaded for all but weights that cannot be read.
    """
    _check_exact_match(run.task, run.config)
    found, warning, released = None, None, None
    device = resolve_device(run.config.base.device)
    with Faults() as faults:
        with faults.collecting():
            found = read_scored(run, source)
        with faults.collecting(), console.status("checking the base"):
            warning = finished.check_base(run) if run.task.scores_base or not run.config.base.full else None
        if release is not None and found is not None:
            with faults.collecting():
                released = _open_release(run, release, found, device)
    assert found is not None
    return _evaluation(found, _subjects(run, released, device, console), warning, console)


def evaluate_model(config: RunConfig, opened: Opened, source: str, console: Console) -> Evaluation:
    """Score the model `opened`, the one that `config` names, alone on `source`, with the labels in its config.json.

    Progress goes to `console`. Raises `UserError`.
    """
    _check_exact_match(opened.task, config)
    config = dataclasses.replace(config, base=_with_labels(opened))
    seq_len = data.resolve_seq_len(config.data.seq_len, opened.tokenizer, opened.positions)
    found = _read(opened.task, config, source, opened.tokenizer, seq_len)

    def subjects() -> Iterator[Subject]:
        with console.status(f"loading {config.base.model}"):
            model = opened.load()
        yield Subject(name="model", title=f"{config.base.model}, {_saved_as(model)}", model=model)

    return _evaluation(found, subjects(), None, console)


def _check_exact_match(task: Task, config: RunConfig) -> None:
    """Raises `UserError` for prompts to be answered by what answers none."""
    if config.evaluation.exact_match and "exact_match" not in task.settings:
        rule = f"does not apply to {task.name}"
        raise UserError.of("exact_match", config.evaluation.exact_match, rule, f"Drop {named('exact_match')}.")


def _evaluation(found: Scored, subjects: Iterator[Subject], warning: str | None, console: Console) -> Evaluation:
    for line in messages.unread_lines(found.unread):
        say_line(console, line)
    models = {}
    for subject in subjects:
        with subject.switched:
            inputs.check_vocabulary(found.tokenizer, subject.model)
            models[subject.name] = _scores(subject, found, console)
        del subject  # before the next one is loaded
    return Evaluation(
        source=found.source,
        seq_len=found.seq_len,
        encoded=found.encoded,
        prompts=len(found.prompted),
        models=models,
        warning=warning,
    )


def _scores(subject: Subject, found: Scored, console: Console) -> ModelScores:
    task, tokenizer, model = found.task, found.tokenizer, subject.model
    with counted(console, f"{subject.name}: scores", len(found.encoded)) as tick:
        collate = task.collator(tokenizer, found.seq_len)
        batches = inputs.batches_of(found.encoded, collate, found.config.optim.batch_size, model.device, tick)
        scores = task.score(model, Asked(found.encoded.rows, batches, tokenizer), found.config.base)
    exact = None
    if found.prompted:
        with counted(console, f"{subject.name}: answers", len(found.prompted)) as tick:
            lengths = task.prompt_lengths(tokenizer, found.prompted)
            at_once = preflight.prompts_in_free(found.config, model.device, lengths)
            exact = task.exact_match(model, tokenizer, found.prompted, tick, at_once)
    return ModelScores(model=subject.title, scores=scores, exact_match=exact)


# --------------------------------------------------------------------------------------------- the models of a run


def _subjects(run: FinishedRun, released: Opened | None, device: torch.device, console: Console) -> Iterator[Subject]:
    """Each model, loaded when its turn comes and forgotten after it.

    The base is the adapter's own, with the adapter switched off.
    """
    settings = run.config.base
    title = f"{settings.model} at {settings.bits} bits"
    loaded = partial(_loaded, device=device, console=console)
    if settings.full:
        if run.task.scores_base:
            base = loaded("the base", lambda: finished.load_run_base(run, device))
            yield Subject(name="base", title=title, model=base)
            del base
        model = loaded("what was trained", lambda: finished.load_run_model(run, device))
        yield Subject(name="full", title=f"{title}, every weight trained", model=model)
    else:
        model = loaded("base and adapter", lambda: finished.load_run_model(run, device))
        if run.task.scores_base:
            yield Subject(name="base", title=title, model=model, switched=model.disable_adapter())
        yield Subject(name="adapter", title=f"{title}, LoRA r = {run.config.adapter.r}", model=model)
    del model
    if released is not None:
        model = loaded(released.config.model, released.load)
        yield Subject(name="release", title=f"{released.config.model}, {_saved_as(model)}", model=model)


def _loaded(title: str, load: Callable[[], Any], *, device: torch.device, console: Console) -> Any:
    """The model that `load` gives, once what the last one took was given back."""
    import torch

    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    with console.status(f"loading {title}"):
        return load()


def _saved_as(model: Any) -> str:
    method = getattr(model, "quantization_method", None)
    return str(model.dtype).removeprefix("torch.") + (f", {getattr(method, 'value', method)}" if method else "")


def _open_release(run: FinishedRun, release: str, found: Scored, device: torch.device) -> Opened:
    """The release, to be fed the run's tokens. Raises `UserError` where it is none of the run, or cannot be."""
    own = run.config.base
    config = BaseConfig(
        model=release,
        bits=16,
        tokenizer=str(run.weights),
        device=own.device,
        trust_remote_code=own.trust_remote_code,
    )
    with finished.model_errors("release"):
        opened = finished.open_model(config, device, as_saved=True)
    labels = _with_labels(opened).labels
    if opened.task is not run.task or labels != own.labels:
        rule = f"is for {_task_text(opened.task, labels)}, and the run for {_task_text(run.task, own.labels)}"
        raise UserError.of("release", release, rule, f"Give a release of this run, or {named('model')} with it alone.")
    if opened.positions is not None and opened.positions < found.longest_tokens:
        rule = f"has {opened.positions} positions, and the longest example has {found.longest_tokens} tokens"
        raise UserError.of("release", release, rule, f"Give {named('seq_len', opened.positions)}.")
    if (Path(release) / "tokenizer.json").is_file():
        with said_of("release", instead_of="tokenizer"):
            tokenizer = load_tokenizer(dataclasses.replace(config, tokenizer=release))
        if tokenizer.get_vocab() != found.tokenizer.get_vocab():
            rule = "has another vocabulary than the run, so the same tokens mean something else to it"
            raise UserError.of("release", release, rule, "Give a release of this run.")
    return opened


def _task_text(task: Task, labels: tuple[str, ...] | None) -> str:
    return task.name if labels is None else f"{task.name} with the labels {', '.join(labels)}"


def _with_labels(opened: Opened) -> BaseConfig:
    """The settings with the labels that the model itself names."""
    if not opened.task.model.has_labels:
        return opened.config
    architecture = load_model_config(opened.config)
    names = tuple(architecture.id2label[number] for number in range(architecture.num_labels))
    several = getattr(architecture, "problem_type", None) == "multi_label_classification"
    return dataclasses.replace(opened.config, labels=names, multi_label=several)
