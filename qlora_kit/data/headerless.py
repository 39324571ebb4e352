"""Separated files (csv, tsv) without a header: their first line is an example like the others."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from pathlib import Path

from qlora_kit.data.read import Record

SEPARATED = (".csv", ".tsv")
FEW = 10  # a label column has at least this many rows for each of its values
TEXT, LABEL = "text", "label"


def with_all_rows(records: list[Record], columns: Mapping[str, str]) -> list[Record]:
    """`records`, and for csv and tsv files without a header also the first line, which was taken for one.

    A file has no header if `columns` names its columns by position (text=1,label=2); the positions are then its names.
    Nor has it one if it has two columns, of which the second has few values, the one in the first line among them (a
    label: no column is named like its content); they are then named text and label.
    """
    found: list[Record] = []
    for file, group in groupby(records, key=lambda record: record.file):
        in_file = list(group)
        is_separated = Path(file).suffix.lower() in SEPARATED and all(
            type(v) is str for v in in_file[0].values.values()
        )
        names = _names(in_file, columns) if is_separated else None
        found += in_file if names is None else _renamed(file, in_file, names)
    return found


def _names(records: list[Record], columns: Mapping[str, str]) -> list[str] | None:
    """The column names for a file without a header; None if it has one."""
    header = list(records[0].values)
    if columns:
        names = columns.values()
        by_position = all(name.isdecimal() for name in names) and not all(_is_name(name, records) for name in names)
        return [str(number) for number in range(1, len(header) + 1)] if by_position else None
    if len(header) != 2:
        return None
    values = {record.values[header[1]] for record in records}
    is_label = header[1] in values and len(values) <= max(2, len(records) // FEW)
    return [TEXT, LABEL] if is_label else None


def _is_name(name: str, records: list[Record]) -> bool:
    """Whether the first line names a column `name`; if that is also one of its values, the line is no header."""
    return name in records[0].values and all(record.values[name] != name for record in records)


def _renamed(file: str, records: list[Record], names: list[str]) -> list[Record]:
    first = Record(file, f"{file}:1", dict(zip(names, records[0].values, strict=True)))
    others = (Record(file, r.origin, dict(zip(names, r.values.values(), strict=True))) for r in records)
    return [first, *others]
