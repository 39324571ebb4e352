"""From words to a model's tokens, and which token is the first piece of each word.

A sentence is tokenized as its words with a space between them, so that its tokens are those of running text: what a
model saw when it was pretrained, and what `transformers.pipeline` gives it. (Word by word, a byte-level tokenizer such
as GPT-2's takes a word without the space before it for another word; transformers 5 does so without a word.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from qlora_kit.tasks.rows import not_empty

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Encoding = dict[str, Any]
"""What a tokenizer gives, with `special_tokens_mask` (1 for tokens that it added), and where not cut `firsts`."""
Encode = Callable[[dict[str, Any]], Encoding]  # from the options that say where to cut


@dataclass(frozen=True, kw_only=True)
class Pieces:
    """The tokens of a sentence, at most as many as it was cut at."""

    input_ids: list[int]
    token_type_ids: list[int] | None  # for models that ask
    firsts: list[int | None]  # of each word the place of its first piece; None where it has none, or was cut off
    full_tokens: int
    lost: int  # words that were cut off


def split(words: Sequence[str], tokenizer: PreTrainedTokenizerBase, seq_len: int) -> Pieces:
    """The tokens of `words`, with what the tokenizer adds to a text, cut at `seq_len`.

    A token that reaches over several words belongs to the first of them.
    """
    encode = _of_text(words, tokenizer) if tokenizer.is_fast else _word_by_word(words, tokenizer)
    encoded = encode({})
    firsts: list[int | None] = encoded["firsts"]
    full_tokens, lost = len(encoded["input_ids"]), 0
    if full_tokens > seq_len:
        whole, encoded = encoded, encode({"truncation": True, "max_length": seq_len})
        places = _kept_places(whole, encoded, tokenizer.truncation_side)
        kept = [None if first is None else places.get(first) for first in firsts]
        lost = kept.count(None) - firsts.count(None)
        firsts = kept
    return Pieces(
        input_ids=not_empty(encoded["input_ids"], tokenizer),
        token_type_ids=encoded.get("token_type_ids"),
        firsts=firsts,
        full_tokens=full_tokens,
        lost=lost,
    )


def _kept_places(whole: Encoding, cut: Encoding, side: str) -> dict[int, int]:
    """Where the tokens of the words in `whole` stand in `cut`, which lacks some on the `side`."""
    before, after = ([n for n, is_added in enumerate(e["special_tokens_mask"]) if not is_added] for e in (whole, cut))
    before = before[len(before) - len(after) :] if side == "left" else before[: len(after)]
    return dict(zip(before, after, strict=True))


def _of_text(words: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Encode:
    """By a tokenizer that says where in a text its tokens stand."""
    text = " ".join(words)

    def encode(cut: dict[str, Any]) -> Encoding:
        found = tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True, verbose=False, **cut)
        return {**found, "firsts": _firsts(words, found["offset_mapping"])}

    return encode


def _firsts(words: Sequence[str], spans: Sequence[tuple[int, int]]) -> list[int | None]:
    """For each word the first of the tokens, with their `spans` of characters, that begins within it.

    A span may begin with the space before its word; that of a token which stands for no text is empty.
    """
    ends = list(accumulate(len(word) + 1 for word in words))  # of each word with the space behind it
    firsts: list[int | None] = [None] * len(words)
    number = 0
    for token, (start, end) in enumerate(spans):
        while number < len(words) and start >= ends[number] - 1:
            number += 1
        if number < len(words) and firsts[number] is None and max(start, ends[number] - len(words[number]) - 1) < end:
            firsts[number] = token
    return firsts


def _word_by_word(words: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Encode:
    """By a tokenizer in Python, which does not say it: the tokens of each word, with the space before it."""
    ids: list[int] = []
    starts: list[int | None] = []
    for number, word in enumerate(words):
        own = _bare(tokenizer, f" {word}" if number else word)
        before = _space(tokenizer, own) if number else 0
        starts.append(len(ids) + before if len(own) > before else None)
        ids += own

    def encode(cut: dict[str, Any]) -> Encoding:
        found = tokenizer.prepare_for_model(list(ids), return_special_tokens_mask=True, verbose=False, **cut)
        leading = found["special_tokens_mask"].index(0) if ids and not cut else 0
        return {**found, "firsts": [None if start is None else start + leading for start in starts]}

    return encode


def _bare(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _space(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> int:
    """How many tokens at the beginning of `ids` stand for nothing but the space before a word."""
    space = _bare(tokenizer, " ")
    return len(space) if space and list(ids[: len(space)]) == space else 0
