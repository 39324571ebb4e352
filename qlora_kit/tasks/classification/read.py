"""Texts with labels, read from records: one text or a pair, two marked entities, one label or several."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass
from itertools import groupby

from qlora_kit.config.settings import BaseConfig
from qlora_kit.data.fields import leave
from qlora_kit.data.mapped_columns import check_targets, check_there
from qlora_kit.data.problems import Problems
from qlora_kit.data.read import Record
from qlora_kit.data.values import BadValueError, as_text
from qlora_kit.errors import UserError, named
from qlora_kit.tasks.classification.labels import LabelError, read_labels
from qlora_kit.tasks.task import Source

TARGETS = ("text", "pair", "label", "head", "tail")
PAIRS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("text1", "text2"),
    ("text", "text_pair"),
    ("text", "pair"),
)
TEXTS = ("text", "sentence")
LABELS = ("label", "labels", "relation")
MARKS = {"head": ("<e1>", "</e1>"), "tail": ("<e2>", "</e2>")}  # as in SemEval-2010 task 8
KNOWN = f"{' or '.join(TEXTS)}, or a pair ({', '.join('/'.join(pair) for pair in PAIRS)}), with {' or '.join(LABELS)}"


@dataclass(frozen=True, kw_only=True)
class LabelledText:
    """A text, or a pair of them, with the names of its labels (none where they are to be found)."""

    text: str
    pair: str | None
    labels: tuple[str, ...]
    listed: bool  # given as several
    origin: str


@dataclass(frozen=True, kw_only=True)
class _Columns:
    """Where the parts of an example stand in a file; None where they do not."""

    text: str
    pair: str | None
    label: str | None
    head: str | None
    tail: str | None


def fits(columns: Set[str]) -> bool:
    """Whether there is a text or a pair, and a label."""
    has_text = bool(columns & set(TEXTS)) or any(set(pair) <= columns for pair in PAIRS)
    return has_text and bool(columns & set(LABELS))


def read(source: Source, config: BaseConfig) -> list[LabelledText]:
    """The examples in the records of `source`. Raises `UserError` with every fault, each with file and line."""
    return _read(source, config.multi_label, labelled=True)


def read_unlabelled(source: Source) -> list[LabelledText]:
    """The texts in the records of `source`; a column of labels may be there, and is not looked at."""
    return _read(source, None, labelled=False)


def _read(source: Source, several: bool | None, labelled: bool) -> list[LabelledText]:
    check_targets(source.columns, TARGETS, "text=NAME,label=NAME")
    problems = Problems(source.setting, source.name, "Fix or remove it.")
    examples = []
    for file, group in groupby(source.records, key=lambda record: record.file):
        in_file = list(group)
        there = {column for record in in_file for column in record.values}
        columns = _columns(there, source, file, labelled)
        for record in in_file:
            try:
                examples.append(_example(record, columns, several, labelled))
            except (BadValueError, LabelError) as error:
                problems.add(record.origin, str(error))
    problems.raise_if_any()
    return examples


def _columns(there: Set[str], source: Source, file: str, labelled: bool) -> _Columns:
    """Where the parts stand in a file that has the columns `there`. Raises `UserError`."""
    by_hand = source.columns
    check_there({target: column for target, column in by_hand.items() if target != "label"}, there, file)
    text, pair = _text_columns(there, by_hand)
    label = by_hand.get("label") or next((name for name in LABELS if name in there), None)
    if text is None or (labelled and (label is None or label not in there)):
        what = "no column of texts" if text is None else "no column of labels"
        rule = f"has {what} among {', '.join(repr(name[:40]) for name in sorted(there))}"
        remedy = f"Say which is which, e.g. {named('columns', 'text=NAME,label=NAME')}. Known: {KNOWN}."
        raise UserError.of(source.setting, file, rule, remedy)
    entities = {name: by_hand.get(name) or (name if name in there else None) for name in MARKS}
    return _Columns(text=text, pair=pair, label=label, **entities)


def _text_columns(there: Set[str], by_hand: Mapping[str, str]) -> tuple[str | None, str | None]:
    """The columns of the text and of what is paired with it."""
    if "text" in by_hand:
        return by_hand["text"], by_hand.get("pair")
    for first, second in PAIRS:
        if {first, second} <= there:
            return first, second
    return next((name for name in TEXTS if name in there), None), by_hand.get("pair")


def _example(record: Record, columns: _Columns, several: bool | None, labelled: bool) -> LabelledText:
    values = record.values
    text = as_text(values.get(columns.text), f"column {columns.text!r}")
    pair = None if columns.pair is None else as_text(values.get(columns.pair), f"column {columns.pair!r}")
    if columns.head is not None and columns.tail is not None:
        spans = {name: values.get(getattr(columns, name)) for name in MARKS}
        if any(span is not None for span in spans.values()):
            text = marked(text, spans)
    if not labelled:
        leave(values, *LABELS, columns.label)
        return LabelledText(text=text, pair=pair, labels=(), listed=False, origin=record.origin)
    assert columns.label is not None, "looked for before"
    try:
        found = read_labels(values.get(columns.label), several)
    except LabelError as error:
        raise LabelError(f"column {columns.label!r} {error}") from None
    return LabelledText(text=text, pair=pair, labels=found.names, listed=found.listed, origin=record.origin)


# ------------------------------------------------------------------------------------------------------ entities


def marked(text: str, spans: Mapping[str, object]) -> str:
    """`text` with its two entities between marks; `spans` has their first character and the one after their last.

    The marks are ordinary text: a tokenizer that knows them makes one token of each.
    Raises `BadValueError` for spans that are none, lie outside the text, or overlap.
    """
    places = {name: _span(value, text, name) for name, value in spans.items()}
    (first, one), (second, other) = sorted(places.items(), key=lambda item: item[1])
    if one[1] > other[0]:
        raise BadValueError(f"the {first} {one} and the {second} {other} overlap")
    for name, (start, end) in ((second, other), (first, one)):
        opening, closing = MARKS[name]
        text = f"{text[:start]}{opening}{text[start:end]}{closing}{text[end:]}"
    return text


def _span(value: object, text: str, name: str) -> tuple[int, int]:
    if isinstance(value, Mapping):
        value = [value.get("start"), value.get("end")]
    if isinstance(value, str):
        value = [int(part) if part.strip().isdecimal() else None for part in value.replace(":", ",").split(",")]
    if not (isinstance(value, list) and len(value) == 2 and all(type(part) is int for part in value)):
        raise BadValueError(f"column {name!r} must say from which character to which, as [3, 9] or 3:9")
    start, end = value
    if not 0 <= start < end <= len(text):
        raise BadValueError(f"the {name} is at {start} to {end}, and the text has {len(text)} characters")
    return start, end
