"""The labels of a data set: which there are, in which order, and which number each example's have."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from qlora_kit.config.settings import BaseConfig
from qlora_kit.data.problems import Problems
from qlora_kit.data.values import HALF_A_PAIR, is_whole, named_kind
from qlora_kit.errors import Faults, UserError, named
from qlora_kit.tasks.labels import in_order, shown

SEPARATOR = "|"  # between several labels in one text


class Labelled(Protocol):
    """An example with labels."""

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of its labels."""

    @property
    def listed(self) -> bool:
        """Whether they were given as several, however many there are."""

    @property
    def origin(self) -> str:
        """Where it stands."""


class LabelError(ValueError):
    """A value that is no label; says why."""


@dataclass(frozen=True)
class LabelValue:
    """The names in a column of labels, and whether they were given as several."""

    names: tuple[str, ...]
    listed: bool


def read_labels(value: object, several: bool | None) -> LabelValue:
    """The labels in `value`: a name, a number, a list of them, or a text of names with | between them.

    With `several` False a text is one name, whatever is in it. Raises `LabelError`.
    """
    if isinstance(value, list):
        return LabelValue(tuple(dict.fromkeys(_name(one) for one in value)), listed=True)
    if several is None and isinstance(value, str) and not value.strip():
        raise LabelError(f"is empty, which only several labels to an example may be ({named('multi_label', 'true')})")
    name = _name(value, may_be_empty=bool(several))
    if several is False or (several is None and SEPARATOR not in name):
        return LabelValue((name,), listed=False)
    parts = [part.strip() for part in name.split(SEPARATOR)]
    return LabelValue(tuple(dict.fromkeys(part for part in parts if part)), listed=True)


def _name(value: object, may_be_empty: bool = False) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, float):
        raise LabelError(f"is {value:g}: a number that names a class is a whole one")
    if isinstance(value, int):
        return str(value)
    if not isinstance(value, str):
        raise LabelError(f"must be a name or a number, not {named_kind(value)}")
    if not value.strip() and not may_be_empty:
        raise LabelError("is empty")
    if not is_whole(value):
        raise LabelError(HALF_A_PAIR)
    return value.strip()


def resolve_labels(config: BaseConfig, examples: Sequence[Labelled], setting: str) -> BaseConfig:
    """`config` with the labels of the training `examples`, and whether one may have several.

    Raises one `UserError` for all examples whose labels are not among those of `config`, and where there is nothing
    to tell apart.
    """
    several = any(example.listed for example in examples) if config.multi_label is None else config.multi_label
    counts = Counter(label for example in examples for label in example.labels)
    if not counts:
        rule = f"has no label in any of its {len(examples)} examples"
        raise UserError.of(setting, _file_of(examples), rule, "Give examples that have labels.")
    if not several and len(counts) < 2:
        rule = (
            f"has only the label {next(iter(counts))!r} in its {len(examples)} examples: there is nothing to tell apart"
        )
        raise UserError.of(setting, _file_of(examples), rule, "Give examples of at least two labels.")
    resolved = replace(config, labels=config.labels or in_order(counts), multi_label=several)
    check_labels(resolved, examples, setting)
    return resolved


def check_labels(config: BaseConfig, examples: Sequence[Labelled], setting: str) -> None:
    """Check that every label is among those of `config`, and no example has several unless it may.

    Raises one `UserError` with the places.
    """
    known = config.labels or ()
    file, mend = _file_of(examples), "Mend the data, or train with"
    unknown = Problems(setting, file, f"{mend} all of them named in {named('labels')}.")
    crowded = Problems(setting, file, f"{mend} {named('multi_label', 'true')}.")
    for example in examples:
        strange = [label for label in example.labels if label not in known]
        if strange:
            unknown.add(example.origin, f"has the label {strange[0]!r}, which is not among {shown(known)}")
        elif not config.multi_label and len(example.labels) != 1:
            crowded.add(example.origin, f"has {len(example.labels)} labels, and {named('multi_label')} is off")
    with Faults() as faults:
        with faults.collecting():
            unknown.raise_if_any()
        with faults.collecting():
            crowded.raise_if_any()


def _file_of(examples: Sequence[Labelled]) -> str:
    """The file of the first example, without the line."""
    return examples[0].origin.rpartition(":")[0] or examples[0].origin
