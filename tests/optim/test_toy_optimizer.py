"""A new optimizer is a file in `optim/` and a line in `OPTIMIZERS`."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file
from toys import Copy

FILE = '''"""signSGD with momentum (arXiv 1802.04434): w ← w − lr · sign(m), m ← β·m + (1 − β)·g."""

from __future__ import annotations

from typing import Any

import torch

from qlora_kit.optim.kind import Groups, OptimizerKind


class Signum(torch.optim.Optimizer):
    """One state a number, `momentum`, in the dtype of the parameter."""

    def __init__(self, params: Any, lr: float, beta: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "beta": beta})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].lerp_(p.grad, 1 - group["beta"])
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(state["momentum"].sign(), alpha=-group["lr"])


class _Signum(OptimizerKind):
    def make(self, model: Any, groups: Groups, lr: float) -> torch.optim.Optimizer:
        return Signum(groups, lr)


SIGNUM = _Signum()
'''
LINE = '    "signum": "toy:SIGNUM",'


@pytest.mark.slow
def test_a_toy_optimizer_trains_resumes_and_is_planned(tmp_path):
    copy = Copy(tmp_path)
    with pytest.raises(AssertionError, match="--optim = 'signum': must be one of"):
        copy.train(tmp_path / "refused", "--optim", "signum")
    copy.add_file("optim/toy.py", FILE)
    copy.add_line("optim/optimizers.py", LINE, before='"sgd"')
    optim = ("--optim", "signum", "--lr", "1e-3", "--weight-decay", "0.01")

    said = copy.train(tmp_path / "whole", "--max-steps", "4", *optim)
    assert "with signum" in said
    losses = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in losses if "loss" in line]
    assert losses[-1] < losses[0]

    copy.train_and_kill(tmp_path / "killed", "--max-steps", "4", *optim)
    copy.train(tmp_path / "killed", "--max-steps", "4", *optim, "--resume", str(tmp_path / "killed"))
    whole, resumed = (load_file(tmp_path / n / "adapter" / "adapter_model.safetensors") for n in ("whole", "killed"))
    assert whole.keys() == resumed.keys()
    assert all(whole[name].equal(resumed[name]) for name in whole)

    names = ("signum", "adamw", "sgd")
    plans = [json.loads(copy.run("plan", "--json", "--r", "64", "--optim", name))["plan"] for name in names]
    states = [plan["phases"]["optimizer"]["components"].get("optimizer states", 0) for plan in plans]
    assert states[2] == 0
    assert plans[0]["n_trainable"] * 2 <= states[0] < 1.05 * plans[0]["n_trainable"] * 2  # bf16, and what aligns them
    assert states[1] > 4 * states[0]  # two moments in fp32, and the remainders
