"""AdamW of bf16 parameters against torch's AdamW of fp32 ones."""

import math

import pytest
import torch
from families import tiny_model
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import nn

from qlora_kit import RunConfig
from qlora_kit.adapters.inject import inject, trainable
from qlora_kit.build import Built
from qlora_kit.config.settings import AdapterConfig
from qlora_kit.optim.adamw import trains_split
from qlora_kit.optim.split_adamw import PIECE, SplitAdamW, join, split

SETTINGS = {"lr": 1e-4, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1}
FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**127), max_value=2.0**127)


def halves(numbers_N):
    values_N, remainder_N = torch.empty_like(numbers_N, dtype=torch.bfloat16), torch.empty_like(numbers_N).short()
    split(numbers_N, values_N, remainder_N)
    return values_N, remainder_N


@hypothesis_settings(max_examples=200, deadline=None)
@given(st.lists(FINITE, min_size=1, max_size=50))
def test_two_halves_are_the_number(numbers):
    numbers_N = torch.tensor(numbers)
    values_N, remainder_N = halves(numbers_N)
    assert torch.equal(join(values_N, remainder_N).view(torch.int32), numbers_N.view(torch.int32))
    error_N, stock_error_N = ((v.double() - numbers_N.double()).abs() for v in (values_N, numbers_N.bfloat16()))
    assert torch.equal(error_N, stock_error_N)  # rounded to the nearest; of two that are as near, either


def test_what_is_no_number_stays_none():
    values_N, _ = halves(torch.tensor([math.nan, -math.nan, math.inf, -math.inf, 0.0, -0.0]))
    assert values_N[:2].isnan().all()
    assert values_N[2:].tolist() == [math.inf, -math.inf, 0.0, 0.0]


@pytest.mark.parametrize("shape", [(7,), (3, 5), (PIECE + 33,)])
def test_bf16_parameters_train_as_fp32_ones_bit_for_bit(shape):
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(shape, generator=generator).bfloat16()
    ours, exact = nn.Parameter(first.clone()), nn.Parameter(first.float())
    optimizers = SplitAdamW([ours], **SETTINGS), torch.optim.AdamW([exact], **SETTINGS, fused=True)
    for _ in range(4):
        ours.grad = torch.randn(shape, generator=generator).bfloat16()
        exact.grad = ours.grad.float()
        for optimizer in optimizers:
            optimizer.step()
    state = optimizers[0].state[ours]
    number = join(ours.detach().view(-1), state["remainder"].view(-1)).view(shape)
    assert torch.equal(number, exact)
    assert torch.equal(ours, halves(exact.detach())[0])
    assert torch.equal(state["exp_avg_sq"], optimizers[1].state[exact]["exp_avg_sq"])
    assert not torch.equal(number, first.float())


@pytest.mark.gpu
def test_the_same_on_cuda():
    first = torch.randn(PIECE + 33, device="cuda").bfloat16()
    ours, exact = nn.Parameter(first.clone()), nn.Parameter(first.float())
    optimizers = SplitAdamW([ours], **SETTINGS), torch.optim.AdamW([exact], **SETTINGS, fused=True)
    for _ in range(4):
        ours.grad = torch.randn_like(first)
        exact.grad = ours.grad.float()
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(join(ours.detach(), optimizers[0].state[ours]["remainder"]), exact)


def test_parameters_that_do_not_lie_in_a_row_train_too():
    ours, exact = nn.Parameter(torch.ones(3, 5).bfloat16().T), nn.Parameter(torch.ones(5, 3))
    assert not ours.is_contiguous()
    gradient = torch.arange(15.0).view(5, 3)
    ours.grad, exact.grad = gradient.bfloat16(), gradient
    SplitAdamW([ours], **SETTINGS).step()
    torch.optim.AdamW([exact], **SETTINGS).step()
    assert torch.equal(ours, halves(exact.detach())[0])


def test_fp32_parameters_are_updated_as_they_are():
    ours, exact = nn.Parameter(torch.ones(9)), nn.Parameter(torch.ones(9))
    optimizers = SplitAdamW([ours], **SETTINGS), torch.optim.AdamW([exact], **SETTINGS, fused=True)
    for step in range(3):
        ours.grad = exact.grad = torch.arange(9.0) - step
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(ours, exact)
    assert set(optimizers[0].state[ours]) == {"step", "exp_avg", "exp_avg_sq"}


def test_one_without_a_gradient_is_left_alone():
    parameter = nn.Parameter(torch.ones(3).bfloat16())
    optimizer = SplitAdamW([parameter], **SETTINGS)
    optimizer.step()
    assert not optimizer.state
    assert torch.equal(parameter, torch.ones(3).bfloat16())


def test_small_updates_add_up():
    """The AdamW of torch rounds each of them away."""
    ours, stock = (nn.Parameter(torch.ones(4).bfloat16()) for _ in range(2))
    optimizers = SplitAdamW([ours], lr=1e-4), torch.optim.AdamW([stock], lr=1e-4, weight_decay=0.0, fused=True)
    for _ in range(100):
        ours.grad = stock.grad = torch.ones(4).bfloat16()
        for optimizer in optimizers:
            optimizer.step()
    assert stock.tolist() == [1.0] * 4
    assert ours.tolist() == pytest.approx([0.99] * 4, abs=2**-9)


def test_one_large_gradient_is_forgotten():
    """The AdamW of torch keeps the second moment in bf16, where 0.999 times it rounds to it: it never falls again."""
    ours, stock = (nn.Parameter(torch.zeros(4).bfloat16()) for _ in range(2))
    optimizers = SplitAdamW([ours], lr=1e-3), torch.optim.AdamW([stock], lr=1e-3, weight_decay=0.0, fused=True)
    for step in range(3001):
        ours.grad = stock.grad = torch.full((4,), 1e-3 if step else 1.0).bfloat16()
        for optimizer in optimizers:
            optimizer.step()
    ours_second, stock_second = (o.state[p]["exp_avg_sq"] for o, p in zip(optimizers, (ours, stock), strict=True))
    assert ours_second.max() < 1e-3 * 0.06  # 0.999 ** 3000 of (1 - 0.999) * 1.0
    assert stock_second.min() > 9e-4


def test_states_come_back_in_their_own_dtypes():
    """Loading by torch casts them to the parameter's: a remainder in bf16 is none."""

    def trained(steps, optimizer=None, parameter=None):
        parameter = nn.Parameter(torch.linspace(-1, 1, 50).bfloat16()) if parameter is None else parameter
        optimizer = optimizer or SplitAdamW([parameter], **SETTINGS)
        for step in steps:
            parameter.grad = torch.sin(torch.arange(50.0) * step).bfloat16()
            optimizer.step()
        return parameter, optimizer

    parameter, optimizer = trained(range(6))
    half, its_optimizer = trained(range(3))
    resumed = nn.Parameter(half.detach().clone())
    again = SplitAdamW([resumed], **SETTINGS)
    again.load_state_dict(its_optimizer.state_dict())
    trained(range(3, 6), again, resumed)
    assert torch.equal(resumed, parameter)
    for name, value in optimizer.state[parameter].items():
        assert again.state[resumed][name].dtype == value.dtype
        assert torch.equal(again.state[resumed][name], value)


def test_states_of_another_optimizer_are_refused():
    parameter = nn.Parameter(torch.ones(4).bfloat16())
    parameter.grad = torch.ones(4).bfloat16()
    stock = torch.optim.AdamW([parameter])
    stock.step()
    with pytest.raises(ValueError, match="other names, shapes or dtypes"):
        SplitAdamW([parameter]).load_state_dict(stock.state_dict())


@pytest.mark.parametrize(("adapter_dtype", "kind"), [("bf16", SplitAdamW), ("fp32", torch.optim.AdamW)])
def test_adamw_trains_bf16_factors_split(adapter_dtype, kind):
    model = inject(tiny_model("llama").requires_grad_(False), AdapterConfig(r=2, adapter_dtype=adapter_dtype))
    assert type(Built(model=model).make_optimizer(RunConfig().optim, "adamw")) is kind
    assert trainable(model)


def test_a_whole_model_in_bf16_stays_at_eight_bytes():
    assert not trains_split(tiny_model("llama").bfloat16())
