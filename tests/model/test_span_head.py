"""The head that points at an answer: plain fp32 on every kind of base, its loss, and what reaches it through PEFT."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from classifiers import DECODERS, KINDS, PAD_ID, save_base, tokenizer_of
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoModelForQuestionAnswering, AutoModelForSequenceClassification

from qlora_kit import build
from qlora_kit.adapters.files import load_adapter, save_adapter
from qlora_kit.adapters.inject import trainable
from qlora_kit.config.settings import AdapterConfig, BaseConfig, LeanConfig, OptimConfig, RunConfig
from qlora_kit.errors import UserError
from qlora_kit.lean import mask
from qlora_kit.memory.plan import plan
from qlora_kit.model.heads import head_names, put_loss_on
from qlora_kit.model.load import load_base
from qlora_kit.model.source import load_model_config
from qlora_kit.tasks.questions.task import TASK, span_logits, span_loss

WEIGHTS = "model.safetensors"
CPU = torch.device("cpu")
LABELS = torch.tensor([[0, 0], [2, 5], [7, 7]])
EPS = torch.finfo(torch.float32).eps


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Bases by kind, each written when it is first asked for."""
    root = tmp_path_factory.mktemp("bases")
    return lambda kind: root / kind if (root / kind).exists() else save_base(root / kind, kind)


def settings(folder, bits=4):
    return BaseConfig(model=str(folder), bits=bits, task=TASK.name)


def run_settings(folder, bits=32, lean="on"):
    return RunConfig(
        base=settings(folder, bits),
        adapter=AdapterConfig(r=4, adapter_dtype="fp32"),
        optim=OptimConfig(batch_size=3),
        lean=LeanConfig(lean=lean),
        preflight=False,
    )


def batch_of(kind, rows=3, tokens=12, padding=4):
    """Rows of which the first is padded on the right."""
    ids = torch.arange(rows * tokens).reshape(rows, tokens) * 7 % 250
    attention = torch.ones_like(ids)
    if padding:
        ids[0, -padding:], attention[0, -padding:] = 256 if kind in DECODERS else PAD_ID, 0
    return {"input_ids": ids, "attention_mask": attention}


def both(outputs):
    return torch.stack([outputs.start_logits, outputs.end_logits], 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [4, 8, 16, 32])
def test_the_head_is_plain_fp32_and_the_base_is_quantized(bases, kind, bits):
    model = load_base(settings(bases(kind), bits), CPU)
    assert head_names(model) == ["qa_outputs"]
    assert (type(model.qa_outputs), model.qa_outputs.weight.dtype) == (torch.nn.Linear, torch.float32)
    assert model.qa_outputs.weight.shape == (2, 64)
    quantized = [m for m in model.modules() if isinstance(m, (Linear4bit, Linear8bitLt))]
    assert bool(quantized) == (bits <= 8)
    with torch.no_grad():
        outputs = model(**batch_of(kind))
    assert outputs.start_logits.shape == (3, 12)
    assert both(outputs).isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_base_is_that_of_the_files(bases, kind):
    """Also where transformers names it otherwise in its class for this task, as in Llama's."""
    held = {(tuple(value.shape), value.numpy().tobytes()) for value in load_file(bases(kind) / WEIGHTS).values()}
    model = load_base(settings(bases(kind), 32), CPU)
    own = {name: p for name, p in model.named_parameters() if not name.startswith("qa_outputs.")}
    assert len(own) > 10
    assert {name for name, p in own.items() if (tuple(p.shape), p.numpy().tobytes()) not in held} == set()


def test_a_model_saved_for_other_labels_gets_two_outputs(bases, tmp_path):
    other = AutoModelForSequenceClassification.from_pretrained(bases("bert"), num_labels=5)
    other.save_pretrained(tmp_path)
    tokenizer_of("bert").save_pretrained(tmp_path)
    model = load_base(settings(tmp_path), CPU)
    assert model.qa_outputs.weight.shape == (2, 64)


def test_a_model_that_cannot_do_the_task_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "marian", "vocab_size": 320}))
    config = dataclasses.replace(settings(tmp_path), weights="random")
    with pytest.raises(UserError, match="a marian model has no head for question-answering"):
        load_model_config(config)


# ------------------------------------------------------------------------------------------------------- the loss


@pytest.mark.parametrize("kind", ["bert", "gpt2", "distilbert"])
def test_the_loss_is_that_of_transformers(bases, kind):
    """On rows without padding; over theirs each row keeps the loss that it has alone, which transformers' does not."""
    stock = AutoModelForQuestionAnswering.from_pretrained(bases(kind))
    ours = AutoModelForQuestionAnswering.from_pretrained(bases(kind))
    ours.load_state_dict(stock.state_dict())
    put_loss_on(ours.eval(), TASK.model)
    stock.eval()
    batch = batch_of(kind, padding=0)
    with torch.no_grad():
        expected = stock(**batch, start_positions=LABELS[:, 0], end_positions=LABELS[:, 1]).loss
        torch.testing.assert_close(ours(**batch, labels=LABELS).loss, expected)
        padded = batch_of(kind)
        alone = [
            stock(
                input_ids=ids[: int(seen.sum())][None],
                attention_mask=seen[: int(seen.sum())][None],
                start_positions=label[:1],
                end_positions=label[1:],
            ).loss
            for ids, seen, label in zip(padded["input_ids"], padded["attention_mask"], LABELS, strict=True)
        ]
        torch.testing.assert_close(ours(**padded, labels=LABELS).loss, sum(alone) / 3, rtol=1e-5, atol=1e-6)


def test_the_loss_is_the_naive_one():
    logits = torch.randn(3, 2, 9, generator=torch.Generator().manual_seed(3))
    labels = torch.tensor([[0, 0], [2, 5], [8, 8]])
    wide = logits.double()
    terms = [wide[b, k].logsumexp(0) - wide[b, k, labels[b, k]] for b in range(3) for k in range(2)]
    found, expected = span_loss(logits, labels, 6), sum(terms) / 6
    assert abs(float(found) - float(expected)) <= 6 * 9 * EPS * float(expected)


def test_padding_gets_no_probability():
    outputs = type("O", (), {"start_logits": torch.tensor([[1.0, 9.0]]), "end_logits": torch.tensor([[2.0, 9.0]])})()
    assert span_logits(outputs, torch.tensor([[1, 0]])).softmax(2).tolist() == [[[1.0, 0.0], [1.0, 0.0]]]
    assert span_logits(outputs, None).tolist() == [[[1.0, 9.0], [2.0, 9.0]]]


@pytest.mark.parametrize("kind", ["bert", "gpt2", "t5", "llama"])
@pytest.mark.parametrize("lean", ["on", "off"])
def test_parts_of_a_batch_add_up_to_the_whole(bases, kind, lean):
    """What the Trainer does in gradient accumulation, with less padding in one part than in the other."""
    model = build.build_model(run_settings(bases(kind), lean=lean), CPU).model.train()
    assert not mask.is_on(model)
    batch = batch_of(kind)
    whole = model(**batch, labels=LABELS, num_items_in_batch=6)
    short = {name: value[:1, :8] for name, value in batch.items()}
    rest = {name: value[1:] for name, value in batch.items()}
    parts = [
        model(**own, labels=labels, num_items_in_batch=torch.tensor(6)).loss
        for own, labels in ((short, LABELS[:1]), (rest, LABELS[1:]))
    ]
    torch.testing.assert_close(sum(parts), whole.loss, rtol=1e-5, atol=1e-6)
    logits = span_logits(whole, batch["attention_mask"])
    torch.testing.assert_close(whole.loss, functional.cross_entropy(logits.transpose(1, 2), LABELS))


@pytest.mark.parametrize("kind", KINDS)
def test_the_lean_step_computes_what_the_stock_step_does(bases, kind):
    """Loss and gradients in fp32, of padded rows: what differs is the order of the same operations."""
    found = {}
    for lean in ("on", "off"):
        model = build.build_model(run_settings(bases(kind), lean=lean), CPU).model.train()
        with torch.no_grad():
            for number, (name, parameter) in enumerate(trainable(model)):
                draw = torch.Generator().manual_seed(number)
                parameter += 0.05 * torch.randn(parameter.shape, generator=draw) * ("lora_" in name)
        loss = model(**batch_of(kind), labels=LABELS).loss
        loss.backward()
        found[lean] = loss, {name: p.grad for name, p in trainable(model)}
    rounding = 128 * EPS  # sums of as many terms as a layer has features
    torch.testing.assert_close(found["on"][0], found["off"][0], rtol=rounding, atol=0)
    largest = max(gradient.norm() for gradient in found["off"][1].values())
    for name, gradient in found["off"][1].items():
        assert (found["on"][1][name] - gradient).norm() <= rounding * (gradient.norm() + 0.01 * largest), name


# ------------------------------------------------------------------------------------------------------------ PEFT


def test_token_types_reach_the_base_through_peft(bases, tmp_path):
    """PEFT's own forward for this task drops them, in training and when an adapter is loaded."""
    model = build.build_model(run_settings(bases("bert")), CPU).model.eval()
    batch = {**batch_of("bert"), "token_type_ids": (torch.arange(12) > 5).long().expand(3, 12)}
    plain = model.get_base_model()
    with torch.no_grad():
        assert torch.equal(both(model(**batch)), both(plain(**batch)))
        assert not torch.equal(both(model(**batch)), both(model(**batch_of("bert"))))
        save_adapter(model, tmp_path, trained=False)
        loaded = load_adapter(load_base(settings(bases("bert"), 32), CPU), tmp_path).eval()
        torch.testing.assert_close(both(loaded(**batch)), both(model(**batch)))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_can_be_planned(bases, kind):
    config = dataclasses.replace(run_settings(bases(kind), bits=4), optim=OptimConfig(batch_size=2))
    found = plan(config)
    assert {"forward", "loss", "backward", "optimizer"} <= set(found.phases)
    assert sum(found.components.values()) == found.peak_bytes
