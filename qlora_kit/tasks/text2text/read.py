"""Pairs of a source and its target, read from records: a text and its translation, its summary, its answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import groupby

from qlora_kit.config.settings import BaseConfig
from qlora_kit.data.columns import PAIRED, Example, Shape
from qlora_kit.data.mapped_columns import PATH, has_column
from qlora_kit.data.problems import Problems
from qlora_kit.data.read import Record
from qlora_kit.data.values import BadValueError, as_text
from qlora_kit.errors import Fault, UserError, named
from qlora_kit.tasks.task import Source

TARGETS = ("source", "target")
PAIRS = (
    ("source", "target"),
    ("document", "summary"),
    ("article", "highlights"),
    ("dialogue", "summary"),
    ("text", "summary"),
)
TRANSLATION = "translation"  # {"en": …, "de": …}: the first language of the file's first record is the source
# sources alone, for who asks
SOURCES = ("source", "document", "article", "dialogue", "text", TRANSLATION, "prompt", "instruction", "question")
KNOWN = ", ".join(["/".join(pair) for pair in PAIRS] + [TRANSLATION] + [str(shape) for shape in PAIRED])


@dataclass(frozen=True)
class SourceTarget:
    """A source and what is to be said of it (None where that is asked)."""

    source: str
    target: str | None
    origin: str


Read = Callable[[Record], SourceTarget]


def fits(columns: Set[str]) -> bool:
    """Whether there is a pair of a source and a target, by any of their names."""
    return (
        TRANSLATION in columns
        or any(set(pair) <= columns for pair in PAIRS)
        or any(set(shape.required) <= columns for shape in PAIRED)
    )


def columns_of(records: Sequence[Record], by_hand: dict[str, str]) -> dict[str, str]:
    """The columns mapped by hand; without any, the languages of the first record where all translate between two.

    Else a file that names them in the other order would be read the other way round.
    """
    if by_hand or any(set(pair) <= set(record.values) for pair in PAIRS for record in records):
        return by_hand
    texts = [record.values.get(TRANSLATION) for record in records]
    between = {frozenset(own) if isinstance(own, Mapping) else frozenset() for own in texts}
    if len(between) != 1 or len(next(iter(between))) != 2:
        return by_hand
    languages = records[0].values[TRANSLATION]
    return {part: f"{TRANSLATION}{PATH}{language}" for part, language in zip(TARGETS, languages, strict=True)}


def read(source: Source, config: BaseConfig) -> list[SourceTarget]:
    """The examples in the records of `source`. Raises `UserError` with every fault, each with file and line."""
    return _read(source, answered=True)


def read_unanswered(source: Source) -> list[SourceTarget]:
    """The sources in the records of `source`; targets may be there, and are not looked at."""
    return _read(source, answered=False)


def _read(source: Source, answered: bool) -> list[SourceTarget]:
    _check_targets(source)
    problems = Problems(source.setting, source.name, "Fix or remove it.")
    examples = []
    for file, group in groupby(source.records, key=lambda record: record.file):
        in_file = list(group)
        reader = _reader(in_file, source, file, answered)
        for record in in_file:
            try:
                examples.append(_checked(reader(record), answered))
            except BadValueError as error:
                error.add_to(problems, record.origin)
    problems.raise_if_any()
    return examples


def _checked(example: SourceTarget, answered: bool) -> SourceTarget:
    if answered:
        for name, text in (("source", example.source), ("target", example.target or "")):
            if not text.strip():
                raise BadValueError(f"has an empty {name}, of which nothing can be learned")
    return example


def _check_targets(source: Source) -> None:
    known = {*TARGETS, *(name for shape in PAIRED for name in shape.required)}
    strange = [f"{target}={column}" for target, column in source.columns.items() if target not in known]
    if strange:
        rule, remedy = (
            f"maps a name that is none of {', '.join(TARGETS)}",
            f"For example {named('columns', 'source=a,target=b')}.",
        )
        raise UserError(Fault("columns", given, rule, remedy) for given in strange)


def _reader(records: list[Record], source: Source, file: str, answered: bool) -> Read:
    """How the records of a file are read. Raises `UserError` where its columns are not known."""
    there = {column for record in records for column in record.values}
    by_hand = _by_hand(source.columns)
    if TRANSLATION not in there and all(column.startswith(TRANSLATION + PATH) for column in by_hand.values()):
        by_hand = {}  # languages, of data with another shape than what the run was trained on
    if by_hand and (answered or "source" in by_hand):
        _check_there(records, there, by_hand, file, answered)
        return _of_columns(by_hand["source"], by_hand.get("target"), answered)
    pair = next((pair for pair in PAIRS if set(pair) <= there), None)
    if pair is not None:
        return _of_columns(*pair, answered)
    if TRANSLATION in there:
        return _of_languages(records, answered)
    shape = _prompt_shape(there, answered)
    if shape is not None:
        return _of_prompts(shape, answered)
    alone = next((name for name in SOURCES if name in there), None)
    if alone is not None and not answered:
        return _of_columns(alone, None, answered)
    rule = f"has no pair of a source and a target among {', '.join(repr(name[:40]) for name in sorted(there))}"
    remedy = f"Say which is which, e.g. {named('columns', 'source=NAME,target=NAME')}. Known: {KNOWN}."
    raise UserError.of(source.setting, file, rule, remedy)


def _prompt_shape(there: Set[str], answered: bool) -> Shape | None:
    """The shape of prompts that the columns are those of; who asks may leave out the answers."""
    whole = next((shape for shape in PAIRED if set(shape.required) <= there), None)
    if whole is not None or answered:
        return whole
    begun = [shape for shape in PAIRED if shape.required[0] in there]
    return max(begun, key=lambda shape: len(there & set(shape.optional)), default=None)  # instruction/input or /context


def _by_hand(columns: Mapping[str, str]) -> dict[str, str]:
    """The columns of source and target as the user named them, be it as a prompt and its completion."""
    sources = {"source", *(shape.required[0] for shape in PAIRED)}
    return {"source" if name in sources else "target": column for name, column in columns.items()}


def _check_there(records: list[Record], there: Set[str], by_hand: Mapping[str, str], file: str, answered: bool) -> None:
    """Check that the columns mapped by hand are in the file, and a target among them. Raises `UserError`."""
    needed = TARGETS if answered else TARGETS[:1]
    given = ",".join(f"{name}={column}" for name, column in by_hand.items())
    faults = [
        Fault("columns", given, f"maps no {name}", f"For example {named('columns', 'source=NAME,target=NAME')}.")
        for name in needed
        if name not in by_hand
    ]
    remedy = f"Its columns are {', '.join(sorted(there))}."
    faults += [
        Fault("columns", f"{name}={by_hand[name]}", f"names a column that {file} does not have", remedy)
        for name in needed
        if name in by_hand and not any(has_column(record.values, by_hand[name]) for record in records)
    ]
    if faults:
        raise UserError(faults)


def _text(record: Record, column: str) -> str:
    """The text in a column, or in an object in one. Raises `BadValueError`."""
    return as_text(_value(record, column), f"column {column!r}")


def _value(record: Record, column: str) -> object:
    """What stands in a column, or in an object in one: `translation.en`."""
    values = record.values
    outer, _, inner = column.partition(PATH)
    within = None if column in values else values.get(outer)
    return within.get(inner) if isinstance(within, Mapping) else values.get(column)


def _of_columns(source: str, target: str | None, answered: bool) -> Read:
    """How a source in a column is read, with its target; unless that is to be `answered`, it is left."""

    def read_one(record: Record) -> SourceTarget:
        if target is not None and not answered:
            _value(record, target)
        answer = _text(record, target) if target is not None and answered else None
        return SourceTarget(_text(record, source), answer, record.origin)

    return read_one


def _of_languages(records: list[Record], answered: bool) -> Read:
    """From the first language of the first record to its second; all records must have them."""
    languages: list[str] = next(
        (list(own) for r in records if isinstance(own := r.values.get(TRANSLATION), Mapping)), []
    )

    def read_one(record: Record) -> SourceTarget:
        texts = record.values.get(TRANSLATION)
        if not isinstance(texts, Mapping):
            raise BadValueError(f"column {TRANSLATION!r} must be an object with a text for each of two languages")
        if not languages or (len(languages) != 2 and answered):
            raise BadValueError(
                f"column {TRANSLATION!r} has {len(languages)} languages; say which with "
                + named("columns", "source=translation.en,target=translation.de")
            )
        source, *others = (f"{TRANSLATION}{PATH}{language}" for language in languages)
        return _of_columns(source, next(iter(others), None), answered)(record)

    return read_one


def _of_prompts(shape: Shape, answered: bool) -> Read:
    def read_one(record: Record) -> SourceTarget:
        (example,) = shape.read(shape, record if answered else record.with_value(shape.required[1], ""))
        return SourceTarget(_prompt(example), example.completion if answered else None, record.origin)

    return read_one


def _prompt(example: Example) -> str:
    """The prompt, under the system text where there is one."""
    system = [message.content for message in example.messages or () if message.role == "system"]
    return "\n\n".join([*system, example.prompt or ""])
