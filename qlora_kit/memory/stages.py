"""What a run does beside its steps: it loads, evaluates and answers prompts, simulated on the model of the plan.

Evaluation and generation come after the simulated steps, so that the optimizer's states are there as they are in a run.
Prompts are answered as transformers' `generate` does it: all at once, then token by token with a cache that grows by
copying, of which the last token is simulated.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Collection, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from qlora_kit.config.settings import RunConfig
from qlora_kit.memory import kernels
from qlora_kit.memory.simulate import META, Autocast, make_batch
from qlora_kit.memory.track import MemoryTracker
from qlora_kit.system.progress import EVALUATION, GENERATING
from qlora_kit.tasks import registry
from qlora_kit.tasks.decoding import ANSWER_BATCH, MAX_ANSWER_TOKENS, SAMPLE_TOKENS, AnswerLengths, HeldOut
from qlora_kit.tasks.task_model import TaskModel


@dataclass(frozen=True, kw_only=True)
class Stage:
    """The highest moment of a phase of the run: loading, evaluation, generation or the step.

    `components` sums to `peak_bytes`; `what` says in words what is done then.
    """

    peak_bytes: int
    what: str
    operation: str
    components: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class AnswerBatch:
    """How many prompts a run answers at once: the most whose answers have room, and at least one.

    Room is what its step takes, or where more is known to be free that. `one_bytes` is the peak with one of them, and
    each more adds `each_bytes`; `most` are to be answered, or worth it.
    """

    prompts: int
    one_bytes: int
    each_bytes: int
    most: int

    @property
    def fixed_bytes(self) -> int:
        """What is there without any prompt."""
        return self.one_bytes - self.each_bytes


@dataclass(frozen=True, kw_only=True)
class Occasion:
    """Rows that are scored at once, of so many tokens, or prompts that get answers of up to `new_tokens`."""

    name: str  # EVALUATION or GENERATING
    rows: int
    tokens: int
    new_tokens: int = 0

    @property
    def passes(self) -> int:
        """How many passes are simulated, each counted as a step: their peaks move apart with the model's depth."""
        return 1 if self.name == EVALUATION else 2

    def __str__(self) -> str:
        if self.name == EVALUATION:
            return f"{self.rows} x {self.tokens} tokens"
        prompts = "a prompt" if self.rows == 1 else f"{self.rows} prompts at once,"
        return f"{prompts} of {self.tokens} tokens, with {self.new_tokens} more to answer"

    def run(self, tracker: MemoryTracker, model: Any, config: RunConfig, autocast: Autocast | None) -> None:
        """Do it on `meta`, with `model` as a step has left it."""
        model.eval()
        with torch.no_grad(), nullcontext() if autocast is None else autocast(False):
            if self.name == EVALUATION:
                task = registry.task_of(config.base, model.config).model
                task.score_pass(model, make_batch(config, self.tokens, model.config, self.rows))
            else:
                _answer(tracker, model, self)


def assumed(config: RunConfig, tokens: int) -> HeldOut:
    """What a run of `config` does with held-out data of which only the longest row is known, or assumed to be.

    Prompts are as long as that, and answers as long as they may get. No prompt is sampled of the demo's data, which
    stand for those that nobody has named: its own are short.
    """
    sampled = None if config.data.held_out_source == "demo" else AnswerLengths(1, tokens, SAMPLE_TOKENS)
    asked = AnswerLengths(config.evaluation.exact_match or 1, tokens, MAX_ANSWER_TOKENS)
    return HeldOut(rows=config.optim.batch_size, row_tokens=tokens, sampled=sampled, asked=asked)


def occasions(
    config: RunConfig, held_out: HeldOut, seq_len: int, task: TaskModel, positions: int | None
) -> tuple[Occasion, ...]:
    """What a run of `config` is simulated to do beside its steps; the model has `positions`, its rows `seq_len` tokens.

    Answers come last: to one prompt, and to as many at once as there may be.
    """
    rows = min(config.optim.batch_size, held_out.rows)
    tokens = min(held_out.row_tokens, seq_len)
    scored = (Occasion(name=EVALUATION, rows=rows, tokens=tokens),) if rows else ()
    answers = held_out.sampled if config.evaluation.exact_match is None else held_out.asked
    numbers = {1, min(answers.prompts, ANSWER_BATCH)} if answers is not None else set[int]()
    if task.decodes:  # its answers are scored, in the batches of the evaluation
        answers, numbers = held_out.asked, {rows} - {0}
    if answers is None or not task.writes:
        return scored
    room = positions or answers.prompt_tokens + answers.new_tokens
    prompt_tokens = max(1, min(answers.prompt_tokens, room - 1))
    taken = 1 if task.decodes else prompt_tokens  # of the positions of the answer
    new_tokens = max(1, min(answers.new_tokens, room - taken))
    answered = (Occasion(name=GENERATING, rows=n, tokens=prompt_tokens, new_tokens=new_tokens) for n in sorted(numbers))
    return *scored, *answered


def besides_step(
    found: Sequence[tuple[Occasion, Stage]], limit_bytes: int
) -> tuple[dict[str, Stage], AnswerBatch | None]:
    """The phases of a run beside its step, and how many prompts it answers at once within `limit_bytes`, simulated.

    The peak grows with the prompts along a line, or slower at first, as the first token's pass or the cache decides:
    so between one prompt and many it is at most on the line through both.
    """
    by_name = {occasion.name: stage for occasion, stage in found}
    answers = [(occasion, stage) for occasion, stage in found if occasion.name == GENERATING]
    if not answers:
        return by_name, None
    (one, first), (many, last) = answers[0], answers[-1]
    if one.rows > 1:  # batches that the task makes
        return by_name, None
    steps = max(many.rows - one.rows, 1)
    each_bytes = -(-(last.peak_bytes - first.peak_bytes) // steps)
    prompts = prompts_at_once(limit_bytes, first.peak_bytes, each_bytes, many.rows)
    components = {
        name: n_bytes + (last.components[name] - n_bytes) * (prompts - 1) // steps
        for name, n_bytes in first.components.items()
    }
    what = str(dataclasses.replace(many, rows=prompts))
    peak_bytes = sum(components.values())
    stage = Stage(peak_bytes=peak_bytes, what=what, operation=last.operation, components=components)
    answered = AnswerBatch(prompts=prompts, one_bytes=first.peak_bytes, each_bytes=each_bytes, most=many.rows)
    return {**by_name, GENERATING: stage}, answered


def prompts_at_once(limit_bytes: int, one_bytes: int, each_bytes: int, most: int) -> int:
    """How many of `most` prompts fit into `limit_bytes`, where one takes `one_bytes` and each more `each_bytes`.

    At least one: fewer cannot be answered.
    """
    if each_bytes <= 0:
        return most
    return max(1, min(most, 1 + (limit_bytes - one_bytes) // each_bytes))


def _answer(tracker: MemoryTracker, model: Any, occasion: Occasion) -> None:
    """The first and the last token of each answer; prompts that are answered together are padded."""
    scalar = torch.ops.aten._local_scalar_dense.default
    stand_in, tracker.stand_ins[scalar] = tracker.stand_ins[scalar], kernels.scalars(padded=occasion.rows > 1)
    options = _options(model)
    try:
        outputs = model(**_prompts(model, occasion), **options)
        _choose(outputs.logits)
        cache, read = outputs.get("past_key_values"), outputs.get("encoder_last_hidden_state")
        has_state = outputs.get("cache_params") is not None
        del outputs
        tracker.begin_step()
        tracker.mark()
        if cache is not None:
            _say_last(tracker, model, occasion, cache, read)
        elif not has_state:  # which does not grow; a model without either reads all again for each token
            whole = dataclasses.replace(occasion, tokens=occasion.tokens + occasion.new_tokens)
            _choose(model(**_prompts(model, whole), **options).logits)
    finally:
        tracker.stand_ins[scalar] = stand_in


def _say_last(tracker: MemoryTracker, model: Any, occasion: Occasion, cache: Any, read: torch.Tensor | None) -> None:
    """The last token of each answer, `cache` holding all before it."""
    _label(tracker, cache)
    with tracker.paused():
        _lengthen(cache, occasion.new_tokens - 1)
    _label(tracker, cache)
    _choose(model(**_next_token(model, occasion, read), past_key_values=cache, **_options(model)).logits)
    _label(tracker, cache)  # it was copied


def _options(model: Any) -> dict[str, Any]:
    """How `generate` calls a model: with a cache, and for the logits of the last token only, where it knows them."""
    known = _parameters(model)
    wanted = {"use_cache": True, "logits_to_keep": 1}
    return {name: value for name, value in wanted.items() if name in known}


def _parameters(model: Any) -> Collection[str]:
    own = model.get_base_model() if hasattr(model, "get_base_model") else model
    return inspect.signature(own.forward).parameters.keys()


def _ones(rows: int, tokens: int) -> torch.Tensor:
    return torch.ones((rows, tokens), dtype=torch.int64, device=META)


def _prompts(model: Any, occasion: Occasion) -> dict[str, Any]:
    """The prompts; an encoder reads them, and its decoder begins with one token."""
    shape = occasion.rows, occasion.tokens
    prompts = {"input_ids": _ones(*shape), "attention_mask": _ones(*shape)}
    if model.config.is_encoder_decoder:
        return {**prompts, "decoder_input_ids": _ones(shape[0], 1)}
    return {**prompts, **_positions(model, *shape)}


def _positions(model: Any, rows: int, tokens: int) -> dict[str, torch.Tensor]:
    """Each row's own, as its padding moves them; only some models take any."""
    return {"position_ids": _ones(rows, tokens)} if "position_ids" in _parameters(model) else {}


def _next_token(model: Any, occasion: Occasion, read_BTD: torch.Tensor | None) -> dict[str, Any]:
    """The last token of each answer, behind what was read and said before."""
    token, before = _ones(occasion.rows, 1), occasion.tokens + occasion.new_tokens
    if read_BTD is None:
        known = {"input_ids": token, "attention_mask": _ones(occasion.rows, before)}
        return {**known, **_positions(model, occasion.rows, 1)}
    mask = _ones(occasion.rows, occasion.tokens)
    return {"encoder_outputs": (read_BTD,), "attention_mask": mask, "decoder_input_ids": token}


def _choose(logits_BTV: torch.Tensor) -> None:
    """Choose the likeliest token, as `generate` does."""
    logits_BTV[:, -1].to(copy=True, dtype=torch.float32).argmax(-1)


def _layers(cache: Any) -> Iterator[tuple[Any, int, Any]]:
    """The layers of a cache that keep keys and values, each with the cache that it is in and its number there.

    An encoder-decoder has two caches; what else a layer may keep, such as a recurrent state, does not grow.
    """
    for part in ("self_attention_cache", "cross_attention_cache"):
        own = getattr(cache, part, cache if part.startswith("self") else None)
        for index, layer in enumerate(getattr(own, "layers", ())):
            if isinstance(getattr(layer, "keys", None), torch.Tensor):
                yield own, index, layer


def _label(tracker: MemoryTracker, cache: Any) -> None:
    for _, _, layer in _layers(cache):
        tracker.label(layer.keys, "cache")
        tracker.label(layer.values, "cache")


def _lengthen(cache: Any, tokens: int) -> None:
    """Let `cache` hold so many tokens more of what the model says itself."""
    for own, index, layer in _layers(cache):
        if own is not getattr(cache, "cross_attention_cache", None):
            more = (t.new_empty((*t.shape[:2], tokens, t.shape[-1])) for t in (layer.keys, layer.values))
            own.update(*more, index)
