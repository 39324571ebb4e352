"""RMS norms that keep their input: transformers' values to the bit, and gradients closer to the formula's."""

from __future__ import annotations

import oracles
import pytest
import torch
from families import FAMILIES, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_cases import settings as run_settings
from memory_cases import small_config

from qlora_kit import build
from qlora_kit.lean import norm
from qlora_kit.memory.track import MemoryTracker

NORMS = {"llama": 5, "mistral": 5, "qwen2": 5, "qwen3": 9, "gemma": 5, "gemma2": 9}  # in two layers, and the last


def first_norm(family, lean, dtype=torch.bfloat16):
    model = tiny_model(family, dtype=dtype).requires_grad_(False)
    if lean:
        assert norm.put_on(model).done == f"{NORMS[family]} norms"
    return model.model.layers[0].input_layernorm


def value_and_gradient(module, x, grad_y):
    x = x.clone().requires_grad_()
    y = module(x)
    y.backward(grad_y)
    return y.detach(), x.grad


def drawn(shape, dtype, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=draw).mul(scale).to(dtype) for scale in (3.0, 1.0)]


def exact_gradient(module, x, grad_y):
    weight = module.weight.double()
    scale, eps = (weight, module.variance_epsilon) if hasattr(module, "variance_epsilon") else (1 + weight, module.eps)
    return value_and_gradient(lambda x: oracles.rms_norm(x, scale, eps), x.double(), grad_y.double())[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("family", NORMS)
def test_values_are_the_same_and_gradients_as_close(family, dtype, monkeypatch):
    monkeypatch.setattr(norm, "CHUNK_BYTES", 4 * 64 * 10)  # 10 rows
    stock, lean = first_norm(family, False, dtype), first_norm(family, True, dtype)
    x, grad_y = drawn((7, 19, 64), dtype)
    stock_y, stock_grad = value_and_gradient(stock, x, grad_y)
    lean_y, lean_grad = value_and_gradient(lean, x, grad_y)
    assert torch.equal(lean_y, stock_y)
    assert lean_grad.dtype == dtype
    exact = exact_gradient(stock, x, grad_y)
    as_close = 2 if dtype == torch.float32 else 1  # in fp32 only the order of the sums differs
    assert (lean_grad - exact).norm() <= as_close * (stock_grad - exact).norm()


@settings(max_examples=20, deadline=None)
@given(
    leading=st.lists(st.integers(1, 6), min_size=0, max_size=3),
    chunk_rows=st.integers(1, 9),
    transposed=st.booleans(),
    spread=st.sampled_from([1e-4, 1.0, 1e3]),
)
def test_any_shape_and_size(leading, chunk_rows, transposed, spread):
    x, grad_y = drawn((*leading, 64), torch.float32)
    x = x * spread
    if transposed and len(leading) >= 2:
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(norm, "CHUNK_BYTES", 4 * 64 * chunk_rows)
        stock, lean = (value_and_gradient(first_norm("llama", lean, torch.float32), x, grad_y) for lean in (0, 1))
    assert torch.equal(lean[0], stock[0])
    exact = exact_gradient(first_norm("llama", False, torch.float32), x, grad_y)
    assert (lean[1] - exact).norm() <= 2 * (stock[1] - exact).norm() + torch.finfo(torch.float32).eps * exact.norm()


def test_the_norm_of_heads():
    """Qwen3 norms queries and keys, (B, T, H, D), which are views."""
    model = tiny_model("qwen3", dtype=torch.bfloat16).requires_grad_(False)
    stock = model.model.layers[0].self_attn.q_norm
    x, grad_y = (t.view(2, 5, 4, 32) for t in drawn((2, 5, 128), torch.bfloat16))
    stock_y, stock_grad = value_and_gradient(stock, x, grad_y)
    exact = exact_gradient(stock, x, grad_y)
    norm.put_on(model)
    lean_y, lean_grad = value_and_gradient(model.model.layers[0].self_attn.q_norm, x, grad_y)
    assert torch.equal(lean_y, stock_y)
    assert (lean_grad - exact).norm() <= (stock_grad - exact).norm()


def test_a_norm_that_trains_is_the_stock_one():
    x, grad_y = drawn((3, 64), torch.float32)
    gradients = []
    for lean in (False, True):
        module = first_norm("llama", lean, torch.float32).requires_grad_(True)
        gradients.append((value_and_gradient(module, x, grad_y)[1], module.weight.grad))
    assert torch.equal(gradients[0][0], gradients[1][0])
    assert torch.equal(gradients[0][1], gradients[1][1])


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - NORMS.keys()))
def test_other_families_have_none(family):
    assert norm.put_on(tiny_model(family)).left == "no RMS norms in this model"


def test_a_norm_of_another_formula_is_left():
    model = tiny_model("llama")
    model.model.norm = type("OtherRMSNorm", (torch.nn.RMSNorm,), {})(64)
    outcome = norm.put_on(model)
    assert outcome.done == "4 norms"
    assert outcome.left == "OtherRMSNorm: of another formula"


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_only_the_input_is_kept(family):
    model = build.build_model(run_settings(bits=4, lean="off"), torch.device("meta"), small_config(family)).model
    norm.put_on(model)
    x = torch.empty(64, 1024, 128, dtype=torch.bfloat16, device="meta", requires_grad=True)
    with MemoryTracker("meta") as tracker:
        tracker.label(x, "inputs")
        y = model.base_model.model.model.layers[0].input_layernorm(x)
        assert tracker.live_bytes == x.nbytes + y.nbytes
        y.backward(y.detach())
        assert tracker.live_bytes == x.nbytes + y.nbytes + x.grad.nbytes
