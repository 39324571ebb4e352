"""Loss, perplexity and exact match of a run's base, of what it trained, and of a release, on the same tokens."""

from __future__ import annotations

import dataclasses
import gc
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from qlora_kit import data
from qlora_kit.config.settings import DEFAULT_ASKED, BaseConfig, RunConfig
from qlora_kit.errors import UserError, said_of
from qlora_kit.memory import preflight
from qlora_kit.model.device import resolve_device
from qlora_kit.model.load import load_as_saved
from qlora_kit.model.source import load_model_config, max_positions
from qlora_kit.model.tokenizer import load_tokenizer
from qlora_kit.runs import finished, messages
from qlora_kit.runs.finished import FinishedRun, Opened
from qlora_kit.system.progress import counted, say_line
from qlora_kit.tasks import decoding, inputs

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Score:
    """How well one model does; `exact_match` is a share, None where no prompt was asked."""

    model: str  # what it is, in words
    loss: decoding.Loss
    exact_match: float | None


@dataclass(frozen=True)
class Material:
    """What every model is scored on: encoded examples, and those whose prompts are asked."""

    source: str
    tokenizer: PreTrainedTokenizerBase
    encoded: data.EncodedSet
    asked: list[data.Example]
    seq_len: int
    unread: inputs.Unread

    @property
    def longest_tokens(self) -> int:
        """The tokens of the longest example."""
        return max(len(row.input_ids) for row in self.encoded.rows)


@dataclass(frozen=True)
class Evaluation:
    """The scores by name (base, adapter or full, release), what they were taken on, and what to be warned of."""

    source: str
    seq_len: int
    report: data.AuditReport
    asked: int
    scores: dict[str, Score]
    warning: str | None

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, ready for JSON; what is no finite number is None."""
        return {
            "data": self.source,
            "examples": self.report.examples,
            "dropped": self.report.examples - self.report.kept,
            "truncated": self.report.truncated,
            "seq_len": self.seq_len,
            "tokens": self.report.supervised_tokens,
            "exact_match_prompts": self.asked,
            "warning": self.warning,
            "models": {name: _plain(score) for name, score in self.scores.items()},
        }


def _plain(score: Score) -> dict[str, Any]:
    loss = score.loss
    numbers = {"loss": loss.mean, "perplexity": loss.perplexity, "exact_match": score.exact_match}
    finite = {name: n if n is not None and math.isfinite(n) else None for name, n in numbers.items()}
    return {"model": score.model, **finite}


def read_material(run: FinishedRun, source: str | None) -> Material:
    """The data in `source`, or without one what the run held out, laid out and cut as the run did it.

    Raises `UserError` where there is none, or it cannot be read or encoded.
    """
    tokenizer = finished.run_tokenizer(run)
    seq_len = data.resolve_seq_len(run.seq_len, tokenizer, finished.run_positions(run))
    material = _read(run.config, source, tokenizer, seq_len)
    return dataclasses.replace(material, asked=[]) if run.is_plain_text else material


def _read(config: RunConfig, source: str | None, tokenizer: PreTrainedTokenizerBase, seq_len: int) -> Material:
    examples, described, unread = inputs.examples_to_score(config, source)
    encoded = inputs.encode(config, examples, tokenizer, seq_len, "--data")
    asked = [example for example in examples if example.prompt is not None or example.messages is not None]
    count = config.evaluation.exact_match or DEFAULT_ASKED
    return Material(described, tokenizer, encoded, asked[:count], seq_len, unread)


def evaluate(run: FinishedRun, source: str | None, release: str | None, console: Console) -> Evaluation:
    """Score the base of `run`, what it trained, and `release` where one is given; one model is loaded at a time.

    `source` is as in `read_material`. Progress goes to `console`. Raises `UserError`, before any model is loaded
    for all but weights that cannot be read.
    """
    material = read_material(run, source)
    _say_unread(material, console)
    device = resolve_device(run.config.base.device)
    with console.status("checking the base"):
        warning = finished.check_base(run)
    released = None if release is None else _check_release(run, release, material)
    scores = {}
    for name, title, model, context in _models(run, released, device, console):
        with context:
            inputs.check_vocabulary(material.tokenizer, model)
            scores[name] = _score(name, title, model, material, run.config, console)
        del model  # before the next one is loaded
    return Evaluation(material.source, material.seq_len, material.encoded.report, len(material.asked), scores, warning)


def evaluate_model(config: RunConfig, opened: Opened, source: str, console: Console) -> Evaluation:
    """Score the model `opened`, the one that `config` names, alone on `source`.

    Progress goes to `console`. Raises `UserError`.
    """
    seq_len = data.resolve_seq_len(config.data.seq_len, opened.tokenizer, opened.positions)
    material = _read(config, source, opened.tokenizer, seq_len)
    _say_unread(material, console)
    with console.status(f"loading {config.base.model}"):
        model = opened.load()
    inputs.check_vocabulary(material.tokenizer, model)
    score = _score("model", f"{config.base.model}, {_saved_as(model)}", model, material, config, console)
    return Evaluation(source, seq_len, material.encoded.report, len(material.asked), {"model": score}, None)


def _say_unread(material: Material, console: Console) -> None:
    for line in messages.unread_lines(material.unread):
        say_line(console, line)


Loaded = tuple[str, str, Any, AbstractContextManager[Any]]


def _models(run: FinishedRun, released: BaseConfig | None, device: torch.device, console: Console) -> Iterator[Loaded]:
    """Each model by its name and in words, loaded when its turn comes and forgotten after it, and how to switch to it.

    The base is the adapter's own, with the adapter switched off.
    """
    settings = run.config.base
    title = f"{settings.model} at {settings.bits} bits"

    def loaded(title: str, load: Callable[[], Any]) -> Any:
        _free(device)
        with console.status(f"loading {title}"):
            return load()

    if settings.full:
        yield "base", title, loaded("the base", lambda: finished.load_run_base(run, device)), nullcontext()
        title += ", every weight trained"
        yield "full", title, loaded("what was trained", lambda: finished.load_run_model(run, device)), nullcontext()
    else:
        model = loaded("base and adapter", lambda: finished.load_run_model(run, device))
        yield "base", title, model, model.disable_adapter()
        yield "adapter", f"{title}, LoRA r = {run.config.adapter.r}", model, nullcontext()
        del model
    if released is not None:
        model = loaded(released.model, lambda: load_as_saved(released, device))
        yield "release", f"{released.model}, {_saved_as(model)}", model, nullcontext()


def _free(device: torch.device) -> None:
    """Give back what the last model took."""
    import torch

    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _saved_as(model: Any) -> str:
    method = getattr(model, "quantization_method", None)
    return str(model.dtype).removeprefix("torch.") + (f", {getattr(method, 'value', method)}" if method else "")


def _check_release(run: FinishedRun, release: str, material: Material) -> BaseConfig:
    """The settings of the release. Raises `UserError` where it is none, or could not be fed the run's tokens."""
    own = run.config.base
    config = BaseConfig(
        model=release,
        bits=16,
        tokenizer=str(run.weights),
        device=own.device,
        trust_remote_code=own.trust_remote_code,
    )
    with finished.model_errors("--release"):
        positions = max_positions(load_model_config(config))
    if positions is not None and positions < material.longest_tokens:
        rule = f"has {positions} positions, and the longest example has {material.longest_tokens} tokens"
        raise UserError.of("--release", release, rule, f"Give --seq-len {positions}.")
    folder = Path(release)
    if (folder / "tokenizer.json").is_file():
        with said_of("--release", instead_of="--tokenizer"):
            tokenizer = load_tokenizer(dataclasses.replace(config, tokenizer=release))
        if tokenizer.get_vocab() != material.tokenizer.get_vocab():
            rule = "has another vocabulary than the run, so the same tokens mean something else to it"
            raise UserError.of("--release", release, rule, "Give a release of this run.")
    return config


def _score(name: str, title: str, model: Any, material: Material, config: RunConfig, console: Console) -> Score:
    rows = material.encoded
    collate = data.Collator(material.tokenizer.pad_token_id, max_tokens=material.seq_len)
    with counted(console, f"{name}: loss", len(rows)) as tick:
        loss = decoding.mean_loss(model, inputs.batches_of(rows, collate, config.optim.batch_size, model.device, tick))
    exact = None
    if material.asked:
        with counted(console, f"{name}: answers", len(material.asked)) as tick:
            answers = decoding.answers_to(material.tokenizer, material.asked)
            at_once = preflight.prompts_in_free(config, model.device, answers)
            exact = decoding.count_exact_matches(model, material.tokenizer, material.asked, tick, at_once)
    return Score(title, loss, exact)
