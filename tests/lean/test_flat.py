"""One buffer behind all factors: what is computed stays what it was."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import json
import weakref
from itertools import pairwise

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.optim import GlobalOptimManager
from families import save_tiny, tiny_model
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from oracles import adamw_step, gradient_norm
from peft.optimizers import create_loraplus_optimizer
from rich.console import Console
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer, TrainingArguments

from qlora_kit import RunConfig, UserError, train
from qlora_kit.adapters.files import load_factors, save_adapter
from qlora_kit.adapters.inject import inject, trainable
from qlora_kit.build import Built
from qlora_kit.config.settings import AdapterConfig
from qlora_kit.lean import flat
from qlora_kit.lean.flat import (
    ALIGNMENT,
    MAX_ELEMENTS,
    MAX_ELEMENTS_CPU,
    SMALL_ELEMENTS,
    FlatBuffer,
    FlatFactors,
    fill,
    layout,
)
from qlora_kit.memory.simulate import Simulation, simulate
from qlora_kit.memory.track import Region, peaks_by_region
from qlora_kit.optim import paged_states
from qlora_kit.optim.split_adamw import SplitAdamW
from qlora_kit.training import prepare

IDS = torch.arange(16).reshape(2, 8)
SIZES = st.lists(st.integers(1, 5000), min_size=1, max_size=30)
QUIET = Console(file=io.StringIO())


def lora(family="llama", seed=0, **settings):
    """A tiny model with factors, those of B drawn too so that every gradient is there from the first step."""
    torch.manual_seed(seed)
    model = inject(tiny_model(family), AdapterConfig(**settings))
    for name, parameter in trainable(model):
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return model.train()


MADE: weakref.WeakKeyDictionary[nn.Module, FlatFactors] = weakref.WeakKeyDictionary()  # by the model


def put_on(model, lora_plus=None):
    outcome = flat.put_on(model, lora_plus)
    if outcome.made is not None:
        MADE[model] = outcome.made
    return outcome


def flat_factors(model):
    return MADE.get(model)


def parameter_groups(model, weight_decay, lr=None, lora_plus=None):
    return flat.parameter_groups(model, flat_factors(model), weight_decay, lr, lora_plus)


def connect(model, optimizer):
    return flat.connect(optimizer, flat_factors(model))


def clip_gradients(model, max_norm):
    return flat.clip_gradients(model, flat_factors(model), max_norm)


def twins(**settings):
    """The same model twice, its factors apart and in buffers."""
    apart, together = lora(**settings), lora(**settings)
    put_on(together)
    return apart, together


def backward(model, ids=IDS):
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.item()


def gradients(model):
    return [p.grad.clone() for _, p in trainable(model)]


def equal(ones, others):
    return all(torch.equal(x, y) for x, y in zip(ones, others, strict=True))


OPTIMIZERS = {
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=1e-2, fused=True),
    "split": lambda groups: SplitAdamW(groups, lr=1e-2),
    "adamw_8bit": lambda groups: bnb.optim.AdamW(groups, lr=1e-2, optim_bits=8),
    "lion_8bit": lambda groups: bnb.optim.Lion(groups, lr=1e-3, optim_bits=8),
    "sgd": lambda groups: torch.optim.SGD(groups, lr=1e-1),
}


def losses_of(model, optim, steps=50, micro_batches=1, weight_decay=0.01, clip=1.0):
    """The losses of training `model`, in the order of transformers' Trainer."""
    optimizer = connect(model, OPTIMIZERS[optim](parameter_groups(model, weight_decay)))
    losses = []
    for step in range(steps):
        ids = (IDS + step) % 256
        losses += [backward(model, rows) for rows in ids.chunk(micro_batches)]
        clip_gradients(model, clip)
        optimizer.step()
        model.zero_grad()
    return losses


# the layout


@hypothesis_settings(max_examples=50, deadline=None)
@given(SIZES)
def test_factors_lie_aligned_side_by_side_without_overlap(sizes):
    starts, length = layout(sizes)
    assert all(start % ALIGNMENT == 0 for start in (*starts, length))
    for start, size, following in zip(starts, sizes, [*starts[1:], length], strict=True):
        assert start + size <= following < start + size + ALIGNMENT


@hypothesis_settings(max_examples=50, deadline=None)
@given(SIZES, st.integers(1, 20_000))
def test_every_factor_is_in_one_buffer_that_is_not_too_large(sizes, most):
    ranges = fill(sizes, most)
    assert [i for indices in ranges for i in indices] == list(range(len(sizes)))
    for indices in ranges:
        assert len(indices) == 1 or layout([sizes[i] for i in indices])[1] <= most
    for one, following in pairwise(ranges):  # and none is emptier than it must be
        assert layout([sizes[i] for i in (*one, following[0])])[1] > most


@hypothesis_settings(max_examples=20, deadline=None)
@given(st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=2), min_size=1, max_size=8), st.booleans())
def test_values_and_gradients_are_found_again(shapes, some_missing):
    torch.manual_seed(0)
    factors = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    values = [p.detach().clone() for p in factors]
    buffer = FlatBuffer(factors, True)
    assert equal(factors, values)
    given_gradients = [torch.randn_like(p) for p in factors]
    for index, (factor, gradient) in enumerate(zip(factors, given_gradients, strict=True)):
        factor.grad = None if some_missing and index % 2 else gradient
    buffer.gather()
    for index, (factor, gradient) in enumerate(zip(factors, given_gradients, strict=True)):
        assert torch.equal(factor.grad, torch.zeros_like(factor) if some_missing and index % 2 else gradient)
    assert buffer.parameter.grad.norm() == pytest.approx(torch.cat([p.grad.flatten() for p in factors]).norm())
    with torch.no_grad():
        buffer.parameter -= buffer.parameter.grad
    assert equal(factors, [v - p.grad for v, p in zip(values, factors, strict=True)])


def test_the_model_keeps_its_parameters_and_files(tmp_path):
    apart, together = twins(r=16)
    before = {name: (p.shape, p.dtype, p.stride()) for name, p in apart.named_parameters()}
    assert {name: (p.shape, p.dtype, p.stride()) for name, p in together.named_parameters()} == before
    for name, model in (("apart", apart), ("together", together)):
        save_adapter(model, tmp_path / name)
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("apart", "together")]
    assert files[0] == files[1]
    storages = {p.untyped_storage()._cdata for _, p in trainable(together)}
    assert storages == {b.parameter.untyped_storage()._cdata for b in flat_factors(together).buffers}


def test_it_says_what_it_did():
    model = lora(r=64)
    n_bytes = sum(p.nbytes for _, p in trainable(model))
    assert put_on(model).done == f"{len(trainable(model))} factors in one buffer of {n_bytes / 2**20:.1f} MiB"
    assert "in 2 buffers of" in put_on(lora(r=48)).done  # some have fewer than 4096 elements
    assert put_on(tiny_model("llama").requires_grad_(False)).left == "nothing trains"


def test_dtypes_decay_and_small_factors_have_buffers_of_their_own():
    model = lora(r=64, dora=True)
    for name, parameter in trainable(model):
        if "q_proj" in name:
            parameter.data = parameter.data.float()
    put_on(model)
    kinds = [(b.parameter.dtype, b.factors[0].numel() < SMALL_ELEMENTS) for b in flat_factors(model).buffers]
    assert len(kinds) == len(set(kinds)) == 4  # magnitude vectors are small
    for buffer in flat_factors(model).buffers:
        assert {p.dtype for p in buffer.factors} == {buffer.parameter.dtype}
        assert len({p.numel() < SMALL_ELEMENTS for p in buffer.factors}) == 1


def test_on_a_cpu_a_buffer_stays_small_enough_for_its_kernels(monkeypatch):
    monkeypatch.setattr(flat, "MAX_ELEMENTS_CPU", 10_000)
    model = lora(r=64)
    put_on(model)
    assert len(flat_factors(model).buffers) > 1
    monkeypatch.undo()
    with torch.device("meta"):
        huge = nn.Module()
        huge.a, huge.b, huge.c = (nn.Parameter(torch.empty(2**15, 2**15)) for _ in range(3))
    put_on(huge)
    assert [len(b.factors) for b in flat_factors(huge).buffers] == [1, 1, 1]  # two would be 2**31 elements
    assert MAX_ELEMENTS_CPU < MAX_ELEMENTS < 2**31


@pytest.mark.parametrize("settings", [{"dora": True}, {}])
def test_what_decays_is_what_transformers_lets_decay(tmp_path, settings):
    apart, together = twins(r=16, **settings)
    stock = Trainer(apart, TrainingArguments(str(tmp_path), weight_decay=0.1, report_to=[], use_cpu=True))
    stock.create_optimizer()
    decays = {id(p): group["weight_decay"] for group in stock.optimizer.param_groups for p in group["params"]}
    expected = {name: decays[id(p)] for name, p in trainable(apart)}
    groups = {id(p): g["weight_decay"] for g in parameter_groups(together, 0.1) for p in g["params"]}
    buffers = {id(p): groups[id(b.parameter)] for b in flat_factors(together).buffers for p in b.factors}
    assert {name: buffers[id(p)] for name, p in trainable(together)} == expected
    ungrouped = {id(p): g["weight_decay"] for g in parameter_groups(apart, 0.1) for p in g["params"]}
    assert {name: ungrouped[id(p)] for name, p in trainable(apart)} == expected


@pytest.mark.parametrize("settings", [{"r": 4}, {"r": 64, "dora": True, "adapter_dtype": "fp32"}])
def test_under_lora_plus_every_b_and_nothing_else_learns_faster(settings):
    apart, together = (lora(**settings) for _ in range(2))
    put_on(together, 16.0)
    rates = {id(p): g.get("lr", 0.5) for g in parameter_groups(apart, 0.1, 0.5, 16.0) for p in g["params"]}
    expected = {name: 8.0 if "lora_B" in name else 0.5 for name, _ in trainable(apart)}
    assert {name: rates[id(p)] for name, p in trainable(apart)} == expected
    groups = {id(p): g.get("lr", 0.5) for g in parameter_groups(together, 0.1, 0.5, 16.0) for p in g["params"]}
    buffers = {id(p): groups[id(b.parameter)] for b in flat_factors(together).buffers for p in b.factors}
    assert {name: buffers[id(p)] for name, p in trainable(together)} == expected
    assert "lr" not in parameter_groups(together, 0.1, 0.5, 16.0)[0]  # the first group's is the rate that a run logs


def test_lora_plus_steps_as_pefts_own_optimizer():
    """PEFT's `create_loraplus_optimizer` with the same torch optimizer, on factors that lie apart."""
    apart, together = (lora(r=4, adapter_dtype="fp32") for _ in range(2))
    put_on(together, 16.0)
    options = {"lr": 1e-3, "fused": True}
    theirs = create_loraplus_optimizer(apart, torch.optim.AdamW, loraplus_lr_ratio=16.0, **options)
    ours = connect(together, torch.optim.AdamW(parameter_groups(together, 0.0, 1e-3, 16.0), **options))
    before = [p.detach().clone() for _, p in trainable(apart)]
    for step in range(5):
        for model, optimizer in ((apart, theirs), (together, ours)):
            backward(model, (IDS + step) % 256)
            optimizer.step()
            model.zero_grad()
    assert equal([p for _, p in trainable(apart)], [p for _, p in trainable(together)])
    assert not any(torch.equal(p, old) for (_, p), old in zip(trainable(apart), before, strict=True))


@pytest.mark.parametrize("optim", sorted(OPTIMIZERS))
def test_lora_plus_works_with_every_optimizer(optim):
    """At a rate of zero for A only B moves, and in the buffers as apart."""
    apart, together = (lora(r=51, adapter_dtype="fp32", targets=("q_proj", "down_proj")) for _ in range(2))
    before = {name: p.detach().clone() for name, p in trainable(apart)}
    put_on(together, 2.0)
    for model in (apart, together):
        optimizer = connect(model, OPTIMIZERS[optim](parameter_groups(model, 0.0, 1e-3, 2.0)))
        for group in optimizer.param_groups:
            group["lr"] = 0.0 if group["lr"] != 2e-3 else group["lr"]
        backward(model)
        optimizer.step()
        model.zero_grad()
    assert equal([p for _, p in trainable(apart)], [p for _, p in trainable(together)])
    assert {name for name, p in trainable(apart) if not torch.equal(p, before[name])} == {
        name for name in before if "lora_B" in name
    }


# training


@pytest.mark.parametrize(
    ("optim", "adapter_dtype"),
    [
        ("split", "bf16"),
        ("adamw", "bf16"),
        ("adamw", "fp32"),
        ("adamw_8bit", "bf16"),
        ("lion_8bit", "fp32"),
        ("sgd", "bf16"),
    ],
)
def test_fifty_steps_are_the_same(optim, adapter_dtype):
    """Bit for bit: the arithmetic is elementwise, 8-bit states are scaled in the same blocks, small ones are fp32.

    The norm alone is summed otherwise (in fp32 for bf16 gradients, and small factors last), so nothing is clipped.
    """
    r = 51  # some factors have 25.5 blocks of states, others are too small for 8 bits
    apart, together = twins(adapter_dtype=adapter_dtype, targets=("q_proj", "v_proj", "down_proj"), r=r)
    assert {b.factors[0].numel() < SMALL_ELEMENTS for b in flat_factors(together).buffers} == {True, False}
    stock = losses_of(apart, optim, clip=1e9)
    assert losses_of(together, optim, clip=1e9) == stock
    assert equal([p for _, p in trainable(apart)], [p for _, p in trainable(together)])
    assert stock[-1] < stock[0]


def test_clipped_training_stays_within_the_error_of_the_stock_step():
    """The reference is the same training with fp32 factors and an fp64 norm, from the same values."""
    apart, together = twins(r=64)
    exact = oracle_losses(copy.deepcopy(apart).float(), clip=0.05)
    stock, flat_ones = (losses_of(model, "adamw", clip=0.05) for model in (apart, together))
    assert distance(flat_ones, stock) <= distance(stock, exact)


def distance(ones, others):
    return sum(abs(one - other) for one, other in zip(ones, others, strict=True))


def oracle_losses(model, clip, lr=1e-2, weight_decay=0.01):
    states = [(torch.zeros_like(p), torch.zeros_like(p)) for _, p in trainable(model)]
    losses = []
    for step in range(50):
        losses.append(backward(model, (IDS + step) % 256))
        scale = min(1.0, clip / (gradient_norm(gradients(model)) + 1e-6))
        for (_, parameter), state in zip(trainable(model), states, strict=True):
            adamw_step(parameter, parameter.grad * scale, state, step + 1, lr, weight_decay)
            parameter.grad = None
    return losses


@hypothesis_settings(max_examples=8, deadline=None)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=5), st.sampled_from([torch.float32, torch.bfloat16]))
def test_any_shape_is_updated_as_well_as_alone(sizes, dtype):
    """In a buffer fewer elements are in a kernel's last, odd vector, where it may round otherwise.

    The bound is what the kernel commits alone, or one rounding of what goes in and comes out.
    """
    torch.manual_seed(1)
    values, steps = [torch.randn(n).to(dtype) for n in sizes], [torch.randn(n).to(dtype) for n in sizes]
    for optim in ("adamw", "sgd"):
        apart = [nn.Parameter(v.clone()) for v in values]
        together = [nn.Parameter(v.clone()) for v in values]
        exact = [nn.Parameter(v.double()) for v in values]
        buffer = FlatBuffer(together, True)
        for factors, given_to in ((apart, apart), (together, [buffer.parameter]), (exact, exact)):
            for factor, gradient in zip(factors, steps, strict=True):
                factor.grad = gradient.to(factor.dtype)
            if factors is together:
                buffer.gather()
            OPTIMIZERS[optim](given_to).step()
        apart_N, together_N, exact_N = (
            torch.cat([p.detach().double() for p in factors]) for factors in (apart, together, exact)
        )
        rounding_N = torch.finfo(dtype).eps * torch.maximum(torch.cat(values).double().abs(), exact_N.abs())
        assert ((together_N - exact_N).abs() <= torch.maximum((apart_N - exact_N).abs(), rounding_N)).all()


@pytest.mark.parametrize("optim", ["split", "adamw", "adamw_8bit"])
def test_accumulated_gradients_are_the_same(optim):
    apart, together = twins(r=64)
    assert losses_of(together, optim, 4, micro_batches=2, clip=1e9) == losses_of(apart, optim, 4, 2, clip=1e9)
    assert equal([p for _, p in trainable(apart)], [p for _, p in trainable(together)])


def test_padding_stays_zero():
    model = lora(r=3, adapter_dtype="fp32")
    put_on(model)
    losses_of(model, "lion_8bit", 5)
    for buffer in flat_factors(model).buffers:
        elements = sum(p.numel() for p in buffer.factors)
        assert elements < buffer.parameter.numel()
        assert buffer.parameter.count_nonzero() <= elements


# the norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_is_no_less_exact_than_torchs(dtype):
    torch.manual_seed(0)
    sizes = [300_000, 5000, 70_000, 16, 1_000_000]
    factors = [nn.Parameter(torch.zeros(n, dtype=dtype)) for n in sizes]
    together = FlatFactors([FlatBuffer(factors, True)])
    apart = [nn.Parameter(p.detach().clone()) for p in factors]
    for one, other in zip(factors, apart, strict=True):
        one.grad = (torch.randn(one.shape) * 0.01).to(dtype)
        other.grad = one.grad.clone()
    exact = gradient_norm([p.grad for p in apart])
    before = [p.grad.clone() for p in apart]
    stock = torch.nn.utils.clip_grad_norm_(apart, 0.5)
    norm = together.clip(0.5)
    assert norm.dtype == torch.float32
    assert abs(norm.item() - exact) <= abs(stock.item() - exact)
    expected_N = torch.cat(before).double() * (0.5 / (exact + 1e-6))
    error, stock_error = ((torch.cat([p.grad for p in ones]).double() - expected_N).norm() for ones in (factors, apart))
    assert error <= stock_error


def test_one_sum_over_a_whole_buffer_would_be_less_exact_on_a_cpu():
    """Why the norm is taken factor by factor."""
    torch.manual_seed(0)
    gradient = torch.randn(2**24) * 1e-3
    exact = gradient.double().norm().item()
    assert abs(gradient.norm().item() - exact) > 1e-5 * exact
    parts = torch.stack(torch._foreach_norm(list(gradient.split(2**16)), 2.0, torch.float32))
    assert abs(parts.norm().item() - exact) < 1e-6 * exact


def test_the_norm_of_fp32_factors_is_torchs_own_bit_for_bit():
    apart, together = twins(r=64, adapter_dtype="fp32")
    assert losses_of(apart, "adamw", 5, clip=0.05) == losses_of(together, "adamw", 5, clip=0.05)
    assert equal([p for _, p in trainable(apart)], [p for _, p in trainable(together)])


# the life of gradients


def test_gradients_arrive_apart_and_are_gathered_once():
    apart, together = twins(r=16)
    optimizer = connect(together, OPTIMIZERS["adamw"](parameter_groups(together, 0.0)))
    buffers = [b.parameter for b in flat_factors(together).buffers]
    backward(apart)
    backward(together)
    assert all(p.grad is None for p in buffers)
    clip_gradients(together, 1e9)
    held = {p.grad.untyped_storage()._cdata for p in buffers}
    assert {p.grad.untyped_storage()._cdata for _, p in trainable(together)} == held
    backward(apart)
    backward(together)  # one more before the step: it adds to what is gathered
    flat_factors(together).gather()
    assert {p.grad.untyped_storage()._cdata for p in buffers} == held
    assert equal(gradients(apart), gradients(together))
    optimizer.step()
    assert all(p.grad is None for p in (*buffers, *together.parameters()))


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_that_are_taken_back_do_not_count(set_to_none):
    apart, together = twins(r=16)
    for model in (apart, together):
        backward(model)
        clip_gradients(model, 1e9)
        model.zero_grad(set_to_none=set_to_none)  # as after an overflow: no step was taken
        backward(model)
        clip_gradients(model, 1e9)
    assert equal(gradients(apart), gradients(together))


def test_a_factor_without_a_gradient_counts_as_zero():
    model = lora(r=16)
    put_on(model)
    _, silent = trainable(model)[1]
    backward(model)
    flat_factors(model).gather()
    assert silent.grad.any()
    model.zero_grad()  # no step was taken: the buffer still holds what was
    backward(model)
    silent.grad = None
    flat_factors(model).gather()
    assert not silent.grad.any()


def test_without_clipping_the_step_gathers():
    apart, together = twins(r=64)
    for model in (apart, together):
        optimizer = connect(model, OPTIMIZERS["adamw"](parameter_groups(model, 0.0)))
        backward(model)
        optimizer.step()
    assert equal([p for _, p in trainable(apart)], [p for _, p in trainable(together)])


@pytest.mark.parametrize("overflow", [False, True])
def test_a_scaler_unscales_and_skips_as_ever(overflow):
    """fp16 training: it looks at the gradients of the optimizer's parameters."""
    ends = []
    for model in twins(r=64, adapter_dtype="fp32"):
        optimizer = connect(model, torch.optim.SGD(parameter_groups(model, 0.0), 0.1))
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for step in range(3):
            scaler.scale(model(input_ids=IDS, labels=IDS).loss).backward()
            if overflow and step == 1:
                trainable(model)[3][1].grad[0, 0] = float("inf")
            together = flat_factors(model)
            if together is not None:
                together.gather()
            scaler.unscale_(optimizer)
            clip_gradients(model, 0.1)
            scaler.step(optimizer)
            scaler.update()
            model.zero_grad()
        ends.append(([p.detach().clone() for _, p in trainable(model)], scaler.get_scale()))
    assert ends[0][1] == ends[1][1] == (512.0 if overflow else 1024.0)
    assert equal(ends[0][0], ends[1][0])


# staying in the buffer


@pytest.mark.parametrize(
    "moves",
    [
        lambda model: model.to(torch.float64),
        lambda model: [setattr(p, "data", p.data.clone()) for _, p in trainable(model)[-1:]],
    ],
)
def test_a_factor_that_left_its_buffer_stops_the_step(moves):
    model = lora(r=16)
    put_on(model)
    optimizer = connect(model, OPTIMIZERS["adamw"](parameter_groups(model, 0.0)))
    moves(model)
    backward(model)
    with pytest.raises(RuntimeError, match="no longer lies in the flat buffer"):
        optimizer.step()


def test_loading_and_placing_leave_the_factors_in_their_buffer(tmp_path):
    other, model = lora(seed=1, r=16), lora(r=16)
    put_on(model)
    save_adapter(other, tmp_path / "adapter")
    load_factors(model, tmp_path / "adapter")
    model.to("cpu").eval().train()
    flat_factors(model).gather()  # raises where one has left
    assert equal([p for _, p in trainable(other)], [p for _, p in trainable(model)])
    in_buffers = [b.parameter.detach() for b in flat_factors(model).buffers]
    assert gradient_norm(in_buffers) == pytest.approx(gradient_norm([p.detach() for _, p in trainable(other)]))


def run_settings(tmp_path, **changes):
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps({"prompt": f"add {i}", "completion": f"{i + 1}"}) for i in range(16)))
    model = save_tiny(tmp_path / "base", "llama")
    settings = {"model": str(model), "data": str(data), "device": "cpu", "r": 64, "seq_len": 32, "batch_size": 2}
    return {**settings, "lr": 5e-3, "preflight": False, "out": str(tmp_path / "run"), **changes}


def test_a_whole_run_is_the_same_and_the_optimizer_has_one_parameter_a_buffer(tmp_path, monkeypatch):
    changes = {"bits": 4, "max_steps": 4, "grad_accum": 2, "save_steps": 4, "weight_decay": 0.1, "clip": 1e9}
    settings = run_settings(tmp_path, **changes, schedule="constant")  # which may be made longer
    adapters, states = [], []
    for flat_buffer in (True, False):
        out = tmp_path / str(flat_buffer)
        result = train(RunConfig.from_flat({**settings, "flat_buffer": flat_buffer, "out": str(out)}), QUIET)
        adapters.append(load_file(result.adapter / "adapter_model.safetensors"))
        checkpoint = result.folder / "checkpoints" / "checkpoint-4"
        states.append(torch.load(checkpoint / "optimizer.pt", weights_only=True))
    assert adapters[0].keys() == adapters[1].keys()
    assert all(torch.equal(adapters[0][key], adapters[1][key]) for key in adapters[0])
    assert [len(s["state"]) for s in states] == [1, len(adapters[0])]
    resumed = {**settings, "resume": str(tmp_path / "True"), "out": str(tmp_path / "resumed"), "max_steps": 6}
    with pytest.raises(UserError, match="flat_buffer = False"):
        train(RunConfig.from_flat({**resumed, "flat_buffer": False}), QUIET)
    monkeypatch.setattr(flat, "MAX_ELEMENTS_CPU", 10_000)  # as on another kind of device
    with pytest.raises(UserError, match="over other tensors"):
        train(RunConfig.from_flat(resumed), QUIET)


def test_steps_outside_a_run_have_the_runs_optimizer():
    model = lora(r=48)
    built = Built(model=model, outcomes={"one buffer": put_on(model)})
    config = RunConfig.from_flat({"lr": 1e-3, "weight_decay": 0.1})
    optimizer = built.make_optimizer(config.optim, "adamw")
    assert [p for group in optimizer.param_groups for p in group["params"]] == [
        buffer.parameter for buffer in flat_factors(model).buffers
    ]
    assert {(g["lr"], g["weight_decay"]) for g in optimizer.param_groups} == {(1e-3, 0.1)}
    backward(model)
    optimizer.step()
    assert all(p.grad is None for _, p in trainable(model))


def test_a_factor_that_gets_no_gradient_is_still_named(tmp_path, monkeypatch):
    build = prepare.build_model

    def deaf(*args):
        built = build(*args)
        layer = built.model.get_submodule("base_model.model.model.layers.1.self_attn.v_proj")
        layer._disable_adapters = True  # its factors still train, and no gradient ever comes
        return built

    monkeypatch.setattr(prepare, "build_model", deaf)
    with pytest.raises(UserError, match="gets no gradient") as caught:
        train(RunConfig.from_flat(run_settings(tmp_path, max_steps=1)), QUIET)
    assert len(caught.value.faults) == 2
    assert all("layers.1.self_attn.v_proj" in fault.setting for fault in caught.value.faults)


# bitsandbytes


@contextlib.contextmanager
def counted_updates(monkeypatch):
    calls = []
    update = bnb.optim.optimizer.Optimizer2State.update_step
    with monkeypatch.context() as patch:
        patch.setattr(
            bnb.optim.optimizer.Optimizer2State,
            "update_step",
            lambda self, *args: (calls.append(1), update(self, *args))[1],
        )
        yield calls


def test_a_step_is_one_call_of_the_optimizer(monkeypatch):
    """Trap 11: bitsandbytes waits for the device after each."""
    for model, calls in zip(twins(r=64), (28, 1), strict=True):
        with counted_updates(monkeypatch) as counted:
            losses_of(model, "adamw_8bit", 1)
        assert len(counted) == calls


def test_factors_too_small_for_eight_bits_keep_fp32_states():
    model = lora(r=16)
    put_on(model)
    losses_of(model, "adamw_8bit", 1)
    manager = GlobalOptimManager.get_instance()
    small = [b.parameter for b in flat_factors(model).buffers if b.factors[0].numel() < SMALL_ELEMENTS]
    assert small[0].numel() > SMALL_ELEMENTS
    assert all(manager.pid2config[id(p)] == {"optim_bits": 32} for p in small)
    keys, alive = [id(p) for p in small], weakref.ref(small[0])
    del model, small
    gc.collect()
    assert alive() is None
    assert not any(key in manager.pid2config for key in keys)  # another tensor may get the same id


# the plan


def shapes_of_tiny(tmp_path, **changes):
    flat_settings = {"model": str(save_tiny(tmp_path / "base", "llama")), "bits": 4, "seq_len": 64, "batch_size": 2}
    return RunConfig.from_flat({**flat_settings, "targets": "gate_proj", "r": 384, **changes})


def test_paged_states_page_as_a_whole(tmp_path):
    """Only tensors of 100 000 elements or more page (trap 11): no factor has them, the buffer has."""
    config = shapes_of_tiny(tmp_path)
    paged = {}
    for flat_buffer in (True, False):
        record = simulate(
            shapes_of_tiny(tmp_path, flat_buffer=flat_buffer), Simulation(seq_len=64, optim="paged_adamw_8bit")
        )
        largest = config.adapter.r * 128
        assert largest < paged_states.MIN_ELEMENTS < record.n_trainable
        states = peaks_by_region(record.events)[Region(step=2, phase="loss")].components["optimizer states"]
        paged[flat_buffer] = (record.paged_bytes, states >= 2 * record.n_trainable)
        assert record.n_trainable == 2 * 384 * (64 + 128)
    assert paged == {True: (2 * record.n_trainable, False), False: (0, True)}


def test_the_plan_shows_that_only_clipping_takes_more(tmp_path):
    peaks, optim = [], "adamw_8bit"
    for flat_buffer in (False, True):
        config = shapes_of_tiny(tmp_path, flat_buffer=flat_buffer, optim=optim, targets=None, r=64)
        record = simulate(config, Simulation(seq_len=64, optim=optim))
        peaks.append(peaks_by_region(record.events))
    apart, together = peaks
    factors = apart[Region(step=2, phase="clip")].components["adapters"]
    for region in apart.keys() & together.keys():
        more = factors if region.phase == "clip" else 0
        assert together[region].n_bytes <= apart[region].n_bytes + more, region
    at_clip = together[Region(step=2, phase="clip")].components
    assert at_clip["adapters"] == factors
    assert at_clip["gradients"] == 2 * factors  # as they arrived and as they are gathered, for a moment
    assert together[Region(step=2, phase="optimizer")].components["gradients"] == factors
    assert "gradients" not in together[Region(step=2, phase="forward")].components


@pytest.mark.gpu
def test_on_cuda_every_state_pages_and_the_training_is_the_same():
    ends = []
    for model in twins(r=384, targets=("gate_proj",)):
        model.to("cuda")
        if flat_factors(model) is not None:
            put_on(model)  # moved, the factors left their buffers
        groups = parameter_groups(model, 0.01)
        optimizer = connect(model, bnb.optim.AdamW(groups, lr=1e-2, optim_bits=8, is_paged=True))
        for _ in range(5):
            backward(model, IDS.cuda())
            clip_gradients(model, 1e9)
            optimizer.step()
            model.zero_grad()
        ends.append([p.detach().clone() for _, p in trainable(model)])
        pages = [getattr(state["state1"], "is_paged", False) for state in optimizer.state.values()]
        assert pages == ([True] if flat_factors(model) is not None else [False] * 4)
    assert equal(*ends)
