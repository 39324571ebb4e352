"""Attention row by row gives what attention gives, keeps only what it is given, and goes on with packed rows."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, tiny_model
from lean_cases import adapted, batch
from transformers import AttentionInterface, AutoConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qlora_kit.adapters import inject
from qlora_kit.config.settings import LeanConfig
from qlora_kit.lean import attention, varlen

DROPOUT = 0.3
SHAPE = (3, 4, 9, 8)  # rows, heads, positions, features


class Causal(torch.nn.Module):
    is_causal = True


def tensors(dtype=torch.float64, rows=SHAPE[0], positions=SHAPE[2]):
    draw = torch.Generator().manual_seed(0)
    shape = (rows, SHAPE[1], positions, SHAPE[3])
    return [torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype).requires_grad_() for _ in range(3)]


def naive(query, key, value, mask, dropout):
    """softmax(q·k/√D) with its dropout, times v, each row in turn; (B, T, H, D)."""
    rows = []
    for q, k, v in zip(query, key, value, strict=True):
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        open_TT = (
            torch.ones(scores.shape[-2:], dtype=torch.bool).tril() if mask is None else mask[len(rows) % len(mask)]
        )
        shares = scores.masked_fill(~open_TT, float("-inf")).softmax(-1)
        rows.append((torch.nn.functional.dropout(shares, dropout) @ v).transpose(0, 1))
    return torch.stack(rows)


@pytest.mark.parametrize("masked", ["no mask", "a mask for all", "a mask for each"])
def test_output_and_gradients_are_the_naive_ones(masked):
    mask = None
    if masked != "no mask":
        one = torch.ones(SHAPE[2], SHAPE[2], dtype=torch.bool).tril().triu(-3)[None, None]
        mask = one if masked == "a mask for all" else torch.cat([one, one.mT, one | one.mT])
    found = []
    for work in (naive, lambda q, k, v, m, p: attention.attend(Causal(), q, k, v, m, dropout=p)[0]):
        own = tensors()
        torch.manual_seed(7)
        out = work(*own, mask, DROPOUT)
        after = torch.rand(1)
        torch.manual_seed(99)  # the backward pass must not depend on the state it meets, nor change it
        out.backward(torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out))
        found.append([out, after, torch.rand(1), *(t.grad for t in own)])
    for expected, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    assert found[1][0].ne(0).any()


def kept_bytes(work):
    seen = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: seen.setdefault(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) and t, lambda t: t
    ):
        out = work()
    return sum(seen.values()), out


def test_nothing_but_the_inputs_is_kept():
    own = tensors(torch.bfloat16, positions=64)
    ours, _ = kept_bytes(lambda: attention.attend(Causal(), *own, None, dropout=DROPOUT)[0])
    stock, _ = kept_bytes(lambda: ALL_ATTENTION_FUNCTIONS["sdpa"](Causal(), *own, None, dropout=DROPOUT)[0])
    assert ours == sum(t.nbytes for t in own)
    assert stock > 3 * ours


@pytest.mark.parametrize("case", ["no dropout", "one row", "a bias"])
def test_what_needs_no_rows_is_left_to_sdpa(case, monkeypatch):
    monkeypatch.setattr(attention.ByRow, "apply", lambda *_: pytest.fail("row by row"))
    own = tensors(torch.float32, rows=1 if case == "one row" else 3)
    options = {"position_bias": torch.zeros(SHAPE[1], SHAPE[2], SHAPE[2])} if case == "a bias" else {}
    dropout = 0.0 if case == "no dropout" else DROPOUT
    outs = []
    for work in (attention.attend, ALL_ATTENTION_FUNCTIONS["sdpa"]):
        torch.manual_seed(7)
        outs.append(work(Causal(), *own, None, dropout=dropout, **options)[0])
    assert torch.equal(*outs)


@pytest.fixture
def with_dropout(monkeypatch):
    """GPT-2 with dropout in its attention only."""
    fields = {**FAMILIES["gpt2"]().to_dict(), "attn_pdrop": DROPOUT}
    monkeypatch.setitem(FAMILIES, "gpt2", lambda: AutoConfig.for_model(**fields))
    model = adapted("gpt2", torch.float64, checkpointing=True)
    for block in model.get_base_model().transformer.h:
        block.attn.attn_dropout.p = DROPOUT
    return model


def naive_attention(module, query, key, value, mask, dropout=0.0, **options):
    return naive(query, key, value, mask, dropout), None


def test_a_checkpointed_model_draws_the_same_forward_and_backward(with_dropout):
    """Beside attention that is computed, kept and differentiated plainly, row by row, without checkpoints."""
    AttentionInterface.register("naive", naive_attention)
    plain = adapted("gpt2", torch.float64)
    plain.get_base_model().set_attn_implementation("naive")
    for block in plain.get_base_model().transformer.h:
        block.attn.attn_dropout.p = DROPOUT
    assert attention.put_on(with_dropout).done == "attention row by row"
    inputs = {name: value for name, value in batch().items() if name != "attention_mask"}
    found = []
    for model in (plain, with_dropout):
        torch.manual_seed(5)
        model(**inputs, use_cache=False).loss.backward()
        found.append(torch.cat([p.grad.flatten() for _, p in inject.trainable(model)]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=1e-6)  # the loss is fp32


def test_packed_rows_go_on_by_example(with_dropout):
    attention.put_on(with_dropout)
    assert varlen.put_on(with_dropout).done
    assert varlen.is_on(with_dropout.config)
    inputs = batch()
    torch.manual_seed(5)
    both = with_dropout(**inputs, use_cache=False).loss
    with_dropout.get_base_model().set_attn_implementation(attention.NAME)
    torch.manual_seed(5)
    assert torch.equal(with_dropout(**inputs, use_cache=False).loss, both)


def test_models_without_use_for_it_are_left():
    assert attention.put_on(adapted("llama")).left == "no dropout in attention"
    eager = tiny_model("gpt2")
    eager.config.attn_pdrop = DROPOUT
    eager.set_attn_implementation("eager")
    assert attention.put_on(eager).left == "eager attention"


@pytest.mark.parametrize(("given", "device_type", "wanted"), [("auto", "cpu", "on"), ("auto", "cuda", "off")])
def test_it_is_for_cpus(given, device_type, wanted):
    assert LeanConfig(attention_by_row=given).resolved(device_type).attention_by_row == wanted
    assert LeanConfig(attention_by_row="on").resolved(device_type).attention_by_row == "on"


@pytest.mark.gpu
def test_a_gpu_is_left_alone():
    assert attention.put_on(tiny_model("gpt2").to("cuda")).left == "kernels for GPUs keep no scores"
