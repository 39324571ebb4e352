"""Answers to prompts: one streamed as it comes, or many at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import transformers
from transformers.generation.streamers import BaseStreamer

from qlora_kit import data
from qlora_kit.data.problems import Problems
from qlora_kit.errors import said_of
from qlora_kit.runs.finished import Opened
from qlora_kit.tasks import decoding
from qlora_kit.tasks.decoding import Sampling, WrittenAnswer

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

SHOWN_CHARACTERS = 40  # of a prompt in a message
UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # how a character decodes whose bytes are not all there yet


@dataclass(frozen=True)
class Prompt:
    """What was asked, and its tokens as training laid such prompts out."""

    text: str
    input_ids: list[int]


def encode_prompts(examples: Iterable[data.Example], opened: Opened, raw: bool, setting: str) -> list[Prompt]:
    """The tokens of each prompt: in the template that training used, or (`raw`) as the text stands.

    Raises one `UserError`, said of `setting`, for all that are empty, no text, or leave no room for an answer.
    """
    problems = Problems(setting, "prompts", "Fix or remove it." if setting == "data" else "Give another.")
    prompts = []
    for example in examples:
        rule = _text_rule(example)
        with said_of(setting, instead_of="data"):
            ids = _input_ids(example, opened.tokenizer, raw) if rule is None else []
        if opened.positions is not None and len(ids) >= opened.positions:
            rule = f"has {len(ids)} tokens, and the model's {opened.positions} positions must hold the answer too"
        if rule is not None:
            problems.add(example.origin, rule)
        prompts.append(Prompt(example.prompt or "", ids))
    problems.raise_if_any()
    return prompts


def typed_prompt(text: str) -> data.Example:
    """A prompt that was typed, named by its beginning."""
    is_long = len(text) > SHOWN_CHARACTERS
    return data.prompt_of(text, text[:SHOWN_CHARACTERS] + "…" if is_long else text)


def _text_rule(example: data.Example) -> str | None:
    """The rule that the text of a prompt breaks, or None."""
    text = example.prompt or ""
    if not text.strip():
        return "is empty"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # bytes of the command line or of a pipe that are no UTF-8
        return "is not UTF-8"
    return None


def _input_ids(example: data.Example, tokenizer: PreTrainedTokenizerBase, raw: bool) -> list[int]:
    return data.encode_text(example.prompt or "", tokenizer) if raw else data.encode_conversation(example, tokenizer)


@contextmanager
def seeded(model: Any, seed: int) -> Iterator[None]:
    """Answer within this: what is drawn follows from `seed`, and the random state is afterwards as before."""
    with decoding.undisturbed(model):
        transformers.set_seed(seed)
        yield


def stream(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    sampling: Sampling,
    emit: Callable[[str], None],
) -> WrittenAnswer:
    """Answer one prompt, each piece of text given to `emit` as soon as its characters are whole."""
    room = decoding.room(model, len(prompt.input_ids), sampling.max_new_tokens)
    assert room > 0, "prompts without room are refused when they are encoded"
    streamer = _Streamer(tokenizer, emit)
    decoding.generate_ids(model, tokenizer, [prompt.input_ids], room, sampling, streamer)
    ids = streamer.answer_ids
    return WrittenAnswer(
        tokenizer.decode(ids, skip_special_tokens=True), is_cut=not set(ids) & set(decoding.stop_ids(model, tokenizer))
    )


def answer_in_order(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    batch_size: int,
) -> Iterator[WrittenAnswer]:
    """The answers to `prompts` in their order, `batch_size` worked on at once."""
    for start in range(0, len(prompts), batch_size):
        part = [prompt.input_ids for prompt in prompts[start : start + batch_size]]
        yield from decoding.answer_all(model, tokenizer, part, sampling, batch_size)


class _Streamer(BaseStreamer):  # type: ignore[misc]  # Any to mypy
    """Gives the text of each token to `emit` when it comes.

    A token is decoded together with the ones before it, for many tokenizers drop a space at the beginning of what they
    decode. transformers' own streamer waits for whole words instead.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, emit: Callable[[str], None]) -> None:
        self._tokenizer = tokenizer
        self._emit = emit
        self.answer_ids: list[int] = []
        self._context = 0  # tokens from here to `_given` are decoded with new ones for their sake
        self._given = 0  # tokens whose text was given
        self._saw_prompt = False

    def put(self, value: torch.Tensor) -> None:
        """Take new tokens; the first call brings the prompt."""
        if not self._saw_prompt:
            self._saw_prompt = True
            return
        self.answer_ids += value.flatten().tolist()
        self._give(is_end=False)

    def end(self) -> None:
        """Nothing comes any more: what was held back is text too."""
        self._give(is_end=True)

    def _give(self, is_end: bool) -> None:
        parts = [self.answer_ids[self._context : self._given], self.answer_ids[self._context :]]
        before, now = self._tokenizer.batch_decode(parts, skip_special_tokens=True)
        if len(now) > len(before) and (is_end or not now.endswith(UNFINISHED)):
            self._context, self._given = self._given, len(self.answer_ids)
            self._emit(now[len(before) :])
