"""The rules of columns that were mapped by hand, which tasks share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import Any

from qlora_kit.errors import Fault, UserError

PATH = "."  # between a column and a name within it: translation.en


def check_targets(columns: Mapping[str, str], targets: Sequence[str], example: str) -> None:
    """Check that every part that a column of `columns` is mapped to is one of `targets`. Raises `UserError`."""
    faults = [
        Fault(
            "--columns",
            f"{target}={column}",
            f"maps {target!r}, which is none of {', '.join(targets)}",
            f"For example --columns {example}.",
        )
        for target, column in columns.items()
        if target not in targets
    ]
    if faults:
        raise UserError(faults)


def check_there(columns: Mapping[str, str], there: Set[str], file: str) -> None:
    """Check that `file`, with the columns `there`, has every one of `columns`. Raises `UserError`."""
    lacking = [f"{target}={column}" for target, column in columns.items() if column not in there]
    if lacking:
        rule, remedy = f"names a column that {file} does not have", f"Its columns are {', '.join(sorted(there))}."
        raise UserError(Fault("--columns", given, rule, remedy) for given in lacking)


def has_column(values: Mapping[str, Any], column: str) -> bool:
    """Whether there is the column, or the name within one: `translation.en`."""
    outer, _, inner = column.partition(PATH)
    return column in values or (isinstance(values.get(outer), Mapping) and inner in values[outer])
