"""Packed rows attended example by example: what the mask gives, and what each example gives on its own."""

from __future__ import annotations

import functools
from dataclasses import fields

import pytest
import torch
from families import FAMILIES, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from lean_cases import adapted
from memory_cases import settings as run_settings
from memory_cases import small_config
from transformers import AutoConfig

from qlora_kit.adapters import inject
from qlora_kit.data import Collator, pack, prepare_tokenizer
from qlora_kit.data.audit import AuditReport
from qlora_kit.data.encode import Encoded, EncodedSet
from qlora_kit.lean import apply, varlen
from qlora_kit.lean.apply import Piece
from qlora_kit.memory import rules, simulate
from qlora_kit.memory.track import overall_peak
from qlora_kit.model import sdpa
from qlora_kit.runs import inputs
from qlora_kit.tasks.registry import task_named

BY_EXAMPLE = [family for family in FAMILIES if family != "gemma2"]
PAD, ROW = 7, 40
LENGTHS = (16, 13, 9, 8, 5, 2, 2)
NO_REPORT = AuditReport(**{field.name: 0 for field in fields(AuditReport)})


def examples(lengths, seed=0):
    """Examples of random tokens; all but the first of each are supervised."""
    draw = torch.Generator().manual_seed(seed)
    rows = []
    for number, length in enumerate(lengths):
        ids = torch.randint(0, 300, (length,), generator=draw).tolist()
        rows.append(
            Encoded(
                input_ids=ids,
                supervised=[place > 0 for place in range(length)],
                truncated=False,
                origin=f"f:{number}",
                full_tokens=length,
            )
        )
    return EncodedSet(rows, NO_REPORT)


def packed_batch(lengths, **options):
    packed = pack(examples(lengths), max(ROW, *lengths))
    return Collator(PAD, packed=True, **options)([packed[index] for index in range(len(packed))])


def by_example(model):
    assert varlen.put_on(model).done == "packed rows attend example by example"
    return model


def loss_and_gradients(model, batch):
    model.zero_grad()
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    return torch.cat([loss.detach().reshape(1), *(p.grad.flatten() for _, p in inject.trainable(model))]).double()


def each_alone(model, lengths):
    """The mean over the supervised tokens of all examples, each run on its own."""
    rows = examples(lengths).rows
    n_supervised = sum(len(row.input_ids) - 1 for row in rows)
    total = 0.0
    for row in rows:
        ids = torch.tensor([row.input_ids])
        total = total + loss_and_gradients(model, {"input_ids": ids, "labels": ids}) * (ids.numel() - 1)
    return total / n_supervised


@functools.cache
def exact_step(family):
    """Each example on its own, in fp64."""
    return each_alone(adapted(family, torch.float64), LENGTHS)


# ------------------------------------------------------------------------------------------------------ exactness


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", BY_EXAMPLE)
def test_loss_and_gradients_are_those_of_the_mask(family, dtype, checkpointing):
    masked = loss_and_gradients(adapted(family, dtype), packed_batch(LENGTHS))
    lean = by_example(adapted(family, dtype, checkpointing=checkpointing))
    ours = loss_and_gradients(lean, packed_batch(LENGTHS, varlen=True))
    error = (masked - exact_step(family)).norm()
    assert error > 0
    assert (ours - masked).norm() <= 2 * error  # two results with that error each


@settings(max_examples=10, deadline=None)
@given(lengths=st.lists(st.integers(2, 24), min_size=1, max_size=8), family=st.sampled_from(["llama", "gpt2"]))
def test_any_lengths_give_what_the_examples_give_alone(lengths, family):
    model = adapted(family, torch.float64)
    alone = each_alone(model, lengths)
    ours = loss_and_gradients(by_example(model), packed_batch(lengths, varlen=True))
    torch.testing.assert_close(ours, alone, atol=1e-5, rtol=1e-4)  # norms and positions are fp32 whatever the dtype


WINDOWS = {
    "mistral": {"sliding_window": 5},
    "qwen2": {"sliding_window": 5, "use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"]},
    "qwen3": {"sliding_window": 5, "use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention"]},
}


@pytest.mark.parametrize("family", WINDOWS)
def test_a_window_shorter_than_an_example_stays(family, monkeypatch):
    """With the mask such rows are refused; on its own, an example has transformers' own mask with the window."""
    wide = exact_step(family)
    settings = {**FAMILIES[family]().to_dict(), **WINDOWS[family]}
    monkeypatch.setitem(FAMILIES, family, lambda: AutoConfig.for_model(**settings))
    exact = each_alone(adapted(family, torch.float64), LENGTHS)
    ours = loss_and_gradients(by_example(adapted(family, torch.float64)), packed_batch(LENGTHS, varlen=True))
    assert (exact - wide).norm() > 1e-3, "the window is felt"
    torch.testing.assert_close(ours, exact, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", BY_EXAMPLE)
def test_other_batches_are_attended_as_before(family):
    """Rows padded on the right with labels, and prompts padded on the left to be answered, to the bit."""
    stock, lean = adapted(family).eval(), by_example(adapted(family)).eval()
    batch = Collator(PAD)([examples(LENGTHS)[index] for index in range(len(LENGTHS))])
    assert torch.equal(loss_and_gradients(lean, batch), loss_and_gradients(stock, batch))
    prompt = {name: batch[name].flip(1) for name in ("input_ids", "attention_mask")}
    answers = [m.generate(**prompt, max_new_tokens=4, do_sample=False, pad_token_id=PAD) for m in (stock, lean)]
    assert torch.equal(*answers)


# --------------------------------------------------------------------------------------------- boundaries and batch


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=20))
def test_the_batch_says_where_examples_are(lengths):
    lean, masked = (packed_batch(lengths, **options) for options in ({"varlen": True}, {}))
    assert all(torch.equal(lean[name], masked[name]) for name in ("input_ids", "labels", "position_ids"))
    rows, tokens = lean["input_ids"].shape
    assert lean["attention_mask"].shape == (rows, 1, 0, 0)
    places = list(varlen._places(lean["segment_lengths"], tokens))
    assert lean["segment_starts"].tolist() == [row * tokens + start for row, start, _ in places] + [rows * tokens]
    assert lean["segment_starts"].dtype == torch.int32
    seen = torch.zeros(rows, 1, tokens, tokens, dtype=torch.bool)
    for row, start, length in places:
        seen[row, 0, start : start + length, start : start + length] = True
    assert torch.equal(seen.tril(), masked["attention_mask"])


def test_an_attention_without_segments_fails_rather_than_look_across_examples():
    with pytest.raises(RuntimeError, match="size"):
        adapted("llama")(**packed_batch(LENGTHS, varlen=True))


@pytest.mark.parametrize(("family", "varlen_wanted"), [("llama", True), ("gemma2", False)])
def test_the_collator_of_a_run_fits_its_model(family, varlen_wanted):
    model = adapted(family)
    varlen.put_on(model)
    rows = pack(examples([9, 5, 3]), 16)
    tokenizer = prepare_tokenizer(tiny_tokenizer())
    settings = run_settings(pack=True)
    report = NO_REPORT
    given = inputs.Inputs(
        config=settings,
        task=task_named(None),
        tokenizer=tokenizer,
        train=rows,
        evaluation=None,
        held_out=[],
        seq_len=16,
        report=report,
        plain_text=False,
    )
    batch = inputs.make_collator(model, given)([rows[index] for index in range(len(rows))])
    assert ("segment_starts" in batch) == varlen_wanted
    assert torch.isfinite(model(**batch).loss)


# --------------------------------------------------------------------------------------------------- what is left


def test_soft_capped_scores_are_left():
    outcome = varlen.put_on(adapted("gemma2"))
    assert outcome.done == ""
    assert outcome.left == "packed rows get a mask: eager attention"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"is_causal": False}, "causal"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "layers of other kinds"),
        ({"model_type": "other", "sliding_window": 8}, "sliding window"),
    ],
)
def test_models_that_look_otherwise_are_left(changes, reason):
    model = adapted("llama")
    for name, value in changes.items():
        object.__setattr__(model.config, name, value)
    assert reason in varlen.put_on(model).left


# ------------------------------------------------------------------------------------------------------- in a plan


def recorded(monkeypatch, lean, capability=(8, 0), example_tokens=256):
    """Two steps with packed rows of 1024 tokens on `meta`."""
    piece = Piece(name="varlen", put_on=varlen.put_on, setting="varlen")
    monkeypatch.setattr(apply, "PIECES", (piece,) if lean else ())
    monkeypatch.setattr(simulate, "PACKED_EXAMPLE_TOKENS", example_tokens)
    config = run_settings(pack=True, batch_size=2, bits=4)
    architecture = small_config("llama")
    architecture.max_position_embeddings = 1024
    return simulate.simulate(
        config, simulate.Simulation(seq_len=1024, optim="adamw", capability=capability), architecture
    )


def test_a_plan_has_no_mask_and_the_kernels_buffers(monkeypatch):
    mask_bytes = 2 * 1024 * 1024  # bool
    stock, lean = recorded(monkeypatch, False), recorded(monkeypatch, True)
    assert lean.attention == varlen.NAMES[sdpa.NAME]  # its keys are grouped
    assert mask_bytes in {e.storage.n_bytes for e in stock.events if e.storage.category == "inputs"}
    assert mask_bytes not in {e.storage.n_bytes for e in lean.events if e.storage.category == "inputs"}
    assert overall_peak(lean.events).n_bytes < overall_peak(stock.events).n_bytes


def test_a_plan_counts_128_rows_more_for_each_example(monkeypatch):
    wide, row = rules.flash_varlen_backward_bytes((2048, 4, 32), (2048, 2, 32), 8, 2)[:2]
    assert (wide, row) == (4 * (2048 + 8 * 128) * 4 * 32, 4 * (2048 + 8 * 128) * 4)
    for example_tokens, segments in ((256, 8), (64, 32)):
        record = recorded(monkeypatch, True, example_tokens=example_tokens)
        wanted = rules.flash_varlen_backward_bytes((2048, 4, 32), (2048, 2, 32), segments, 2)[0]
        assert wanted in {e.change_bytes for e in record.events if e.storage.category == "workspaces"}


def test_a_gpu_without_flash_attention_is_planned_segment_by_segment(monkeypatch):
    record = recorded(monkeypatch, True, capability=(7, 5))
    operations = {e.storage.operation for e in record.events}
    assert any("_scaled_dot_product_efficient_attention" in name for name in operations)
    assert not any("flash" in name for name in operations)


# ------------------------------------------------------------------------------------------------------- on a GPU


def attention_inputs(device, dtype, width=64, heads=4, groups=2):
    draw = torch.Generator().manual_seed(0)
    shapes = [(2, heads, 48, width), *[(2, heads // groups, 48, width)] * 2]
    tensors = [torch.randn(shape, generator=draw).to(device, dtype).requires_grad_() for shape in shapes]
    lengths = [20, 1, 27, 33, 15]
    starts = torch.tensor([0, 20, 21, 48, 81, 96], dtype=torch.int32, device=device)
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = groups, True
    return module, tensors, lengths, starts


def test_one_call_of_the_kernel_has_the_shapes_of_the_segments_one_by_one():
    """On `meta`; the arguments are those of this torch's operator, or it would refuse them."""
    module, tensors, lengths, starts = attention_inputs("meta", torch.bfloat16)
    for window in (None, 8):
        out = varlen.attend_at_once(module, *tensors, lengths, starts, scaling=0.1, sliding_window=window)
        assert out.shape == (2, 48, 4, 64)
        gradients = torch.autograd.grad(out, tensors, torch.empty_like(out))
        assert [g.shape for g in gradients] == [t.shape for t in tensors]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("window", [None, 8])
def test_one_call_of_the_kernel_gives_what_the_segments_give_one_by_one(window, dtype):
    results = []
    for device, kind, way in (
        ("cuda", dtype, varlen.attend_at_once),
        ("cuda", dtype, varlen.attend_one_by_one),
        ("cpu", torch.float64, varlen.attend_one_by_one),
    ):
        module, tensors, lengths, starts = attention_inputs("cpu", dtype)
        tensors = [t.detach().to(device, kind).requires_grad_() for t in tensors]
        out = way(module, *tensors, lengths, starts.to(device), scaling=0.1, sliding_window=window)
        gradients = torch.autograd.grad((out * out.detach().cos()).sum(), tensors)
        results.append([t.detach().cpu().double() for t in (out, *gradients)])
    for at_once, one_by_one, exact in zip(*results, strict=True):
        assert (at_once - exact).norm() <= 2 * (one_by_one - exact).norm()
