from __future__ import annotations

import pytest
import torch
from families import tiny_model
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from lean_cases import with_factors

from qlora_kit.adapters.initialization import NAME, lora_layers
from qlora_kit.adapters.inject import trainable
from qlora_kit.optim.rank_penalty import add_gradients, nuclear_norm

EPS = torch.finfo(torch.float32).eps


def drawn(rows, columns, r, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(rows, r, generator=draw), torch.randn(r, columns, generator=draw)


@hypothesis_settings(max_examples=30, deadline=None)
@given(st.integers(1, 24), st.integers(1, 24), st.integers(1, 6), st.integers(0, 99))
def test_norm_and_gradients_are_those_of_the_whole_product(rows, columns, r, seed):
    """In fp64 and by autograd through the product of N × K; its rounding grows as the product is ill-conditioned."""
    b, a = drawn(rows, columns, r, seed)
    norm, grad_b, grad_a = nuclear_norm(b, a)
    exact_b, exact_a = b.double().requires_grad_(), a.double().requires_grad_()
    values = torch.linalg.svdvals(exact_b @ exact_a)[: min(rows, columns, r)]  # the others are zero
    values.sum().backward()
    condition = float(values.detach()[0] / values.detach()[-1])
    size = float(b.norm() * a.norm())
    assert abs(float(norm - values.detach().sum())) <= 50 * EPS * size
    for found, exact, other in ((grad_b, exact_b, a), (grad_a, exact_a, b)):
        bound = 50 * EPS * (condition + size / float(values.detach()[-1])) * float(other.norm())
        assert float((found - exact.grad).norm()) <= bound


def test_a_change_of_nothing_is_not_pushed():
    b, a = drawn(12, 9, 3)
    for zero_b, zero_a in ((torch.zeros_like(b), a), (b, torch.zeros_like(a))):
        norm, grad_b, grad_a = nuclear_norm(zero_b, zero_a)
        assert float(norm) == 0
        assert not grad_b.any()
        assert not grad_a.any()
    # two halves that cancel, up to rounding, as PiSSA's at the beginning
    norm, grad_b, grad_a = nuclear_norm(torch.cat([b, -b], 1), torch.cat([a, a]))
    assert float(norm) < 1e-5 * float(b.norm() * a.norm())
    assert not grad_b.any()
    assert not grad_a.any()


@pytest.mark.parametrize(
    "method", [{}, {"init": "pissa"}, {"variant": "lora-xs"}, {"rslora": True, "rank_pattern": {"up_proj": 2}}], ids=str
)
def test_the_gradient_reaches_whatever_trains_and_adds_to_what_is_there(method):
    model = with_factors(tiny_model("llama"), **method)
    with torch.no_grad():  # no two halves the same, for a singular value of zero has no gradient
        for _, parameter in trainable(model):
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
    layers = lora_layers(model).values()
    total = sum(
        layer.scaling[NAME]
        * torch.linalg.matrix_norm(layer.lora_B[NAME].weight.double() @ layer.lora_A[NAME].weight.double(), "nuc")
        for layer in layers
    )
    expected = torch.autograd.grad(total, [p for _, p in trainable(model)])
    for _, parameter in trainable(model):
        parameter.grad = torch.ones_like(parameter)
    assert float(add_gradients(model, 0.25)) == pytest.approx(float(total.detach()), rel=1e-4)
    for (name, parameter), gradient in zip(trainable(model), expected, strict=True):
        error = float((parameter.grad - 1 - 0.25 * gradient).norm())
        assert error <= 1e-3 * float(gradient.norm()) + EPS * parameter.numel() ** 0.5, name


def test_it_drives_small_directions_to_nothing_and_keeps_the_large():
    """Descent on ½‖B·A − M‖² + λ‖B·A‖⁎ ends at the singular values of M less λ, and none below zero."""
    draw = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(12, 12, generator=draw))[0] for _ in range(2))
    wanted = torch.tensor([4.0, 2.0, 0.3, 0.2, *[0.0] * 8])
    target = (left * wanted) @ right
    b, a = drawn(12, 12, 6)
    b, a = b * 0.3, a * 0.3
    for _ in range(2000):
        _, grad_b, grad_a = nuclear_norm(b, a)
        off = b @ a - target
        b, a = b - 0.02 * (off @ a.T + 0.5 * grad_b), a - 0.02 * (b.T @ off + 0.5 * grad_a)
    values = torch.linalg.svdvals(b @ a)
    torch.testing.assert_close(values[:2], wanted[:2] - 0.5, rtol=0.02, atol=0.02)
    assert float(values[2:].sum()) < 0.1
