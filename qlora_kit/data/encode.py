"""Turns examples into tokens, each marked as supervised or not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING

from qlora_kit.config.settings import DEFAULT_SEQ_LEN
from qlora_kit.data.audit import AuditReport, audit
from qlora_kit.data.columns import Example, Message
from qlora_kit.data.problems import Problems
from qlora_kit.data.template import Shown, TemplateError, TextSegment, opening_of, segments_of
from qlora_kit.data.tokenizer import continuation_ids, leading_ids, token_ids
from qlora_kit.errors import UserError, named

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label that the loss skips
ANY_ANSWER = "x"  # placeholder of an answer; some templates leave out empty ones
BATCH_SIZE = 1000  # examples tokenized at once


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """The tokens of an example; `supervised[i]` says whether the model learns to predict `input_ids[i]`.

    The first token never is, as nothing precedes it. `full_tokens` is the length before truncation.
    """

    input_ids: list[int]
    supervised: list[bool]
    truncated: bool
    origin: str
    full_tokens: int

    @property
    def labels(self) -> list[int]:
        """The tokens, with -100 where they are not supervised."""
        return [token if learn else IGNORED for token, learn in zip(self.input_ids, self.supervised, strict=True)]


@dataclass(frozen=True)
class EncodedSet:
    """Encoded examples, each with something to learn; a map-style data set of `{"input_ids", "labels"}` (lists)."""

    rows: list[Encoded]
    report: AuditReport

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        row = self.rows[index]
        return {"input_ids": row.input_ids, "labels": row.labels}


def resolve_seq_len(
    seq_len: int | None, tokenizer: PreTrainedTokenizerBase | None, positions: int | None = None
) -> int:
    """The longest example in tokens: the setting, or if unset the model's limit, at most 1024.

    `positions` is the model's limit if known; otherwise the tokenizer's is used, where there is one.
    Raises `UserError` if the setting exceeds `positions`.
    """
    if seq_len is None:
        of_tokenizer = DEFAULT_SEQ_LEN if tokenizer is None else tokenizer.model_max_length
        return min(DEFAULT_SEQ_LEN, positions or of_tokenizer)
    if positions is not None and seq_len > positions:
        rule = f"exceeds the {positions} positions of the model"
        raise UserError.of("seq_len", seq_len, rule, f"Give at most {positions}.")
    return seq_len


def encode_example(example: Example, tokenizer: PreTrainedTokenizerBase, seq_len: int, train_on: str) -> Encoded:
    """The tokens of one example, cut at `seq_len`.

    They are those of the prompt, of the completion, and the end-of-text token, tokenized separately so that the
    boundary is exact. Supervised are the answers with their end mark (`train_on` "answer") or all tokens ("all").
    `tokenizer` must have gone through `prepare_tokenizer`. Raises `UserError` if its chat template fails.
    """
    return _encode_all([example], tokenizer, seq_len, train_on, "data")[0]


def encode_prompt(example: Example, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that generation starts from: those that training saw before the first supervised one.

    Raises `UserError` where the chat template fails.
    """
    if example.messages is not None and not _has_answer(example):
        return token_ids(tokenizer, [_opening_of(example, tokenizer)])[0]
    problems = _template_problems("data")
    ids, is_answer = _tokenize([example], tokenizer, problems)[0]
    problems.raise_if_any()
    supervised = _with_context(is_answer)
    return ids[: supervised.index(True)] if any(supervised) else ids


def encode_conversation(example: Example, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens of a conversation that waits for its next answer: those that training saw before such an answer.

    Raises `UserError` where the chat template fails.
    """
    assert example.messages is not None, "see `prompt_of`"
    assert example.messages[-1].role != "assistant", "an answer waits for none"
    if not _has_answer(example):
        return encode_prompt(example, tokenizer)
    answered = replace(example, messages=(*example.messages, Message("assistant", ANY_ANSWER)))
    problems = _template_problems("data")
    ids, is_answer = _tokenize([answered], tokenizer, problems)[0]
    problems.raise_if_any()
    start = len(ids) - is_answer[::-1].index(True)
    while is_answer[start - 1]:
        start -= 1
    return ids[:start]


def _has_answer(example: Example) -> bool:
    return any(message.role == "assistant" for message in example.messages or ())


def encode_text(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens of a plain text to continue, without a template: as training sees such a text."""
    return leading_ids(tokenizer) + token_ids(tokenizer, [text])[0]


def _opening_of(example: Example, tokenizer: PreTrainedTokenizerBase) -> str:
    try:
        return opening_of(example, tokenizer)
    except TemplateError as error:
        raise UserError.of("data", example.origin, str(error), error.remedy) from error


def _template_problems(setting: str) -> Problems:
    return Problems(setting, "chat template", TemplateError.remedy)


def encode_set(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    seq_len: int,
    train_on: str,
    setting: str = "data",
) -> EncodedSet:
    """Every example that has something to learn, and the report on all examples.

    `tokenizer` must have gone through `prepare_tokenizer`; errors name `setting`.
    Raises `UserError` if the chat template fails (with the places), and if no token is supervised.
    """
    if not examples:
        raise UserError.of(setting, "", "has no examples", "Give data with at least one example.")
    encoded = _encode_all(examples, tokenizer, seq_len, train_on, setting)
    report = audit(
        examples,
        lengths=[row.full_tokens for row in encoded],
        cut=[row.truncated for row in encoded],
        supervised=[sum(row.supervised) for row in encoded],
        seq_len=seq_len,
    )
    if not report.kept:
        raise _nothing_supervised(report, seq_len, train_on, setting, examples[0].origin)
    return EncodedSet([row for row in encoded if any(row.supervised)], report)


def _nothing_supervised(report: AuditReport, seq_len: int, train_on: str, setting: str, origin: str) -> UserError:
    rule = f"has no supervised token in any of its {report.examples} examples (the first: {origin})"
    remedy = "Give examples that have an answer, or texts that are not empty."
    if report.truncated:
        limit = named("seq_len", seq_len)
        rule += f"; in {report.truncated} of them the prompt alone fills {limit}"
        remedy = f"Raise {named('seq_len')} (the longest example has {report.length_max} tokens)."
    elif train_on == "answer":
        remedy += f" Or learn all of the text with {named('train_on', 'all')}."
    return UserError.of(setting, f"{report.examples} examples", rule, remedy)


def _encode_all(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, seq_len: int, train_on: str, setting: str
) -> list[Encoded]:
    assert train_on in ("answer", "all"), train_on
    problems = _template_problems(setting)
    encoded = []
    for start in range(0, len(examples), BATCH_SIZE):
        batch = examples[start : start + BATCH_SIZE]
        for example, (ids, is_answer) in zip(batch, _tokenize(batch, tokenizer, problems), strict=True):
            supervised = _with_context([True] * len(ids) if train_on == "all" else is_answer)
            cut = len(ids) > seq_len
            encoded.append(
                Encoded(
                    input_ids=ids[:seq_len],
                    supervised=supervised[:seq_len],
                    truncated=cut,
                    origin=example.origin,
                    full_tokens=len(ids),
                )
            )
    problems.raise_if_any()
    return encoded


def _with_context(supervised: list[bool]) -> list[bool]:
    """The same marks, but not for the first token: nothing precedes it from which to predict it."""
    return [False, *supervised[1:]] if supervised else []


def _tokenize(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, problems: Problems
) -> list[tuple[list[int], list[bool]]]:
    """For each example its tokens, and whether each belongs to an answer; empty for an example noted in `problems`."""
    shown: Shown = set()
    laid_out = [_segments_or_problem(example, tokenizer, problems, shown) for example in examples]
    firsts = iter(token_ids(tokenizer, [segments[0].text for segments in laid_out if segments]))
    rest_texts = [segment.text for segments in laid_out for segment in segments[1:]]
    rests = iter(continuation_ids(tokenizer, rest_texts))
    lead = leading_ids(tokenizer)
    rows = []
    for example, segments in zip(examples, laid_out, strict=True):
        pieces = [next(firsts), *(next(rests) for _ in segments[1:])] if segments else []
        ids = list(chain.from_iterable(pieces))
        is_answer = [segment.is_answer for segment, piece in zip(segments, pieces, strict=True) for _ in piece]
        if example.prompt is None and example.messages is None:  # plain text passes through no template
            ids, is_answer = lead + ids, [False] * len(lead) + is_answer
        if segments and segments[-1].is_answer and ids[-1:] != [tokenizer.eos_token_id]:
            ids, is_answer = [*ids, tokenizer.eos_token_id], [*is_answer, True]
        rows.append((ids, is_answer))
    return rows


def _segments_or_problem(
    example: Example, tokenizer: PreTrainedTokenizerBase, problems: Problems, shown: Shown
) -> list[TextSegment]:
    try:
        return segments_of(example, tokenizer, shown)
    except TemplateError as error:
        error.add_to(problems, example.origin)
        return []
