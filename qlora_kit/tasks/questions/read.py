"""Questions on contexts, read from records: SQuAD's flat layout and its nested one, with answers or without."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from qlora_kit.config.settings import BaseConfig
from qlora_kit.data.fields import leave
from qlora_kit.data.mapped_columns import check_targets, check_there
from qlora_kit.data.problems import Problems
from qlora_kit.data.read import Record
from qlora_kit.data.values import BadValueError, as_text, named_kind
from qlora_kit.errors import UserError, named
from qlora_kit.tasks.task import Source

REQUIRED = ("question", "context", "answers")
TARGETS = (*REQUIRED, "id")
SHOWN_CHARACTERS = 60  # of an answer in a message
REMEDY = (
    f"Say which is which, e.g. {named('columns', 'question=NAME,context=NAME,answers=NAME')}, or give SQuAD's own JSON."
)


@dataclass(frozen=True)
class AnswerSpan:
    """A part of a context: its text, and the number of its first character."""

    text: str
    start: int

    @property
    def end(self) -> int:
        """The number of the character after its last one."""
        return self.start + len(self.text)


@dataclass(frozen=True, kw_only=True)
class AskedContext:
    """A question and the context that may hold its answer; no answers: there is none, or it is to be found."""

    question: str
    context: str
    answers: tuple[AnswerSpan, ...]
    id: str | None
    origin: str


def fits(columns: Set[str]) -> bool:
    """Whether there are questions, contexts and answers, or SQuAD's paragraphs."""
    return set(REQUIRED) <= columns or "paragraphs" in columns


def read(source: Source, config: BaseConfig) -> list[AskedContext]:
    """The examples in the records of `source`. Raises `UserError` with every fault, each with file and line."""
    return _read(source, labelled=True)


def read_unlabelled(source: Source) -> list[AskedContext]:
    """The questions in the records of `source`; answers may be there, and are not looked at."""
    return _read(source, labelled=False)


def _read(source: Source, labelled: bool) -> list[AskedContext]:
    check_targets(source.columns, TARGETS, "question=NAME,context=NAME,answers=NAME")
    problems = Problems(source.setting, source.name, "Fix or remove it.")
    examples = []
    for file, group in groupby(_flat(source.records, problems), key=lambda record: record.file):
        in_file = list(group)
        names = _columns({column for record in in_file for column in record.values}, source, file, labelled)
        for record in in_file:
            try:
                examples.append(_example(record, names, labelled))
            except BadValueError as error:
                problems.add(record.origin, str(error))
    problems.raise_if_any()
    if not examples:
        raise UserError.of(source.setting, source.name, "holds no questions", "Give data with at least one question.")
    return examples


# ---------------------------------------------------------------------------------------------- SQuAD's own JSON


def _flat(records: list[Record], problems: Problems) -> Iterator[Record]:
    """Each question as a record of its own, also those in the paragraphs of SQuAD's articles."""
    for record in records:
        if "paragraphs" not in record.values:
            yield record
            continue
        for number, paragraph in _objects(record.values, "paragraphs", record.origin, problems):
            origin = f"{record.origin} paragraph {number}"
            context = paragraph.get("context")
            for place, asked in _objects(paragraph, "qas", origin, problems):
                named = f" (id {asked['id']})" if "id" in asked else ""
                own = Record(record.file, f"{origin} question {place}{named}", asked)
                yield own.with_value("context", context)


def _objects(
    values: Mapping[str, Any], name: str, origin: str, problems: Problems
) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """The objects in the list `name` of `values`, numbered from 1; what is none is a problem."""
    items = values.get(name)
    if not isinstance(items, list):
        problems.add(origin, f"must have a list {name!r}")
        return
    for number, item in enumerate(items, start=1):
        if isinstance(item, Mapping):
            yield number, item
        else:
            problems.add(origin, f"entry {number} of {name!r} must be an object, not {named_kind(item)}")


# ------------------------------------------------------------------------------------------------------- columns


def _columns(there: Set[str], source: Source, file: str, labelled: bool) -> dict[str, str]:
    """The column of each part of an example in a file that has the columns `there`. Raises `UserError`."""
    names = {target: source.columns.get(target, target) for target in TARGETS}
    needed = REQUIRED if labelled else REQUIRED[:2]
    by_hand = {target: column for target, column in source.columns.items() if labelled or target != "answers"}
    check_there(by_hand, there, file)
    absent = [target for target in needed if names[target] not in there]
    if absent == ["answers"] and "is_impossible" in there:
        absent = []  # a file of questions without an answer
    if absent:
        rule = f"has no column {' or '.join(map(repr, absent))} among {', '.join(repr(n[:40]) for n in sorted(there))}"
        raise UserError.of(source.setting, file, rule, REMEDY)
    return names


# ---------------------------------------------------------------------------------------------------- one record


def _example(record: Record, names: Mapping[str, str], labelled: bool) -> AskedContext:
    values = record.values
    question, context = (as_text(values.get(names[part]), f"column {names[part]!r}") for part in REQUIRED[:2])
    own_id = values.get(names["id"])
    if own_id is not None:
        own_id = as_text(str(own_id), f"column {names['id']!r}")
    if not labelled:
        leave(values, names["answers"], "is_impossible")
    answers = _answers(values, names["answers"], context) if labelled else ()
    return AskedContext(question=question, context=context, answers=answers, id=own_id, origin=record.origin)


def _answers(values: Mapping[str, Any], name: str, context: str) -> tuple[AnswerSpan, ...]:
    """The answers in the column `name`, each where it says it is in `context`. Raises `BadValueError`."""
    impossible = values.get("is_impossible")
    answers = tuple(_placed(text, start, context) for text, start in _pairs(values.get(name), name, impossible))
    if impossible is True and answers:
        raise BadValueError("is_impossible is true, and there is an answer")
    if impossible is False and not answers:
        raise BadValueError("is_impossible is false, and there is no answer")
    return answers


def _pairs(value: object, name: str, impossible: object) -> list[tuple[object, object]]:
    """The texts and starts in a column of answers. Raises `BadValueError`."""
    if value is None and impossible is True:
        return []
    if isinstance(value, Mapping) and {"text", "answer_start"} <= value.keys():
        texts, starts = (own if isinstance(own, list) else [own] for own in (value["text"], value["answer_start"]))
        if len(texts) != len(starts):
            raise BadValueError(f"column {name!r} has {len(texts)} texts and {len(starts)} of 'answer_start'")
        return list(zip(texts, starts, strict=True))
    if isinstance(value, list) and all(
        isinstance(one, Mapping) and {"text", "answer_start"} <= one.keys() for one in value
    ):
        return [(one["text"], one["answer_start"]) for one in value]
    raise BadValueError(f'column {name!r} must be {{"text": [...], "answer_start": [...]}}, empty where there is none')


def _placed(text: object, start: object, context: str) -> AnswerSpan:
    """The answer `text` at `start` of `context`. Raises `BadValueError` where it is not there, and says where it is."""
    if not isinstance(text, str) or not text.strip():
        raise BadValueError("has an answer without text (where there is no answer, leave the lists empty)")
    if isinstance(start, float) and start.is_integer():
        start = int(start)  # a column of a parquet file with nulls in it
    if type(start) is not int:
        raise BadValueError(f"has an 'answer_start' that is no whole number ({start!r})")
    if start >= 0 and context.startswith(text, start):
        return AnswerSpan(text, start)
    shown = text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}…"
    found = _occurrences(text, context)
    elsewhere = f"it is at {' and '.join(map(str, found))}" if found else "nor anywhere else in it"
    raise BadValueError(f"the answer {shown!r} is not at character {start} of its context; {elsewhere}")


def _occurrences(text: str, context: str, most: int = 3) -> list[int]:
    """The first few characters of `context` where `text` begins."""
    found: list[int] = []
    start = context.find(text)
    while start >= 0 and len(found) < most:
        found.append(start)
        start = context.find(text, start + 1)
    return found
