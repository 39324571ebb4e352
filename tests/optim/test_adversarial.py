from __future__ import annotations

import copy

import pytest
import torch
from lean_cases import LEAN, batch, tiny_peft_model

from qlora_kit.adapters.inject import trainable
from qlora_kit.config.settings import OptimConfig
from qlora_kit.errors import UserError
from qlora_kit.lean.apply import make_lean
from qlora_kit.optim.adversarial import STRIDE, Adversary, passes_of

INPUTS = batch(rows=3, tokens=11)
LABELS = INPUTS["labels"]
ROUNDING = 1e-9  # of fp64, many times over


def settings(kind, epsilon=0.5, steps=3):
    of_pgd = {"adversarial_steps": steps} if kind == "pgd" else {}
    return OptimConfig(adversarial=kind, adversarial_epsilon=epsilon, **of_pgd)


def stepped(model, config):
    """The gradients that an adversarial step leaves, and the embeddings' changes in its passes."""
    adversary = Adversary(model, config)
    moves, losses = [], []

    def run():
        moves.append(None if adversary.delta_BTD is None else adversary.delta_BTD.clone())
        loss = model(**INPUTS).loss
        losses.append(loss.detach())
        loss.backward()
        return len(losses)

    assert adversary.step(run) == 1
    assert len(losses) == passes_of(config)
    assert (adversary.is_on, adversary.delta_BTD, adversary.seen_BTD) == (False, None, None)
    return {name: p.grad for name, p in trainable(model)}, moves, losses


def explicit(model, config):
    """The same by the papers' formulas, on embeddings that are given to the model."""
    embedded = model.get_input_embeddings()(INPUTS["input_ids"]).detach()

    def loss_at(delta):
        return model(inputs_embeds=embedded + delta, labels=LABELS).loss

    delta = torch.zeros_like(embedded, requires_grad=True)
    loss_at(delta).backward()
    n = config.adversarial_steps if config.adversarial == "pgd" else 1
    stride = config.adversarial_epsilon * (STRIDE / n if n > 1 else 1)
    gradient = delta.grad
    for k in range(n):
        lengths = gradient.flatten(1).norm(dim=1)[:, None, None]
        moved = delta.detach() + stride * gradient / lengths
        if n > 1:
            moved = moved * (config.adversarial_epsilon / moved.flatten(1).norm(dim=1)).clamp(max=1)[:, None, None]
        delta = moved.requires_grad_()
        if k < n - 1:
            [gradient] = torch.autograd.grad(loss_at(delta), delta)
    loss_at(delta.detach()).backward()
    return {name: p.grad for name, p in trainable(model)}, delta.detach()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("config", [settings("fgm"), settings("pgd"), settings("pgd", 2.0, 2), settings("pgd", 0.3, 1)])
def test_a_step_has_the_gradients_of_the_papers(family, config):
    model = tiny_peft_model(family).double()
    expected, expected_delta = explicit(copy.deepcopy(model), config)
    found, moves, losses = stepped(model, config)
    passes = 1 + (config.adversarial_steps if config.adversarial == "pgd" else 1)
    assert len(moves) == passes
    assert moves[0] is None
    torch.testing.assert_close(moves[-1], expected_delta, rtol=ROUNDING, atol=ROUNDING * config.adversarial_epsilon)
    for name, gradient in found.items():
        assert float((gradient - expected[name]).norm()) <= 10 * ROUNDING * float(expected[name].norm()), name
    lengths = moves[-1].flatten(1).norm(dim=1)
    assert (lengths <= config.adversarial_epsilon * (1 + ROUNDING)).all()
    assert losses[-1] > losses[0]  # the adversary makes it worse


@pytest.mark.parametrize("kind", ["fgm", "pgd"])
def test_the_lean_step_has_the_same(kind):
    stock = tiny_peft_model("llama")
    lean = copy.deepcopy(stock)
    make_lean(lean, LEAN)
    exact, _, _ = stepped(copy.deepcopy(stock).double(), settings(kind))
    errors = []
    for model in (stock, lean):
        found, _, _ = stepped(model, settings(kind))
        errors.append(sum(float((found[name] - exact[name]).norm()) for name in exact))
    assert errors[1] <= 2 * errors[0]


def test_in_evaluation_and_outside_a_step_nothing_is_moved():
    model = tiny_peft_model("llama")
    with torch.no_grad():
        plain = model(**INPUTS).loss
    adversary = Adversary(model, settings("fgm"))
    assert torch.equal(model(**INPUTS).loss, plain)
    seen = []
    adversary.step(lambda: (model(**INPUTS).loss.backward(), seen.append(model.eval()(**INPUTS).loss), model.train()))
    assert all(torch.equal(loss, plain) for loss in seen)


def test_an_example_without_a_gradient_stays_where_it_is():
    model = tiny_peft_model("llama")
    labels = LABELS.clone()
    labels[1] = -100
    adversary = Adversary(model, settings("pgd"))
    moves = []

    def run():
        moves.append(adversary.delta_BTD)
        model(**{**INPUTS, "labels": labels}).loss.backward()

    adversary.step(run)
    assert not moves[-1][1].any()
    assert moves[-1][0].any()
    assert all(p.grad.isfinite().all() for _, p in trainable(model))


def test_what_fails_in_a_step_leaves_the_adversary_off_and_all_that_trained_training():
    model = tiny_peft_model("llama")
    before = [name for name, _ in trainable(model)]
    adversary = Adversary(model, settings("pgd"))
    runs = []

    def run():
        runs.append(None)
        if len(runs) == 2:
            raise KeyboardInterrupt
        model(**INPUTS).loss.backward()

    with pytest.raises(KeyboardInterrupt):
        adversary.step(run)
    assert not adversary.is_on
    assert [name for name, _ in trainable(model)] == before


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            {"adversarial_epsilon": 2.0},
            "adversarial_epsilon = 2.0: applies only to adversarial=fgm and adversarial=pgd",
        ),
        ({"adversarial": "fgm", "adversarial_steps": 5}, "adversarial_steps = 5: applies only to adversarial=pgd"),
    ],
)
def test_settings_of_what_is_off_are_refused(given, words):
    with pytest.raises(UserError, match=words):
        OptimConfig(**given)
