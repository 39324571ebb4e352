"""The MLP tile by tile computes what it does whole, once more in the backward pass and not twice, in less memory."""

from __future__ import annotations

import functools
import gc
import inspect
import weakref
from unittest import mock

import bitsandbytes as bnb
import pytest
import torch
from families import FAMILIES, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from lean_cases import adapted
from memory_cases import settings as run_settings
from memory_cases import small_config
from transformers import AutoConfig, AutoModelForCausalLM

from qlora_kit import build
from qlora_kit.adapters import inject
from qlora_kit.config.settings import AdapterConfig
from qlora_kit.lean import linear, mlp
from qlora_kit.lean.piece import is_output_unread
from qlora_kit.memory.kernels import stand_ins
from qlora_kit.memory.track import MemoryTracker, overall_peak

WITH_MLP = [family for family in FAMILIES if family != "opt"]
TILE = 8
SIZES = {name: getattr(mlp, name) for name in ("MIN_TILE_TOKENS", "WIDEST_BYTES")}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles of 8 tokens, whatever a token takes."""
    monkeypatch.setattr(mlp, "MIN_TILE_TOKENS", TILE)
    monkeypatch.setattr(mlp, "WIDEST_BYTES", 1)


def tiled(model):
    assert mlp.put_on(model).done.startswith("2 MLPs")
    return model


def ids(rows, positions):
    return torch.randint(0, 320, (rows, positions), generator=torch.Generator().manual_seed(2))


def loss_and_gradients(model, tokens, seed=3):
    torch.manual_seed(seed)
    loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    return torch.cat([loss.detach().reshape(1), *(p.grad.flatten() for _, p in inject.trainable(model))]).double()


@functools.cache
def exact_step(family, dropout=0.0):
    """In fp64, whatever the step; on a CPU it draws the same numbers for a dropout as the others."""
    return loss_and_gradients(adapted(family, torch.float64, dropout=dropout), ids(2, 19))


def assert_as_close_as_stock(lean, stock, exact):
    """Two results with the stock step's error each are at most twice that error apart."""
    assert not torch.equal(stock, exact)
    assert (lean - stock).norm() <= 2 * (stock - exact).norm()


# ------------------------------------------------------------------------------------------------------ exactness


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", WITH_MLP)
def test_loss_and_gradients_are_the_stock_steps(family, dtype, checkpointing):
    tokens = ids(2, 19)  # 38 tokens: 16, 16 and 6
    stock = loss_and_gradients(adapted(family, dtype, checkpointing=checkpointing), tokens)
    lean = loss_and_gradients(tiled(adapted(family, dtype, checkpointing=checkpointing)), tokens)
    assert_as_close_as_stock(lean, stock, exact_step(family))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
def test_the_dropout_at_the_end_draws_what_the_stock_step_draws(dtype, checkpointing):
    tokens = ids(2, 19)
    stock, lean = (adapted("gpt2", dtype, dropout=0.3, checkpointing=checkpointing) for _ in range(2))
    stock, lean = loss_and_gradients(stock, tokens), loss_and_gradients(tiled(lean), tokens)
    assert_as_close_as_stock(lean, stock, exact_step("gpt2", 0.3))


@settings(max_examples=10, deadline=None)
@given(rows=st.integers(1, 5), positions=st.integers(1, 13), wants_x=st.booleans(), flat=st.booleans())
def test_any_number_of_tokens(rows, positions, wants_x, flat):
    """A layer of its own, (rows, positions, D) or (rows × positions, D), whose input may not want a gradient."""
    shape = (rows * positions, 64) if flat else (rows, positions, 64)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(rows), dtype=torch.float64)
    results = []
    for lean in (False, True):
        model = adapted("llama", torch.float64)
        layer = (tiled(model) if lean else model).base_model.model.model.layers[0].mlp
        leaf = x.clone().requires_grad_(wants_x)
        y = layer(leaf)
        (y * x.cos()).sum().backward()
        gradients = [p.grad for p in layer.parameters() if p.requires_grad]
        results.append([y.detach(), *gradients, *([leaf.grad] if wants_x else [])])
    for ours, stock in zip(*results, strict=True):
        torch.testing.assert_close(ours, stock)


def test_without_gradients_too():
    stock, lean = adapted("llama").eval(), tiled(adapted("llama")).eval()
    with torch.no_grad():
        torch.testing.assert_close(lean(ids(2, 19)).logits, stock(ids(2, 19)).logits)
        torch.testing.assert_close(lean(ids(1, 1)).logits, stock(ids(1, 1)).logits)


def test_autocast_is_the_same_in_the_backward_pass():
    """fp32 weights under bf16 autocast, whose casts the backward pass must make as well."""
    tokens = ids(2, 19)
    results = []
    for model in (adapted("llama"), tiled(adapted("llama"))):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        gradients = [p.grad.flatten() for _, p in inject.trainable(model)]
        results.append(torch.cat([loss.detach().reshape(1), *gradients]).double())
    assert_as_close_as_stock(results[1], results[0], exact_step("llama"))


def four_bit_step(lean, dtype=torch.bfloat16):
    """A step on real 4-bit weights; all that is computed with them is in `dtype`."""
    architecture = small_config("llama")
    model = build.build_model(run_settings(bits=4, lean="off"), torch.device("cpu"), architecture).model.train()
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.compute_dtype = dtype
    draw = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=draw).mul(0.05).bfloat16().to(dtype)
    return loss_and_gradients(tiled(model) if lean else model, ids(2, 19))


def test_on_four_bits():
    stock, lean, exact = four_bit_step(False), four_bit_step(True), four_bit_step(False, torch.float32)
    assert_as_close_as_stock(lean, stock, exact)


def test_the_output_may_be_changed_in_place():
    layer = tiled(adapted("llama")).base_model.model.model.layers[0].mlp
    y = layer(torch.ones(2, 19, 64, requires_grad=True))
    y += 1
    y.sum().backward()


# --------------------------------------------------------------------------------------------------- what is left


def test_models_without_an_mlp_of_their_own_are_left():
    outcome = mlp.put_on(adapted("opt"))
    assert outcome.done == ""
    assert outcome.left.startswith("no MLP")


def test_dropout_inside_is_left():
    model = inject.inject(tiny_model("llama"), AdapterConfig(r=4, dropout=0.1))
    outcome = mlp.put_on(model)
    assert outcome.done == ""
    assert outcome.left == "2 MLPs: a dropout inside draws for all tokens at once"


def test_eight_bits_with_outliers_are_left():
    model = build.build_model(run_settings(bits=8, lean="off"), torch.device("meta"), small_config("llama")).model
    outcome = mlp.put_on(model)
    assert outcome.done == ""
    assert outcome.left.startswith("2 MLPs: 8 bits")


# ------------------------------------------------------------------------------------------------ work and memory


@pytest.mark.parametrize(
    ("family", "dropout"), [("gpt2", 0.0), ("gpt2", 0.1), ("gpt_neox", 0.0), ("llama", 0.0), ("phi", 0.0)]
)
def test_a_checkpoint_does_not_run_the_mlp_once_more(family, dropout):
    """Once in the forward pass and once, tile by tile, in the backward pass."""
    model = tiled(adapted(family, dropout=dropout, checkpointing=True))
    tokens_seen = []
    for name, module in model.named_modules():
        if name.endswith(("mlp.gate_proj", "mlp.c_fc", "mlp.dense_h_to_4h", "mlp.fc1")):
            module.register_forward_hook(lambda m, args, y: tokens_seen.append(y.shape[:-1].numel()))
    loss = model(input_ids=ids(2, 19), labels=ids(2, 19), use_cache=False).loss
    assert sum(tokens_seen) == 2 * 38  # two layers
    assert max(tokens_seen) == TILE
    loss.backward()
    assert sum(tokens_seen) == 4 * 38


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama", "phi"])
def test_the_last_layer_knows_that_a_tile_is_computed_anew_for_its_graph_only(family):
    model = tiled(adapted(family, checkpointing=True))
    unread = []
    for name, module in model.named_modules():
        if name.endswith(("mlp.down_proj", "mlp.c_proj", "mlp.dense_4h_to_h", "mlp.fc2")):
            module.register_forward_hook(lambda m, args, y: unread.append(is_output_unread(m)))
    loss = model(input_ids=ids(2, 19), labels=ids(2, 19), use_cache=False).loss
    assert unread == [False] * 10  # five tiles in each of two layers
    loss.backward()
    assert unread == [False] * 10 + [True] * 10
    assert not any(is_output_unread(module) for module in model.modules())


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama", "phi"])
def test_layers_that_run_their_factors_first_leave_the_last_product_out(family, monkeypatch):
    """As under a checkpoint alone. (The forward pass of a tile, without gradients, calls the base itself.)"""
    plain, model = adapted(family, checkpointing=True), adapted(family, checkpointing=True)
    seen, product = [], linear.add_frozen_product
    for lean in (plain, model):
        linear.put_on(lean)
    last = {m.base_layer for n, m in model.named_modules() if n.endswith(tuple(f"mlp.{n}" for n in mlp.LAST.values()))}

    def counted(branch, x, base):
        seen.append(base)
        product(branch, x, base)

    monkeypatch.setattr(linear, "add_frozen_product", counted)
    ours = loss_and_gradients(tiled(model), ids(2, 19))
    assert len(last) == 2
    assert seen
    assert not last & set(seen)
    torch.testing.assert_close(ours, loss_and_gradients(plain, ids(2, 19)), atol=1e-5, rtol=1e-4)


def test_the_peak_falls_by_the_number_of_tiles():
    peaks = {n_tiles: peak_bytes(n_tiles, n_tokens=1024) for n_tiles in (1, 2, 4, 8)}
    assert peaks[1] > 100 * 1024 * 128 * 2, "the wide activations are most of it"
    for n_tiles in (2, 4, 8):
        fixed = 2 * 8192 * 128 + 4 * 2 * 1024 * 128  # a dequantized weight; input, output and their gradients
        assert peaks[n_tiles] - fixed == pytest.approx((peaks[1] - fixed) / n_tiles, rel=0.1)


def peak_bytes(n_tiles, n_tokens):
    """The most bytes that the forward and the backward pass of a wide 4-bit MLP take on `meta`."""
    architecture = small_config("llama")
    architecture.intermediate_size = 8192
    model = build.build_model(run_settings(bits=4, r=1, lean="off"), torch.device("meta"), architecture).model.train()
    x = torch.empty(1, n_tokens, 128, dtype=torch.bfloat16, device="meta", requires_grad=True)
    tile_bytes = n_tokens // n_tiles * 8192 * 2
    with mock.patch.object(mlp, "WIDEST_BYTES", tile_bytes), MemoryTracker("meta", stand_ins=stand_ins()) as tracker:
        y = tiled(model).base_model.model.model.layers[0].mlp(x)
        y.backward(torch.empty_like(y))
    return overall_peak(tracker.events).n_bytes


def test_the_model_is_freed_at_once_when_it_goes():
    gc.collect()
    gc.disable()
    try:
        model = tiled(adapted("llama"))
        loss_and_gradients(model, ids(2, 19))
        gone = weakref.ref(model.base_model.model.model.layers[0].mlp)
        del model
        assert gone() is None
    finally:
        gc.enable()


@settings(max_examples=30, deadline=None)
@given(n_tokens=st.integers(1, 10**6), bytes_per_token=st.integers(1, 10**6))
def test_tiles_are_bounded_and_never_smaller_for_more_tokens(n_tokens, bytes_per_token):
    with mock.patch.multiple(mlp, **SIZES):
        tile, next_tile = (mlp.tile_tokens(n, bytes_per_token) for n in (n_tokens, n_tokens + 1))
    assert tile <= next_tile
    assert tile * bytes_per_token <= max(SIZES["WIDEST_BYTES"], 1024 * bytes_per_token)
    if tile < n_tokens:
        assert tile >= 1024
        assert tile % 256 == 0
        assert 2 * tile * bytes_per_token > SIZES["WIDEST_BYTES"], "no smaller than need be"


KINDS = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "granite", "cohere", "cohere2", "olmo",
         "olmo2", "smollm3", "helium", "phi3", "glm", "glm4", "gpt2", "gpt_neox", "phi")  # fmt: skip


def mlps_of(model_type, **fields):
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 16,
    }
    sizes |= {"vocab_size": 64, "num_key_value_heads": 2, "pad_token_id": None, **fields}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes))
    return model, [m for m in model.modules() if type(m).__name__.lower().endswith("mlp")]


def test_every_class_that_is_known_is_tested():
    tested = {type(m).__name__ for kind in KINDS for m in mlps_of(kind)[1]}
    assert tested == set(mlp.LAST)


@pytest.mark.parametrize("kind", KINDS)
def test_a_known_class_computes_what_it_did(kind, monkeypatch):
    monkeypatch.setattr(mlp, "MIN_TILE_TOKENS", 4)
    monkeypatch.setattr(mlp, "WIDEST_BYTES", 1)
    model, [one] = mlps_of(kind)
    assert "dropout(" not in inspect.getsource(type(one).forward).replace("self.dropout(", "")  # none without a module
    x = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0))
    expected = one.eval()(x)
    assert mlp.put_on(model).done
    torch.testing.assert_close(one(x), expected)


@pytest.mark.parametrize(("kind", "fields"), [("falcon_h1", {"mamba_d_ssm": 32, "mamba_n_heads": 2}), ("seed_oss", {})])
def test_a_class_that_does_more_is_left(kind, fields):
    """Of the same layers, but with factors or a dropout in between."""
    model, mlps = mlps_of(kind, **fields)
    assert mlps
    assert "is not known" in mlp.put_on(model).left
