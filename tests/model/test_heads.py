"""The head that a task puts on a base: fp32, never quantized, drawn by the seed, trained and saved in full."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from classifiers import BOTH, DECODERS, ENCODERS, KINDS, PAD_ID, architecture, save_base, tokenizer_of
from peft import AutoPeftModelForSequenceClassification, PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional
from transformers import AutoModelForSequenceClassification

from qlora_kit import build
from qlora_kit.adapters.files import load_adapter, save_adapter
from qlora_kit.adapters.inject import check_first_gradients, inject, trainable
from qlora_kit.config.settings import AdapterConfig, BaseConfig, LeanConfig, OptimConfig, RunConfig
from qlora_kit.errors import UserError
from qlora_kit.model.heads import head_names, put_loss_on, set_weights
from qlora_kit.model.load import load_base
from qlora_kit.model.source import load_model_config
from qlora_kit.tasks.classification.task import TASK
from qlora_kit.tasks.losses import classification_loss

CPU = torch.device("cpu")
LABELS = ("no", "maybe", "yes")


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Bases by kind, each written when it is first asked for."""
    root = tmp_path_factory.mktemp("bases")
    return lambda kind: root / kind if (root / kind).exists() else save_base(root / kind, kind)


def settings(folder, bits=4, **others):
    return BaseConfig(model=str(folder), bits=bits, task=TASK.name, labels=LABELS, **others)


def batch_of(kind, rows=3, tokens=12):
    """Rows padded on the right, each with one end-of-text token where the kind has one."""
    ids = torch.arange(rows * tokens).reshape(rows, tokens) * 7 % 250
    mask = torch.ones_like(ids)
    pad = PAD_ID if kind not in DECODERS else 256
    if kind not in DECODERS:
        ids[:, -1] = 257
    ids[0, -4:], mask[0, -4:] = pad, 0
    if kind not in DECODERS:
        ids[0, -5] = 257
    return {"input_ids": ids, "attention_mask": mask}


def run_settings(folder, bits=4, **others):
    return RunConfig(
        base=settings(folder, bits),
        adapter=AdapterConfig(r=4, adapter_dtype="bf16"),
        optim=OptimConfig(batch_size=3),
        preflight=False,
        **others,
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [4, 8, 16, 32])
def test_the_head_is_plain_fp32_and_the_base_is_quantized(bases, kind, bits):
    model = load_base(settings(bases(kind), bits), CPU)
    heads = head_names(model)
    assert heads
    quantized = [m for m in model.modules() if isinstance(m, (Linear4bit, Linear8bitLt))]
    assert bool(quantized) == (bits <= 8)
    for name in heads:
        for module in model.get_submodule(name).modules():
            assert not isinstance(module, (Linear4bit, Linear8bitLt))
        assert {p.dtype for p in model.get_submodule(name).parameters()} == {torch.float32}
    assert model.config.id2label == dict(enumerate(LABELS))
    assert model.config.pad_token_id == (256 if kind in DECODERS else PAD_ID)
    with torch.no_grad():
        logits = model(**batch_of(kind)).logits
    assert logits.shape == (3, 3)
    assert logits.dtype == torch.float32
    assert logits.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_meta_has_the_structure_of_the_real_one(bases, kind):
    real = load_base(settings(bases(kind)), CPU)
    meta = load_base(settings(bases(kind)), torch.device("meta"))
    assert {n: (tuple(p.shape), p.dtype) for n, p in real.named_parameters()} == {
        n: (tuple(p.shape), p.dtype) for n, p in meta.named_parameters()
    }


def head_of(model):
    return {name: p for name, p in model.named_parameters() if any(name.startswith(h) for h in head_names(model))}


def test_the_seed_draws_the_head_whatever_was_drawn_before(bases):
    torch.manual_seed(1)
    one = head_of(load_base(settings(bases("roberta")), CPU, seed=5))
    torch.manual_seed(2)
    state = torch.get_rng_state()
    same = head_of(load_base(settings(bases("roberta"), bits=16), CPU, seed=5))
    other = head_of(load_base(settings(bases("roberta")), CPU, seed=6))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["classifier.dense.weight"], other["classifier.dense.weight"])
    assert one["classifier.dense.weight"].std() > 0
    del state


def test_a_head_in_the_files_is_kept_and_one_for_other_labels_is_not(bases, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(bases("bert"), num_labels=3)
    model.save_pretrained(tmp_path / "own")
    tokenizer_of("bert").save_pretrained(tmp_path / "own")
    kept = load_base(settings(tmp_path / "own"), CPU)
    assert torch.equal(kept.classifier.weight, model.classifier.weight.bfloat16().float())
    two = BaseConfig(model=str(tmp_path / "own"), task=TASK.name, labels=("no", "yes"))
    assert load_base(two, CPU).classifier.weight.shape == (2, 64)


def test_only_the_head_may_be_missing(bases, tmp_path):
    folder = save_base(tmp_path / "base", "bert")
    tensors = load_file(folder / "model.safetensors")
    del tensors["pooler.dense.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"pooler\.dense\.weight"):
        load_base(settings(folder), CPU)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("bits", "lean"), [(4, "on"), (4, "off"), (32, "off")])
def test_the_head_trains_and_all_else_but_factors_is_frozen(bases, kind, bits, lean, tmp_path):
    config = run_settings(bases(kind), bits, lean=LeanConfig(lean=lean))
    model = build.build_model(config, CPU).model.train()
    names = {name for name, _ in trainable(model)}
    assert all("lora_" in name or ".modules_to_save." in name for name in names)
    assert any(".modules_to_save." in name for name in names)
    assert not any("pooler" in name or "embed" in name for name in names)
    dtypes = {p.dtype for name, p in trainable(model) if ".modules_to_save." in name}
    assert dtypes == {torch.float32}
    before = {name: p.detach().clone() for name, p in trainable(model)}
    optimizer = torch.optim.SGD([p for _, p in trainable(model)], lr=0.5)
    for step in range(2):
        loss = model(**batch_of(kind), labels=torch.tensor([0, 1, 2])).loss
        loss.backward()
        if step == 0:
            check_first_gradients(trainable(model))
        optimizer.step()
        optimizer.zero_grad()
    moved = {name for name, p in trainable(model) if not torch.equal(before[name], p)}
    assert moved >= {name for name in names if "lora_B" in name or ".modules_to_save." in name}
    model.eval()
    save_adapter(model, tmp_path / "adapter")
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert saved["task_type"] == "SEQ_CLS"
    reloaded = load_adapter(load_base(config.base, CPU, seed=9), tmp_path / "adapter").eval()
    own = {name: p for name, p in reloaded.named_parameters() if name in names}
    assert all(torch.equal(own[name], p) and own[name].dtype == p.dtype for name, p in trainable(model))
    if lean == "off":  # PEFT's own forward on both sides
        with torch.no_grad():
            assert torch.equal(reloaded(**batch_of(kind)).logits, model(**batch_of(kind)).logits)


def test_stock_peft_loads_the_adapter_with_its_head(bases, tmp_path):
    model = build.build_model(run_settings(bases("bert"), 32), CPU).model
    with torch.no_grad():
        for _, parameter in trainable(model):
            parameter += 0.05
    save_adapter(model.eval(), tmp_path / "adapter")
    stock = AutoModelForSequenceClassification.from_pretrained(bases("bert"), num_labels=3, dtype=torch.float32)
    stock = PeftModel.from_pretrained(stock, str(tmp_path / "adapter")).eval()
    batch = batch_of("bert")
    with torch.no_grad():
        torch.testing.assert_close(stock(**batch).logits, model(**batch).logits, rtol=1e-5, atol=1e-5)
        whole = AutoPeftModelForSequenceClassification.from_pretrained(
            tmp_path / "adapter", num_labels=3, dtype=torch.float32
        )
        torch.testing.assert_close(whole.eval()(**batch).logits, model(**batch).logits, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------------- the loss


def naive_loss(logits, labels, n_items, weights=None):
    """Example by example in fp64."""
    total = torch.zeros((), dtype=torch.float64)
    for row, label in zip(logits.double(), labels, strict=True):
        if label.dim() == 0:
            weight = 1.0 if weights is None else weights[label].double()
            total += weight * (row.exp().sum().log() - row[label])
        else:
            for place, one in enumerate(label):
                p = 1 / (1 + (-row[place]).exp())
                weight = 1.0 if weights is None else weights[place].double()
                total += -weight * p.log() if one else -(1 - p).log()
    return total / n_items


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_loss_is_the_naive_one(several, weighted):
    draw = torch.Generator().manual_seed(3)
    logits = torch.randn(7, 4, generator=draw)
    labels = torch.randint(0, 2, (7, 4), generator=draw).float() if several else torch.arange(7) % 4
    weights = torch.tensor([0.5, 2.0, 1.0, 3.0]) if weighted else None
    found = classification_loss(logits, labels, 9, weights)
    expected = naive_loss(logits, labels, 9, weights)
    # fp32 sums of 28 terms, each within a few roundings
    assert abs(float(found) - float(expected)) <= 28 * 4 * torch.finfo(torch.float32).eps * float(expected)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "t5"])
@pytest.mark.parametrize("lean", ["on", "off"])
def test_parts_of_a_batch_add_up_to_the_whole(bases, kind, lean):
    """What the Trainer does in gradient accumulation: every part is divided by the items of all parts."""
    model = build.build_model(run_settings(bases(kind), 32, lean=LeanConfig(lean=lean)), CPU).model.train()
    set_weights(model, torch.tensor([0.5, 1.5, 1.0]))
    batch, labels = batch_of(kind), torch.tensor([0, 1, 2])
    whole = model(**batch, labels=labels, num_items_in_batch=3)
    parts = [
        model(**{k: v[rows] for k, v in batch.items()}, labels=labels[rows], num_items_in_batch=torch.tensor(3)).loss
        for rows in (slice(0, 1), slice(1, 3))
    ]
    torch.testing.assert_close(sum(parts), whole.loss, rtol=1e-5, atol=1e-6)
    expected = functional.cross_entropy(whole.logits, labels, torch.tensor([0.5, 1.5, 1.0]), reduction="sum") / 3
    torch.testing.assert_close(whole.loss, expected)
    assert whole["loss"] is whole.loss


def test_a_base_without_a_task_keeps_its_own_loss(bases):
    model = load_base(BaseConfig(model=str(bases("gpt2"))), CPU)
    assert type(model).__name__ == "GPT2LMHeadModel"
    assert "forward" not in vars(model)


def test_the_stock_loss_is_ours_without_weights(bases):
    stock = AutoModelForSequenceClassification.from_pretrained(bases("bert"), num_labels=3)
    ours = AutoModelForSequenceClassification.from_pretrained(bases("bert"), num_labels=3)
    ours.load_state_dict(stock.state_dict())
    put_loss_on(ours, TASK.model)
    batch = {**batch_of("bert"), "labels": torch.tensor([0, 1, 2])}
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(**batch).loss, stock.eval()(**batch).loss)


# ------------------------------------------------------------------------------------------- who can do what


def test_a_model_that_cannot_do_the_task_is_refused(bases, tmp_path):
    with pytest.raises(UserError, match=r"a bert model generates no text.*\n.*text-classification"):
        load_model_config(BaseConfig(model=str(bases("bert")), task="text-generation"))
    with pytest.raises(UserError, match="a t5 model answers a text, and does not go on with it"):
        load_model_config(BaseConfig(model=str(bases("t5")), task="text-generation"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "marian", "vocab_size": 320}))
    with pytest.raises(UserError, match="a marian model has no head for text-classification"):
        load_model_config(BaseConfig(model=str(tmp_path), weights="random", task=TASK.name))


@pytest.mark.parametrize("kind", [*ENCODERS, *BOTH])
def test_random_weights_too(kind, tmp_path):
    (tmp_path / "config.json").write_text(architecture(kind).to_json_string())
    model = load_base(settings(tmp_path, weights="random"), CPU, seed=3)
    again = load_base(settings(tmp_path, bits=16, weights="random"), CPU, seed=3)
    assert all(torch.equal(p, head_of(again)[name]) for name, p in head_of(model).items())


def test_a_pooler_gets_no_factors_even_when_its_name_is_asked_for(bases):
    model = load_base(settings(bases("bert")), CPU)
    peft_model = inject(model, AdapterConfig(targets=("dense",)), TASK.model)
    changed = [name for name, m in peft_model.named_modules() if hasattr(m, "lora_A")]
    assert changed
    assert all(".encoder.layer." in name for name in changed)
    assert isinstance(peft_model.base_model.model.bert.pooler.dense, nn.Linear)


@pytest.mark.parametrize("kind", KINDS)
def test_the_lean_step_computes_what_the_stock_step_does(bases, kind):
    """Loss and gradients in fp32, of padded rows: what differs is the order of the same operations."""
    found = {}
    for lean in ("on", "off"):
        config = run_settings(bases(kind), 32, lean=LeanConfig(lean=lean))
        config = dataclasses.replace(config, adapter=AdapterConfig(r=4, adapter_dtype="fp32"))
        model = build.build_model(config, CPU).model.train()
        with torch.no_grad():
            for number, (name, parameter) in enumerate(trainable(model)):
                draw = torch.Generator().manual_seed(number)
                parameter += 0.05 * torch.randn(parameter.shape, generator=draw) * ("lora_" in name)
        loss = model(**batch_of(kind), labels=torch.tensor([0, 1, 2])).loss
        loss.backward()
        found[lean] = loss, {name: p.grad for name, p in trainable(model)}
    rounding = 128 * torch.finfo(torch.float32).eps  # sums of as many terms as a layer has features
    torch.testing.assert_close(found["on"][0], found["off"][0], rtol=rounding, atol=0)
    largest = max(gradient.norm() for gradient in found["off"][1].values())
    for name, gradient in found["off"][1].items():
        assert (found["on"][1][name] - gradient).norm() <= rounding * (gradient.norm() + 0.01 * largest), name
