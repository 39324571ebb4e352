"""Sentences as words with their tags, read from records: CoNLL files, or columns of words and of tags."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass, replace
from itertools import groupby

from qlora_kit.config.settings import BaseConfig
from qlora_kit.data.fields import leave
from qlora_kit.data.mapped_columns import check_targets, check_there
from qlora_kit.data.problems import Problems
from qlora_kit.data.read import Record
from qlora_kit.data.values import BadValueError, as_text, named_kind
from qlora_kit.errors import UserError, named
from qlora_kit.tasks.labels import in_order, shown
from qlora_kit.tasks.task import Source

TARGETS = ("tokens", "tags", "text")
WORDS = ("tokens", "words")
TAGS = ("tags", "ner_tags", "labels")
OUTSIDE = "O"  # the tag of a word that is in no entity
PREFIXES = "BIESUL"  # of the schemes IOB, BIOES and BILOU


@dataclass(frozen=True)
class TaggedWords:
    """The words of a sentence, and the tag of each (None where they are to be found)."""

    words: tuple[str, ...]
    tags: tuple[str, ...] | None
    origin: str


def fits(columns: Set[str]) -> bool:
    """Whether there are words and tags."""
    return bool(columns & set(WORDS)) and bool(columns & set(TAGS))


def read(source: Source, config: BaseConfig) -> list[TaggedWords]:
    """The sentences in the records of `source`; a tag that is a number is the place of a label among those set.

    Raises `UserError` with every fault, each with file and line.
    """
    return _read(source, config.labels, tagged=True)


def read_untagged(source: Source) -> list[TaggedWords]:
    """The sentences in the records of `source`, or its texts split at white space; tags are not looked at."""
    return _read(source, None, tagged=False)


def _read(source: Source, labels: Sequence[str] | None, tagged: bool) -> list[TaggedWords]:
    check_targets(source.columns, TARGETS, "tokens=NAME,tags=NAME")
    problems = Problems(source.setting, source.name, "Fix or remove it.")
    examples = []
    for file, group in groupby(source.records, key=lambda record: record.file):
        in_file = list(group)
        there = {column for record in in_file for column in record.values}
        words, tags, text = _columns(there, source, file, tagged)
        for record in in_file:
            try:
                own = _words(record, words, text)
                own_tags = _tags(record, tags, len(own), labels) if tagged else None
                if not tagged:
                    leave(record.values, *TAGS, tags)
                examples.append(TaggedWords(own, own_tags, record.origin))
            except BadValueError as error:
                problems.add(record.origin, str(error))
    problems.raise_if_any()
    return examples


def _columns(there: Set[str], source: Source, file: str, tagged: bool) -> tuple[str | None, str, str | None]:
    """Where the words, the tags, and a text in the place of words stand in a file with the columns `there`.

    Raises `UserError`.
    """
    by_hand = source.columns
    check_there({target: column for target, column in by_hand.items() if tagged or target != "tags"}, there, file)
    words = by_hand.get("tokens") or next((name for name in WORDS if name in there), None)
    tags = by_hand.get("tags") or next((name for name in TAGS if name in there), None)
    text = by_hand.get("text", "text")
    if words is None and (tagged or text not in there):
        what = "no column of words"
    elif tagged and tags is None:
        what = "no column of tags"
    else:
        return words, tags or "", text
    rule = f"has {what} among {', '.join(repr(name[:40]) for name in sorted(there))}"
    known = f"{' or '.join(WORDS)}, with {', '.join(TAGS)}"
    remedy = (
        f"Give a CoNLL file, or say which is which, e.g. {named('columns', 'tokens=NAME,tags=NAME')}. Known: {known}."
    )
    raise UserError.of(source.setting, file, rule, remedy)


def _words(record: Record, column: str | None, text: str | None) -> tuple[str, ...]:
    if column is None:
        assert text is not None, "looked for before"
        words = as_text(record.values.get(text), f"column {text!r}").split()
    else:
        words = [as_text(word, f"a word in column {column!r}") for word in _list(record, column)]
    return tuple(words)


def _tags(record: Record, column: str, count: int, labels: Sequence[str] | None) -> tuple[str, ...]:
    tags = _list(record, column)
    if len(tags) != count:
        raise BadValueError(f"has {count} words and {len(tags)} tags; each word must have one")
    return tuple(_tag(tag, column, labels) for tag in tags)


def _list(record: Record, column: str) -> list[object]:
    values = record.values.get(column)
    if not isinstance(values, list):
        raise BadValueError(f"column {column!r} must be a list, not {named_kind(values)}")
    return values


def _tag(value: object, column: str, labels: Sequence[str] | None) -> str:
    if type(value) is int:
        if labels is None:
            raise BadValueError(f"column {column!r} has numbers: name them in their order with {named('labels')}")
        if not 0 <= value < len(labels):
            raise BadValueError(f"column {column!r} has the number {value}, and there are {len(labels)} labels, from 0")
        return labels[value]
    if not isinstance(value, str) or not value.strip():
        kind = "null" if value is None else "an empty one" if value == "" else type(value).__name__
        raise BadValueError(f"a tag in column {column!r} must be a name or a number, not {kind}")
    return as_text(value, f"a tag in column {column!r}").strip()


# ---------------------------------------------------------------------------------------------------------- labels


def kind_of(tag: str) -> tuple[str, str]:
    """The prefix of a tag and its type: B and person of B-person; of any other tag nothing, and itself."""
    prefix, dash, kind = tag.partition("-")
    return (prefix, kind) if dash and kind and prefix in tuple(PREFIXES) else ("", tag)


def tags_in_order(tags: Iterable[str]) -> tuple[str, ...]:
    """Different tags: O first, then type by type, each by its prefixes in the order of a scheme."""
    different = set(tags)
    kinds = {kind: place for place, kind in enumerate(in_order(kind_of(tag)[1] for tag in different))}

    def place(tag: str) -> tuple[bool, int, int]:
        prefix, kind = kind_of(tag)
        return tag != OUTSIDE, kinds[kind], PREFIXES.find(prefix)

    return tuple(sorted(different, key=place))


def resolve_tags(config: BaseConfig, examples: Sequence[TaggedWords], setting: str, task: str) -> BaseConfig:
    """`config` with `task`, the name of this one, and the labels of the training `examples`.

    Raises one `UserError` for all sentences whose tags are not among those of `config`, and where there is nothing to
    tell apart.
    """
    if config.multi_label:
        rule = f"does not apply to {named('task', task)}, where each word has one tag"
        raise UserError.of("multi_label", True, rule, f"Drop {named('multi_label')}.")
    counts = Counter(tag for example in examples for tag in example.tags or ())
    if len(counts) < 2:
        only = f"only the tag {next(iter(counts))!r}" if counts else "no tag"
        rule = f"has {only}, so that there is nothing to tell apart"
        raise UserError.of(setting, f"{len(examples)} sentences", rule, "Give sentences with at least two tags.")
    resolved = replace(config, task=task, labels=config.labels or tags_in_order(counts), multi_label=False)
    check_tags(resolved, examples, setting)
    return resolved


def check_tags(config: BaseConfig, examples: Sequence[TaggedWords], setting: str) -> None:
    """Check that every tag is among the labels of `config`. Raises one `UserError` with the places."""
    known = config.labels or ()
    problems = Problems(setting, "tags", f"Mend the data, or train with all of them named in {named('labels')}.")
    for example in examples:
        for word, tag in zip(example.words, example.tags or (), strict=False):
            if tag not in known:
                problems.add(example.origin, f"has the tag {tag!r} ({word}), which is not among {shown(known)}")
                break
    problems.raise_if_any()
