"""What a run left, or any model folder, opened again: settings, tokenizer, and the model when it is asked for."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.adapters import files
from qlora_kit.config.files import read_settings
from qlora_kit.config.settings import BaseConfig, RunConfig
from qlora_kit.errors import UserError, named, said_of
from qlora_kit.model import hub, source
from qlora_kit.model.load import load_as_saved, load_base
from qlora_kit.model.tokenizer import load_tokenizer
from qlora_kit.runs.folder import LABELS_FILE, PARTIAL, RUN_FILE, complete_checkpoints
from qlora_kit.tasks import registry
from qlora_kit.tasks.task import Task

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

FROM_NOW = ("device", "trust_remote_code")  # where a model runs, and whether its code may: never taken from a file


@dataclass(frozen=True)
class FinishedRun:
    """A whole run folder, its record (`run.json`), and the settings in it with those that were given over them."""

    folder: Path
    record: Mapping[str, Any]
    config: RunConfig

    @property
    def weights(self) -> Path:
        """The folder of what was trained, with the tokenizer: factors, or a whole model after `--full`."""
        return self.folder / ("model" if self.config.base.full else "adapter")

    @property
    def base_settings(self) -> BaseConfig:
        """The base of the run, with the tokenizer that was saved beside the weights."""
        return dataclasses.replace(self.config.base, tokenizer=str(self.weights))

    @property
    def model_settings(self) -> BaseConfig:
        """What is loaded to have the trained model: the base, or after `--full` the run's own."""
        if not self.config.base.full:
            return self.base_settings
        return dataclasses.replace(self.base_settings, model=str(self.weights), weights="pretrained", revision=None)

    @property
    def is_plain_text(self) -> bool:
        """Whether the run learned from text without prompts, so that no template was used."""
        return bool(self.record.get("plain_text", False))

    @property
    def task(self) -> Task:
        """What it was trained to do."""
        return registry.task_named(self.config.base.task)

    @property
    def seq_len(self) -> int:
        """The tokens that an example of the run may have, or those given now."""
        return self.config.data.seq_len or int(self.record["resolved"]["seq_len"])


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A model that has not been loaded yet, and what must be known before: `load` puts it on its device."""

    title: str
    tokenizer: PreTrainedTokenizerBase
    positions: int | None
    is_plain_text: bool
    load: Callable[[], Any]
    config: BaseConfig  # with the task, also where the model's own config.json says it

    @property
    def task(self) -> Task:
        """What it was trained to do."""
        return registry.task_named(self.config.task)


def find_run(path: str, given: Mapping[str, object], base_model: str | None = None) -> FinishedRun:
    """The finished run in the folder `path`; `given` settings win over its own, `base_model` says where its base is.

    Raises `UserError` where there is none, where it is unfinished or not whole, and for settings that break a rule.
    """
    folder = Path(path)
    record = _read_record(folder)
    settings: dict[str, object] = {k: v for k, v in read_settings(record).items() if k not in FROM_NOW}
    if base_model is not None:
        settings |= {"model": base_model, "revision": None}
    run = FinishedRun(folder, record, RunConfig.from_flat({**settings, **given}))
    needed = "config.json" if run.config.base.full else files.WEIGHTS_FILE
    if not (run.weights / needed).is_file():
        rule = f"holds no trained weights (no {run.weights.name}/{needed})"
        raise UserError.of("run", path, rule, "Give the folder of a training run, whole.")
    _check_labels(run)
    return run


def label_map(config: BaseConfig) -> dict[str, Any]:
    """What is written beside the weights about the labels, whose names neither they nor PEFT's settings hold."""
    return {"task": config.task, "labels": list(config.labels or ()), "multi_label": bool(config.multi_label)}


def _check_labels(run: FinishedRun) -> None:
    """Check that the labels of the run are those that its weights were saved with. Raises `UserError`."""
    file, config = run.weights / LABELS_FILE, run.config.base
    if config.labels is None:
        return
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError.of("run", str(run.folder), f"its {file.name} cannot be read ({error})", "Mend it.") from None
    if saved != label_map(config):
        rule = f"its {RUN_FILE} and its {run.weights.name}/{file.name} name different labels"
        raise UserError.of("run", str(run.folder), rule, "Mend the one that is wrong, or train again.")


def _read_record(folder: Path) -> dict[Any, Any]:
    file = folder / RUN_FILE
    if not file.is_file() or folder.name.endswith(PARTIAL):
        raise _no_run(folder)
    try:
        record: dict[Any, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError.of("run", str(folder), f"its {file.name} cannot be read ({error})", "Mend it.") from None
    known = isinstance(record, dict) and {"resolved", "base_hash"} <= record.keys()
    if not known or not isinstance(record.get("settings"), dict):
        raise UserError.of("run", str(folder), f"its {file.name} is no record of a run", "Give another run.")
    return record


def _no_run(folder: Path) -> UserError:
    """What to tell a user who gave `folder` for a finished run."""
    final = folder.with_name(folder.name.removesuffix(PARTIAL))
    unfinished = final.with_name(final.name + PARTIAL)
    if unfinished.is_dir():
        resumable = bool(complete_checkpoints(unfinished))
        remedy = f"Finish it with `qlora-kit train --resume {final}`." if resumable else "Run it again."
        return UserError.of("run", str(folder), f"is unfinished (it lies in {unfinished})", remedy)
    if (folder.parent / RUN_FILE).is_file():
        return UserError.of("run", str(folder), "is a part of a run", f"Give {named('run', folder.parent)}.")
    if (folder / "config.json").is_file():
        return UserError.of("run", str(folder), "is a model, not a run", f"Give {named('model', folder)} instead.")
    if folder.exists():
        return UserError.of("run", str(folder), f"holds no {RUN_FILE}", "Give the folder of a training run.")
    names = [entry.name for entry in folder.parent.iterdir()] if folder.parent.is_dir() else []
    near = difflib.get_close_matches(folder.name, names, n=1)
    remedy = f"Did you mean {folder.parent / near[0]}?" if near else "Give the folder of a training run."
    return UserError.of("run", str(folder), "is no such folder", remedy)


@contextmanager
def memory_errors(device: str) -> Iterator[None]:
    """Turn what a device says when its memory is full into a `UserError`."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        rule = f"has too little memory ({str(error).splitlines()[0]})"
        raise UserError.of(
            "device", device, rule, f"Try {named('batch_size', 1)}, or {named('device', 'cpu')}."
        ) from None


def run_tokenizer(run: FinishedRun) -> PreTrainedTokenizerBase:
    """The tokenizer of the run with its template, as it was saved beside the weights. Raises `UserError`."""
    with said_of("run", instead_of="tokenizer"):
        return run.task.prepare(load_tokenizer(run.base_settings))


def check_base(run: FinishedRun) -> str | None:
    """A warning where the base is not the one that the run trained on, else None. Raises `UserError` without a base."""
    with _base_errors():
        source.load_model_config(run.base_settings)
        now = source.hash_base(run.base_settings, run.config.seed)
    if now == run.record["base_hash"]:
        return None
    return f"warning: {run.config.base.model} is not the base of this run, or has changed since: its hash differs"


def _base_errors() -> AbstractContextManager[None]:
    remedies = hub.remedies(f"Say where the run's base is now with {named('base', 'MODEL')}.")
    return said_of("base", instead_of="model", remedies=remedies)


def model_errors(setting: str) -> AbstractContextManager[None]:
    """Say mistakes of the model of `setting`: it may not have random weights."""
    return said_of(setting, instead_of="model", remedies=hub.remedies("Give a model folder."))


def run_positions(run: FinishedRun) -> int | None:
    """The positions of the trained model, None where it has no limit. Raises `UserError` without its base."""
    with _base_errors():
        return source.max_positions(source.load_model_config(run.model_settings))


def load_run_base(run: FinishedRun, device: torch.device) -> Any:
    """The base of `run` without what was trained, in its bits. Raises `UserError`."""
    return load_base(run.base_settings, device, run.config.seed)


def load_run_model(run: FinishedRun, device: torch.device) -> Any:
    """What `run` trained: the factors on its base in its bits, or after `--full` the whole model.

    Raises `UserError`.
    """
    if run.config.base.full:
        return load_base(run.model_settings, device)
    with said_of("run", instead_of="adapter"):
        return files.load_adapter(load_run_base(run, device), run.weights)


def open_run(run: FinishedRun, device: torch.device) -> Opened:
    """The trained model of `run`, for `device`. Raises `UserError` where its base or tokenizer is missing."""
    config = run.config.base
    positions = run_positions(run)
    kind = "every weight trained" if config.full else f"with its adapter, r = {run.config.adapter.r}"
    title = f"{run.folder}: {config.model} at {config.bits} bits, {kind}"
    loader = partial(load_run_model, run, device)
    return Opened(
        title=title,
        tokenizer=run_tokenizer(run),
        positions=positions,
        is_plain_text=run.is_plain_text,
        load=loader,
        config=run.model_settings,
    )


def _check_has_head(task: Task, config: BaseConfig, architecture: PretrainedConfig) -> None:
    """Check that the model was saved with the head of its task: one drawn at random answers at random.

    Raises `UserError`.
    """
    if task.model.has_new_head and not task.model.was_saved(architecture):
        remedy = f"Give a release of a run, or the run itself with {named('run')}."
        raise UserError.of("model", config.model, f"has no head for {task.name}", remedy)


def open_model(config: BaseConfig, device: torch.device, as_saved: bool) -> Opened:
    """The model that `config` names: in the dtype of its files if `as_saved`, else in `config.bits`.

    Raises `UserError`.
    """
    _check_is_model(config)
    with model_errors("model"):
        architecture = source.load_model_config(config)
    task = registry.task_of(config, architecture)
    config = task.saved_settings(dataclasses.replace(config, task=task.name), architecture)
    _check_has_head(task, config, architecture)
    return Opened(
        title=f"{config.model}, as saved" if as_saved else f"{config.model} at {config.bits} bits",
        tokenizer=task.prepare(load_tokenizer(config)),
        positions=source.max_positions(architecture),
        is_plain_text=False,
        load=partial(load_as_saved if as_saved else load_base, config, device),
        config=config,
    )


def _check_is_model(config: BaseConfig) -> None:
    """Check that a local folder is no run and no adapter. Raises `UserError`."""
    folder = Path(config.model)
    if (folder / RUN_FILE).is_file():
        raise UserError.of("model", config.model, "is a run, not a model", f"Give {named('run', folder)} instead.")
    if (folder / files.CONFIG_FILE).is_file() and not (folder / "config.json").is_file():
        remedy = f"Give {named('run')} with the run that it belongs to, or merge it into its base."
        raise UserError.of("model", config.model, "is an adapter, not a whole model", remedy)
