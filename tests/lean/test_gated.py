"""The product of a gated MLP: autograd's values and gradients to the bit, with one wide activation less kept."""

from __future__ import annotations

import pytest
import torch
from families import tiny_model
from torch import nn
from transformers.activations import ACT2FN

from qlora_kit.lean.gated import Gated, known_activation
from qlora_kit.memory.track import MemoryTracker

KNOWN = {
    "silu": ACT2FN["silu"],
    "nn.SiLU": nn.SiLU(),
    "gelu_pytorch_tanh": ACT2FN["gelu_pytorch_tanh"],
    "nn.GELU": nn.GELU(approximate="tanh"),
}


def stock(gate, up, module):
    return module(gate) * up


def lean(gate, up, module):
    activation = known_activation(module)
    assert activation is not None
    return Gated.apply(gate, up, activation)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", KNOWN)
def test_values_and_gradients_are_autograds(name, dtype):
    draw = torch.Generator().manual_seed(0)
    gate, up, grad = (torch.randn(3, 50, 64, generator=draw).mul(4).to(dtype) for _ in range(3))
    results = []
    for function in (stock, lean):
        inputs = [t.clone().requires_grad_() for t in (gate, up)]
        product = function(*inputs, KNOWN[name])
        results.append([product.detach(), *torch.autograd.grad(product, inputs, grad)])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*reversed(results), strict=True))


@pytest.mark.parametrize("name", ["gelu", "gelu_new", "gelu_python_tanh", "relu", "quick_gelu"])
def test_other_activations_are_not_taken_for_these(name):
    assert known_activation(ACT2FN[name]) is None


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2"])
def test_the_activation_of_every_gated_family_is_known(family):
    assert known_activation(tiny_model(family).model.layers[0].mlp.act_fn) is not None


def test_one_activation_less_is_kept():
    kept = {}
    for function in (stock, lean):
        gate, up = (torch.empty(512, 1024, dtype=torch.bfloat16, device="meta", requires_grad=True) for _ in range(2))
        with MemoryTracker("meta") as tracker:
            product = function(gate, up, ACT2FN["silu"])
            kept[function] = tracker.live_bytes // product.nbytes
    assert kept == {stock: 2, lean: 1}
