"""The whole lean step against the stock step: the same loss, the same gradients, the same curve."""

from __future__ import annotations

import copy
import dataclasses
import io

import pytest
import torch
from families import FAMILIES, save_tiny, tiny_model
from lean_cases import assert_within_stock_error, batch, exact_step, take_step, tiny_peft_model, with_factors
from rich.console import Console

from qlora_kit import build, data
from qlora_kit.adapters import inject
from qlora_kit.config.settings import LeanConfig, RunConfig
from qlora_kit.lean import flat, loss, mlp, offload
from qlora_kit.lean.apply import PIECES, make_lean
from qlora_kit.runs import messages

LEAN = LeanConfig(half_blocks="on").resolved("cpu")
CPU = torch.device("cpu")
STEPS = 50


def stock_and_lean(model, settings=LEAN):
    """`model` with stock checkpointing, and a copy of it with the lean step."""
    build.enable_checkpointing(model)
    lean = copy.deepcopy(model)
    make_lean(lean, settings)
    return model, lean


def compare(model, inputs, n_items=None):
    stock, lean = stock_and_lean(model)
    exact = exact_step(stock, inputs, n_items)
    assert_within_stock_error(take_step(lean, inputs, n_items), take_step(stock, inputs, n_items), exact)


def padded(inputs):
    """The same batch, its last row cut short: padding on the right."""
    tokens = inputs["input_ids"].shape[1]
    inputs = {name: tensor.clone() for name, tensor in inputs.items()}
    inputs["attention_mask"][-1, tokens // 2 :] = 0
    inputs["labels"][-1, tokens // 2 :] = -100
    return inputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_the_stock_step(family, dtype):
    compare(tiny_peft_model(family, dtype), padded(batch(3, 17)))


@pytest.mark.parametrize(("rows", "tokens"), [(8, 2), (1, 40), (5, 70)], ids=["shortest", "one row", "ragged chunk"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_whatever_the_shape(family, rows, tokens):
    compare(tiny_peft_model(family, torch.bfloat16), batch(rows, tokens, supervised=1.0))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_batch_without_a_supervised_token_teaches_nothing(family):
    _, lean = stock_and_lean(tiny_peft_model(family))
    for tokens in (1, 9):
        step = take_step(lean, batch(2, tokens, supervised=0.0), n_items=5)
        assert step.loss == 0
        assert not any(gradient.any() for gradient in step.gradients.values())


@pytest.mark.parametrize("settings", [{"rslora": True}, {"dora": True}, {"adapter_dtype": "fp32"}, {"r": 1}], ids=str)
def test_whatever_the_factors(settings):
    compare(with_factors(tiny_model("llama", dtype=torch.bfloat16), **settings), batch())


@pytest.fixture
def like_cuda(monkeypatch):
    """Tiles of a few tokens, chunks of a few rows, and checkpoints that travel: what CUDA does with long batches."""
    monkeypatch.setattr(mlp, "MIN_TILE_TOKENS", 8)
    monkeypatch.setattr(mlp, "WIDEST_BYTES", 1 << 12)
    monkeypatch.setattr(loss, "MAX_ROWS", 7)

    def offload_checkpoints(model):
        keeper = offload.Keeper(offload.Transport(CPU))
        for module in model.modules():
            if "_gradient_checkpointing_func" in vars(module):
                module._gradient_checkpointing_func = keeper.checkpoint

    return offload_checkpoints


@pytest.mark.parametrize("family", FAMILIES)
def test_all_pieces_at_work_together(family, like_cuda):
    """Two batches of different lengths accumulated, one of them padded, with everything on that a CUDA run has on."""
    stock, lean = stock_and_lean(tiny_peft_model(family, torch.bfloat16))
    like_cuda(lean)
    for inputs in (padded(batch(3, 21)), batch(2, 9)):
        exact = exact_step(stock, inputs, 31)
        assert_within_stock_error(take_step(lean, inputs, 31), take_step(stock, inputs, 31), exact)


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "opt", "gpt_neox"])
def test_packed_rows_are_those_of_the_mask(family, like_cuda):
    """fp64 but for the loss: the examples of a row, told by their boundaries or by the stock step's mask."""
    stock, lean = stock_and_lean(tiny_peft_model(family).double())
    like_cuda(lean)
    draw = torch.Generator().manual_seed(0)
    features = []
    for lengths in ((5, 9, 6), (12, 3)):
        ids = torch.randint(0, 256, (sum(lengths),), generator=draw).tolist()
        labels = [-100 if any(i == sum(lengths[:n]) for n in range(len(lengths))) else t for i, t in enumerate(ids)]
        features.append({"input_ids": ids, "labels": labels, "segment_lengths": list(lengths)})
    by_mask = take_step(stock, data.Collator(0, packed=True)(features))
    by_boundaries = take_step(lean, data.Collator(0, packed=True, varlen=True)(features))
    torch.testing.assert_close(by_boundaries.loss, by_mask.loss, rtol=1e-6, atol=0)  # fp32 inside both
    for name, gradient in by_mask.gradients.items():
        torch.testing.assert_close(by_boundaries.gradients[name], gradient, rtol=1e-5, atol=1e-8, msg=name)


def test_accumulated_gradients_are_those_of_the_stock_step():
    """fp64: what differs is the order of sums, and the loss in fp32."""
    stock, lean = stock_and_lean(tiny_peft_model("llama").double())
    batches = [padded(batch(2, tokens)) for tokens in (5, 16)]
    n_items = sum((b["labels"][:, 1:] != -100).sum() for b in batches)
    for model in (stock, lean):
        for inputs in batches:
            model(**inputs, num_items_in_batch=n_items).loss.backward()
    for (name, factor), (_, other) in zip(inject.trainable(stock), inject.trainable(lean), strict=True):
        torch.testing.assert_close(other.grad, factor.grad, rtol=1e-5, atol=1e-8, msg=name)


def curve(model, batches, factors=None):
    """The loss of each of `STEPS` steps of AdamW."""
    groups = flat.parameter_groups(model, factors, 0.0)
    optimizer = flat.connect(torch.optim.AdamW(groups, lr=5e-3, fused=True), factors)
    losses = []
    for step in range(STEPS):
        loss = model(**batches[step % len(batches)]).loss
        loss.backward()
        flat.clip_gradients(model, factors, 1.0)
        optimizer.step()
        model.zero_grad()
        losses.append(float(loss.detach()))
    return torch.tensor(losses, dtype=torch.float64)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_fifty_steps_give_the_same_curve(family):
    """The lean curve is no farther from the stock one than twice what bf16 takes the stock one from fp32's."""
    stock = tiny_peft_model(family, torch.bfloat16)
    build.enable_checkpointing(stock)
    exact, lean = copy.deepcopy(stock).float(), copy.deepcopy(stock)
    factors = flat.flat_factors(make_lean(lean, LEAN))
    assert factors is not None
    batches = [padded(batch(2, 12 + i)) for i in range(3)]
    exact_losses, stock_losses = (curve(model, batches) for model in (exact, stock))
    lean_losses = curve(lean, batches, factors)
    assert lean_losses[-1] < lean_losses[0]  # it learns
    error = (stock_losses - exact_losses).square().mean().sqrt()
    assert (lean_losses - stock_losses).square().mean().sqrt() <= 2 * error


@pytest.mark.parametrize("piece", PIECES, ids=lambda piece: piece.setting)
def test_every_piece_can_be_switched_off_alone(piece):
    default = getattr(LeanConfig(), piece.setting)
    settings = dataclasses.replace(LEAN, **{piece.setting: False if default is True else "off"})
    model = tiny_peft_model("llama")
    build.enable_checkpointing(model)
    outcomes = make_lean(model, settings)
    assert outcomes[piece.name].left == "switched off"
    assert take_step(model, batch()).loss.isfinite()


def test_lean_off_is_the_stock_model(tmp_path):
    folder = save_tiny(tmp_path / "base", "llama")
    config = RunConfig.from_flat({"model": str(folder), "bits": 4, "lean": "off"})
    built = build.build_model(config, CPU)
    model = built.model
    assert built.outcomes == {}
    assert {type(m).__module__.split(".")[0] for m in model.modules()} <= {
        "peft",
        "transformers",
        "torch",
        "bitsandbytes",
    }
    assert all("forward" not in vars(m) for m in model.modules())


def test_the_default_run_is_lean_and_says_what_it_did(tmp_path):
    folder = save_tiny(tmp_path / "base", "llama")
    outcomes = build.build_model(RunConfig.from_flat({"model": str(folder), "bits": 4}), CPU).outcomes
    assert list(outcomes) == [piece.name for piece in PIECES]
    assert outcomes["factors first"].done == "14 linear layers"
    text = io.StringIO()
    Console(file=text, width=120).print(messages.step_table(outcomes))
    for piece in PIECES:
        assert piece.name in text.getvalue()


def test_every_setting_of_the_group_has_its_piece():
    switches = {f.name for f in dataclasses.fields(LeanConfig)} - {"lean"}
    assert {piece.setting for piece in PIECES} == switches
