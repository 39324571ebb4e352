"""The fields of a record, and which of them were read: unread fields are reported, so that none is silently ignored.

A reader declares nothing: what it looks up is what it reads. So a new reader cannot forget a field.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from qlora_kit.data.values import is_empty

Reads = dict[str, Any]  # the names that were read, each with those read in the objects below it


class Fields(Mapping[str, Any]):
    """The values of a record by name; records which are looked up, also within objects and lists of objects.

    Listing the names reads nothing. Reads are recorded in `reads`, which the records of a file share.
    """

    __slots__ = ("_reads", "_values")

    def __init__(self, values: Mapping[str, Any], reads: Reads) -> None:
        self._values, self._reads = values, reads

    def __getitem__(self, name: str) -> Any:
        value = self._values[name]
        below = self._reads.get(name)
        if below is None:
            below = self._reads[name] = {}
        return _noting(value, below)

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, name: object) -> bool:
        return name in self._values

    def with_value(self, name: str, value: object) -> Fields:
        """The same fields with another value under `name`; reads are recorded in the same place."""
        return Fields({**self._values, name: value}, self._reads)

    def unread(self) -> set[str]:
        """The fields that are not empty and were not read; of an object that was read, those in it ("meta.source")."""
        return set(_unread(self._values, self._reads, ""))


def peek(values: Mapping[str, Any], name: str) -> Any:
    """The value under `name`, or None; this does not count as reading it."""
    return (values._values if isinstance(values, Fields) else values).get(name)


def leave(values: Mapping[str, Any], *names: str | None) -> None:
    """Count fields as read, with all that is in them: answers, when only questions are needed."""
    for name in names:
        if name is not None:
            _look_through(values.get(name))


def _look_through(value: object) -> None:
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    for part in parts:
        _look_through(part)


def _noting(value: object, below: Reads) -> object:
    if isinstance(value, dict):
        return Fields(value, below)
    if isinstance(value, list):
        return [_noting(one, below) if isinstance(one, (dict, list)) else one for one in value]
    return value


def _unread(values: Mapping[str, Any], reads: Reads, path: str) -> Iterator[str]:
    for name, value in values.items():
        below = reads.get(name)
        if below is not None:
            yield from _unread_within(value, below, f"{path}{name}.")
        elif not is_empty(value):
            yield f"{path}{name}"


def _unread_within(value: object, reads: Reads, path: str) -> Iterator[str]:
    if isinstance(value, dict):
        yield from _unread(value, reads, path)
    elif isinstance(value, list):
        for one in value:
            if isinstance(one, (dict, list)):
                yield from _unread_within(one, reads, path)
