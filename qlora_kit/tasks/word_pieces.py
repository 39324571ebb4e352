"""From words to a model's tokens, and which token is the first piece of each word.

A sentence is tokenized as its words with a space between them, so that its tokens are those of running text: what a
model saw when it was pretrained, and what `transformers.pipeline` gives it. (Word by word, a byte-level tokenizer such
as GPT-2's takes a word without the space before it for another word; transformers 5 does so without a word.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
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
    encoded = _encoded(words, tokenizer, None)
    full_tokens, whole = len(encoded["input_ids"]), encoded["firsts"]
    if full_tokens > seq_len:
        encoded = _encoded(words, tokenizer, seq_len)
    firsts = encoded["firsts"]
    lost = sum(before is not None and after is None for before, after in zip(whole, firsts, strict=True))
    ids: list[int] = encoded["input_ids"]
    if not ids:  # no words, and a tokenizer that adds nothing: the model must still see something
        ids = [tokenizer.pad_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id]
    return Pieces(ids, encoded.get("token_type_ids"), firsts, full_tokens, lost)


def _encoded(words: Sequence[str], tokenizer: PreTrainedTokenizerBase, seq_len: int | None) -> dict[str, Any]:
    cut: dict[str, Any] = {} if seq_len is None else {"truncation": True, "max_length": seq_len}
    if tokenizer.is_fast:
        encoded = dict(tokenizer(" ".join(words), return_offsets_mapping=True, verbose=False, **cut))
        return {**encoded, "firsts": _firsts(words, encoded["offset_mapping"])}
    return _encoded_word_by_word(words, tokenizer, cut)


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


def _encoded_word_by_word(
    words: Sequence[str], tokenizer: PreTrainedTokenizerBase, cut: dict[str, Any]
) -> dict[str, Any]:
    """The same by a tokenizer in Python, which does not say where its tokens stand in the text."""
    ids: list[int] = []
    starts: list[int | None] = []
    for number, word in enumerate(words):
        own = _bare(tokenizer, f" {word}" if number else word)
        before = _space(tokenizer, own) if number else 0
        starts.append(len(ids) + before if len(own) > before else None)
        ids += own
    encoded = dict(tokenizer.prepare_for_model(ids, return_special_tokens_mask=True, verbose=False, **cut))
    places = [place for place, special in enumerate(encoded["special_tokens_mask"]) if not special]
    shift = len(ids) - len(places) if tokenizer.truncation_side == "left" else 0
    firsts = [
        places[start - shift] if start is not None and 0 <= start - shift < len(places) else None for start in starts
    ]
    return {**encoded, "firsts": firsts}


def _bare(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _space(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> int:
    """How many tokens at the beginning of `ids` stand for nothing but the space before a word."""
    space = _bare(tokenizer, " ")
    return len(space) if space and list(ids[: len(space)]) == space else 0
