"""A new piece of the lean step is a file in `lean/` and a line in `PIECES`."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file
from toys import Copy

FILE = '''"""Dropouts that drop nothing are left out.

    y = x
"""

from __future__ import annotations

from typing import Any

from torch import nn

from qlora_kit.lean.piece import Outcome

NAMES = ("drop", "resid_dropout")  # of GPT-2; of its others the share is read


def put_on(model: Any) -> Outcome:
    """Put the identity in the place of every such dropout of `model`."""
    found = [
        (module, name)
        for module in model.modules()
        for name, child in module.named_children()
        if name in NAMES and isinstance(child, nn.Dropout) and child.p == 0
    ]
    for module, name in found:
        setattr(module, name, nn.Identity())
    return Outcome(done=f"{len(found)} dropouts") if found else Outcome(left="there is none")
'''
LINE = '    Piece(name="no idle dropout", put_on="toy"),'


@pytest.mark.slow
def test_a_toy_piece_trains_and_resumes(tmp_path):
    copy = Copy(tmp_path)
    plain = copy.train(tmp_path / "plain", "--max-steps", "2")
    assert "no idle dropout" not in plain
    copy.add_file("lean/toy.py", FILE)
    copy.add_line("lean/apply.py", LINE, before="# the last")

    said = copy.train(tmp_path / "whole", "--max-steps", "4")
    assert "no idle dropout" in said
    record = json.loads((tmp_path / "whole" / "run.json").read_text())
    assert record["lean"]["no idle dropout"] == {"done": "5 dropouts", "left": ""}
    assert record["lean"]["one buffer of factors"]["done"].startswith("32 factors")

    copy.train_and_kill(tmp_path / "killed", "--max-steps", "4")
    copy.train(tmp_path / "killed", "--max-steps", "4", "--resume", str(tmp_path / "killed"))
    whole, resumed = (load_file(tmp_path / n / "adapter" / "adapter_model.safetensors") for n in ("whole", "killed"))
    assert whole.keys() == resumed.keys()
    assert all(whole[name].equal(resumed[name]) for name in whole)

    off = copy.train(tmp_path / "off", "--max-steps", "1", "--lean", "off")
    assert "no idle dropout" not in off
