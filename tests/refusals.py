"""Commands that end with a mistake of the user's."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from qlora_kit.cli.main import main


def fails(capsys, *args: str) -> str:
    """Run in this process; returns what a failing command prints on standard error."""
    with pytest.raises(SystemExit) as caught:
        main(args)
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    assert not out
    return err


def with_flags(args: Sequence[str], flags: Sequence[str]) -> list[str]:
    """The command `args`, with `flags` in the place of those that it has already: none may be given twice."""
    name, given = "", {"": []}
    for arg in [*args, *flags]:
        if arg.startswith("--"):
            name = arg
            given[name] = []
        else:
            given[name].append(arg)
    return [part for name, values in given.items() for part in ([name] if name else []) + values]
