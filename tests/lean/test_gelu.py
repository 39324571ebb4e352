"""gelu_new in one operation: the same function, closer to it in 16 bits, and with less kept."""

from __future__ import annotations

import oracles
import pytest
import torch
from families import FAMILIES, tiny_model
from torch import nn
from transformers.activations import ACT2FN

from qlora_kit.lean import gelu
from qlora_kit.memory.track import MemoryTracker

STEP_BY_STEP = ("gelu_new", "gelu_fast", "gelu_accurate")


def lean_activation(name):
    parent = nn.Module()
    parent.add_module("act", ACT2FN[name])
    assert gelu.put_on(parent).done == "1 activations"
    return parent.act


def value_and_gradient(function, x):
    x = x.clone().requires_grad_()
    value = function(x)
    (gradient,) = torch.autograd.grad(value, x, torch.ones_like(value))
    return value.detach(), gradient


def every_value(dtype, largest):
    """Every number of a 16-bit `dtype` up to `largest`."""
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    return numbers[numbers.abs() <= largest]  # which leaves NaN and infinity out


def errors(results, exact):
    """Largest and mean error of value and gradient."""
    differences = [(got.double() - wanted).abs() for got, wanted in zip(results, exact, strict=True)]
    return [size for difference in differences for size in (difference.max().item(), difference.mean().item())]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", STEP_BY_STEP)
def test_sixteen_bits_are_at_least_as_close_to_the_function(name, dtype):
    x = every_value(dtype, 30.0)  # beyond, x³ is infinite in fp16
    exact = value_and_gradient(oracles.gelu_new, x.double())
    stock, lean = (errors(value_and_gradient(f, x), exact) for f in (ACT2FN[name], lean_activation(name)))
    assert all(ours <= theirs for ours, theirs in zip(lean, stock, strict=True))
    assert sum(lean) < sum(stock)


@pytest.mark.parametrize("name", STEP_BY_STEP)
def test_fp32_differs_by_no_more_than_the_stock_one_errs(name):
    x = torch.linspace(-12, 12, 100_001)
    exact = value_and_gradient(oracles.gelu_new, x.double())
    stock = value_and_gradient(ACT2FN[name], x)
    lean = value_and_gradient(lean_activation(name), x)
    for ours, theirs, truth in zip(lean, stock, exact, strict=True):
        assert (ours - truth).abs().max() <= 2 * (theirs - truth).abs().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_activation_of_the_function_is_replaced(family):
    model = tiny_model(family)
    outcome = gelu.put_on(model)
    attribute = {"gpt2": "act", "phi": "activation_fn"}.get(family)
    if attribute is None:
        assert outcome.done == ""
        assert "gelu_new" in outcome.left
        return
    assert outcome.done == "2 activations"
    assert {type(getattr(m, attribute)) for m in model.modules() if hasattr(m, attribute)} == {nn.GELU}


def kept_bytes(activation):
    """What one call makes and keeps for its backward pass, result included, and the most it takes meanwhile."""
    x = torch.empty(1024, 512, dtype=torch.bfloat16, device="meta", requires_grad=True)
    with MemoryTracker("meta") as tracker:
        result = activation(x)
        kept = tracker.live_bytes
        result.backward(torch.empty_like(result))
    return kept, x.nbytes


def test_it_keeps_its_result_alone():
    kept, one = kept_bytes(lean_activation("gelu_new"))
    assert kept == one
    kept, one = kept_bytes(ACT2FN["gelu_new"])
    assert kept == 4 * one


@pytest.mark.parametrize("family", ["gpt2", "phi"])
def test_the_model_computes_what_it_did(family):
    exact, stock, lean = (tiny_model(family, dtype=dtype) for dtype in (torch.float64, *[torch.bfloat16] * 2))
    gelu.put_on(lean)
    ids = torch.arange(1, 60).reshape(1, -1)
    gradients = {}
    for model in (exact, stock, lean):
        model(ids, labels=ids).loss.backward()
        gradients[model] = torch.cat([p.grad.flatten().double() for p in model.parameters()])
    stock_error, lean_error = ((gradients[m] - gradients[exact]).norm() for m in (stock, lean))
    assert lean_error <= stock_error
