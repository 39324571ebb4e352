"""How well a model does on held-out data: its loss, its answers, their exact match.

Scoring leaves no trace: mode and random state are put back, so that a run with evaluations equals one without.
"""

from __future__ import annotations

import dataclasses
import math
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qlora_kit import data
from qlora_kit.data.encode import IGNORED

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedTokenizerBase
    from transformers.generation.streamers import BaseStreamer

ANSWER_BATCH = 32  # prompts answered at once, where memory allows
NOT_DRAWN = {"temperature": 1.0, "top_p": 1.0, "top_k": 50}  # what transformers takes for unset
MAX_ANSWER_TOKENS = 256  # longest answer that exact match lets a model give
SAMPLE_TOKENS = 64  # tokens of the answer that a run shows at each evaluation


@dataclass(frozen=True)
class Loss:
    """Mean cross-entropy over `tokens` supervised tokens, in nats."""

    mean: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """The exponential of the mean, capped where a float ends."""
        return math.exp(min(self.mean, 700))


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: the likeliest at temperature 0, else drawn from the likeliest that make up `top_p`."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0


@dataclass(frozen=True)
class WrittenAnswer:
    """What a model answered, and whether it was cut off before it ended by itself."""

    text: str
    is_cut: bool


@dataclass(frozen=True)
class AnswerLengths:
    """Prompts to answer: how many, the tokens of the longest, and those that an answer may have."""

    prompts: int
    prompt_tokens: int
    new_tokens: int

    def also(self, other: AnswerLengths) -> AnswerLengths:
        """These, where `other` are answered too, at another time: the larger of each number."""
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return AnswerLengths(*(max(pair) for pair in pairs))


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """What a run does with held-out data, as far as memory goes.

    It scores `rows` rows, the longest of `row_tokens`; it shows the answer to a prompt (`sampled`), and where the task
    or `exact_match` wants it answers many (`asked`).
    """

    rows: int
    row_tokens: int
    sampled: AnswerLengths | None = None
    asked: AnswerLengths | None = None


NOTHING_HELD_OUT = HeldOut(rows=0, row_tokens=0)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards the mode and every random state are as before."""
    import numpy as np
    import torch

    was_training = model.training
    python_state, numpy_state = random.getstate(), np.random.get_state()
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
        model.eval()
        try:
            yield
        finally:
            model.train(was_training)
            random.setstate(python_state)
            np.random.set_state(numpy_state)


def mean_loss(model: nn.Module, batches: Iterable[dict[str, torch.Tensor]]) -> Loss:
    """The loss over every supervised token of `batches` (each token counts the same, whatever its batch).

    `batches` hold `input_ids_BT`, `labels_BT` (−100 where unsupervised) and masks, on the model's device.
    """
    total, tokens = 0.0, 0
    with undisturbed(model):
        for batch in batches:
            count = int((batch["labels"][:, 1:] != IGNORED).sum())
            if count:
                total += float(model(**batch).loss) * count
                tokens += count
    return Loss(total / max(tokens, 1), tokens)


def answer(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[list[int]], max_new_tokens: int
) -> list[str]:
    """The greedy answers to `prompts` (token ids), each ended by one of `stop_ids` or after `max_new_tokens`.

    An answer also ends where the model's positions do; a prompt that fills them gets an empty one.
    """
    with undisturbed(model):
        return [found.text for found in answer_all(model, tokenizer, prompts, Sampling(max_new_tokens))]


def answer_all(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    sampling: Sampling,
    batch_size: int = ANSWER_BATCH,
    tick: Callable[[int], None] = lambda count: None,
) -> list[WrittenAnswer]:
    """As `answer`, by `sampling`, `batch_size` at a time; call it within `undisturbed`, which keeps the random state.

    `tick` is called with the number of prompts answered since the last call.
    """
    rooms = [room(model, len(prompt), sampling.max_new_tokens) for prompt in prompts]
    answers, stops = [WrittenAnswer("", is_cut=True)] * len(prompts), set(stop_ids(model, tokenizer))
    tick(rooms.count(0))
    for own in sorted(set(rooms) - {0}):  # prompts with the same room go together, so that none shortens another
        members = [index for index, other in enumerate(rooms) if other == own]
        for start in range(0, len(members), batch_size):
            part = members[start : start + batch_size]
            width, out = generate_ids(model, tokenizer, [prompts[i] for i in part], own, sampling)
            texts = tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
            for index, text, ids in zip(part, texts, out[:, width:].tolist(), strict=True):
                answers[index] = WrittenAnswer(text, is_cut=stops.isdisjoint(ids))
            tick(len(part))
    return answers


def stop_ids(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end an answer: end of text, and those that the model came with (an end of turn)."""
    return end_ids(model.generation_config.eos_token_id, tokenizer)


def end_ids(own: int | list[int] | None, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The end of text of `tokenizer`, and the tokens that a model came with to end answers."""
    return sorted({tokenizer.eos_token_id, *([own] if isinstance(own, int) else own or [])})


def room(model: Any, prompt_tokens: int, max_new_tokens: int) -> int:
    """The tokens that an answer may have before `max_new_tokens` or the model's positions end it."""
    positions = getattr(model.config, "max_position_embeddings", None) or sys.maxsize
    return max(0, min(max_new_tokens, positions - prompt_tokens))


def generate_ids(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    sampling: Sampling,
    streamer: BaseStreamer | None = None,
) -> tuple[int, torch.Tensor]:
    """Prompts padded on the left to one width, and (B, T) tokens: prompts of that width, then answers, then padding.

    `max_new_tokens` counts, not that of `sampling`. `streamer` gets each token as it comes (B = 1 then).
    """
    import torch
    from transformers import GenerationConfig

    pad = tokenizer.pad_token_id
    draws = sampling.temperature > 0
    drawn = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=draws,
        use_cache=True,
        pad_token_id=pad,
        eos_token_id=stop_ids(model, tokenizer),
        **(drawn if draws else NOT_DRAWN),  # what is left unset comes from the model's own generation config
    )
    width = max(len(prompt) for prompt in prompts)
    ids_BT = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask_BT = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    out_BT = model.generate(input_ids=ids_BT, attention_mask=mask_BT, generation_config=settings, streamer=streamer)
    return width, out_BT


def count_exact_matches(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[data.Example],
    tick: Callable[[int], None] = lambda count: None,
    batch_size: int = ANSWER_BATCH,
) -> float:
    """The share of the prompts of `examples` that the model answers to the letter, `batch_size` at a time.

    `tick` is called with the number of prompts answered since the last call. Raises `UserError` where the chat
    template fails.
    """
    expected = [example.completion for example in examples]
    prompts = [data.encode_prompt(example, tokenizer) for example in examples]
    sampling = Sampling(answer_tokens(tokenizer, expected))
    with undisturbed(model):
        answers = answer_all(model, tokenizer, prompts, sampling, batch_size, tick)
    return exact_match([found.text for found in answers], expected)


def answer_tokens(tokenizer: PreTrainedTokenizerBase, expected: Sequence[str]) -> int:
    """The tokens that an answer may have where these are `expected`: some more, so that one that goes on is seen to."""
    longest = max(len(ids) for ids in tokenizer(list(expected), add_special_tokens=False)["input_ids"])
    return min(longest + 8, MAX_ANSWER_TOKENS)


def answers_to(tokenizer: PreTrainedTokenizerBase, examples: Sequence[data.Example]) -> AnswerLengths:
    """What `count_exact_matches` asks of `examples`. Raises `UserError` where the chat template fails."""
    prompts = [len(data.encode_prompt(example, tokenizer)) for example in examples]
    return AnswerLengths(
        len(prompts), max(prompts), answer_tokens(tokenizer, [example.completion for example in examples])
    )


def exact_match(answers: Sequence[str], expected: Sequence[str]) -> float:
    """The share of `answers` equal to `expected`, apart from white space at the ends."""
    assert len(answers) == len(expected), "one answer for each expected text"
    return sum(a.strip() == e.strip() for a, e in zip(answers, expected, strict=True)) / max(len(answers), 1)
