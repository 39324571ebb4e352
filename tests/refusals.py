"""Commands that end with a mistake of the user's."""

from __future__ import annotations

import pytest

from qlora_kit.cli import main


def fails(capsys, *args: str) -> str:
    """Run in this process; returns what a failing command prints on standard error."""
    with pytest.raises(SystemExit) as caught:
        main(args)
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    assert not out
    return err
