"""A question and its context as rows of tokens: windows that overlap, where the context is longer than a row.

Only the context is cut. Neighbouring windows share `OVERLAP` of a row's tokens, so an answer of so many lies whole in
some window; the question and what the tokenizer adds may take up at most `MAX_QUESTION` of a row, so that windows go on
by a quarter of a row at least.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qlora_kit.data.problems import Problems
from qlora_kit.errors import UserError, named
from qlora_kit.tasks.questions.read import AnswerSpan, AskedContext
from qlora_kit.tasks.rows import JOINT, separates_pairs

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase

OVERLAP = 1 / 4  # of a row's tokens, that two windows share
MAX_QUESTION = 1 / 2  # of a row's tokens, that are not of the context
AT_ONCE = 1000  # examples that the tokenizer gets in one call
NO_ANSWER = (0, 0)  # the first token stands for an answer that is not in the window


@dataclass(frozen=True, eq=False, kw_only=True)
class WindowRow:
    """The tokens of a question with a part of its context.

    `label` is the first and the last token of the answer, both 0 where it does not lie whole in the window, None where
    it is to be found. The context's tokens begin at `context_at`, and `offsets` (N, 2) are the characters of each.
    """

    input_ids: list[int]
    token_type_ids: list[int] | None  # of the tokens: question or context, for models that ask
    label: tuple[int, int] | None
    example: AskedContext
    number: int  # of the example, from 0
    context_at: int
    offsets: np.ndarray
    full_tokens: int  # of the whole example

    truncated = False  # what does not fit goes on in the next window

    @property
    def origin(self) -> str:
        """Where the example stands."""
        return self.example.origin

    def characters(self, first: int, last: int) -> tuple[int, int]:
        """The characters of the context from token `first` of the row to `last`, without white space at the ends."""
        start, end = int(self.offsets[first - self.context_at, 0]), self._end(last - self.context_at)
        text = self.example.context[start:end]
        return start + len(text) - len(text.lstrip()), end - len(text) + len(text.rstrip())

    def blanks(self) -> list[bool]:
        """For each token of the context whether it holds nothing but white space."""
        return [not self.example.context[start:end].strip() for start, end in self.offsets.tolist()]

    def _end(self, place: int) -> int:
        """The character behind token `place` of the context, with marks on its last one that no token holds.

        Normalizers that strip accents, such as BERT's, drop such marks where they are characters of their own.
        """
        end, context = int(self.offsets[place, 1]), self.example.context
        limit = int(self.offsets[place + 1, 0]) if place + 1 < len(self.offsets) else len(context)
        while end < limit and unicodedata.category(context[end]).startswith("M"):
            end += 1
        return end


def starts(tokens: int, room: int, overlap: int) -> list[int]:
    """Where the windows of `room` tokens begin in a context of so many `tokens`."""
    assert 0 <= overlap < room, "each window must bring something new"
    found = [0]
    while found[-1] + room < tokens:
        found.append(found[-1] + room - overlap)
    return found


def tokens_of(answer: AnswerSpan, offsets: np.ndarray) -> tuple[int, int] | None:
    """The first and the last token of a context that have characters of `answer`; None where no token has any."""
    import numpy as np

    begins, ends = offsets[:, 0], offsets[:, 1]
    (touched,) = np.nonzero((begins < answer.end) & (ends > answer.start) & (ends > begins))
    return (int(touched[0]), int(touched[-1])) if len(touched) else None


def rows_of(
    examples: Sequence[AskedContext],
    tokenizer: PreTrainedTokenizerBase,
    seq_len: int,
    labelled: bool,
    setting: str = "data",
) -> list[WindowRow]:
    """Every window of `examples`, in their order; `labelled` ones learn the first of the answers.

    Raises `UserError` for a tokenizer that does not tell the characters of its tokens, and for questions that are too
    long, with the places.
    """
    if not tokenizer.is_fast:
        rule = "does not tell which characters its tokens are"
        raise UserError.of("tokenizer", tokenizer.name_or_path, rule, "Give a fast one, with a tokenizer.json.")
    problems = Problems(setting, "questions", f"Shorten it, or raise {named('seq_len')}.")
    joint = "" if separates_pairs(tokenizer) else JOINT
    rows: list[WindowRow] = []
    for at in range(0, len(examples), AT_ONCE):
        rows += _rows(examples[at : at + AT_ONCE], at, tokenizer, seq_len, labelled, joint, problems)
    problems.raise_if_any()
    return rows


def _rows(
    examples: Sequence[AskedContext],
    first_number: int,
    tokenizer: PreTrainedTokenizerBase,
    seq_len: int,
    labelled: bool,
    joint: str,
    problems: Problems,
) -> Iterator[WindowRow]:
    questions = [f"{example.question}{joint}" for example in examples]
    contexts = [example.context for example in examples]
    encoded = tokenizer(questions, contexts, return_offsets_mapping=True, verbose=False)
    for place, example in enumerate(examples):
        types = encoded["token_type_ids"][place] if "token_type_ids" in encoded else None
        whole = _Whole(
            example,
            first_number + place,
            encoded["input_ids"][place],
            types,
            encoded["offset_mapping"][place],
            encoded.sequence_ids(place),
        )
        if len(whole.input_ids) - whole.context_tokens > MAX_QUESTION * seq_len:
            rule = (
                f"has a question of {len(whole.input_ids) - whole.context_tokens} tokens, and {MAX_QUESTION:.0%} of "
                f"the {seq_len} of {named('seq_len')} are left for the context"
            )
            problems.add(example.origin, rule)
        else:
            yield from whole.windows(seq_len, labelled)


class _Whole:
    """A question and its context as the tokenizer puts them together, however long."""

    def __init__(
        self,
        example: AskedContext,
        number: int,
        input_ids: list[int],
        types: list[int] | None,
        offsets: list[tuple[int, int]],
        parts: list[int | None],
    ) -> None:
        import numpy as np

        self.example, self.number, self.input_ids, self.types = example, number, input_ids, types
        of_context = [place for place, part in enumerate(parts) if part == 1]
        self.begin = of_context[0] if of_context else len(input_ids)
        self.end = of_context[-1] + 1 if of_context else len(input_ids)
        self.offsets = np.array(offsets[self.begin : self.end], dtype=np.int32).reshape(-1, 2)

    @property
    def context_tokens(self) -> int:
        """The tokens of the context."""
        return self.end - self.begin

    def windows(self, seq_len: int, labelled: bool) -> Iterator[WindowRow]:
        """The rows, the first with the beginning of the context, the last with its end."""
        answers = self.example.answers
        place = tokens_of(answers[0], self.offsets) if labelled and answers else None
        room = seq_len - (len(self.input_ids) - self.context_tokens)
        for start in starts(self.context_tokens, room, int(OVERLAP * seq_len)):
            end = min(start + room, self.context_tokens)
            label = None
            if labelled:
                inside = place is not None and start <= place[0] and place[1] < end
                label = (
                    (self.begin + place[0] - start, self.begin + place[1] - start) if place and inside else NO_ANSWER
                )
            yield WindowRow(
                input_ids=self._cut(self.input_ids, start, end),
                token_type_ids=None if self.types is None else self._cut(self.types, start, end),
                label=label,
                example=self.example,
                number=self.number,
                context_at=self.begin,
                offsets=self.offsets[start:end],
                full_tokens=len(self.input_ids),
            )

    def _cut(self, whole: list[int], start: int, end: int) -> list[int]:
        """What stands before the context, tokens `start` to `end` of it, and what stands behind."""
        return whole[: self.begin] + whole[self.begin + start : self.begin + end] + whole[self.end :]
