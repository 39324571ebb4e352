"""The rules for columns that the user mapped, shared by the tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import Any

from qlora_kit.errors import Fault, UserError, named

PATH = "."  # between a column and a name within it: translation.en


def check_targets(columns: Mapping[str, str], targets: Sequence[str], example: str) -> None:
    """Check that `columns` maps only parts in `targets`. Raises `UserError`."""
    faults = [
        Fault(
            "columns",
            f"{target}={column}",
            f"maps {target!r}, which is not one of {', '.join(targets)}",
            f"For example {named('columns', example)}.",
        )
        for target, column in columns.items()
        if target not in targets
    ]
    if faults:
        raise UserError(faults)


def check_there(columns: Mapping[str, str], there: Set[str], file: str) -> None:
    """Check that the columns `there` of `file` include every one in `columns`. Raises `UserError`."""
    lacking = [f"{target}={column}" for target, column in columns.items() if column not in there]
    if lacking:
        rule, remedy = f"names a column that {file} does not have", f"Its columns are {', '.join(sorted(there))}."
        raise UserError(Fault("columns", given, rule, remedy) for given in lacking)


def has_column(values: Mapping[str, Any], column: str) -> bool:
    """Whether there is the column, or the name within one: `translation.en`."""
    outer, _, inner = column.partition(PATH)
    return column in values or (isinstance(values.get(outer), Mapping) and inner in values[outer])
