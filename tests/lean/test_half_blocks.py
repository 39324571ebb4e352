from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from checkpoint_cases import (
    BATCHES,
    VARIANTS,
    adapted,
    assert_same,
    gradients,
    padded_batch,
    plain_batch,
)
from families import FAMILIES
from hypothesis import example, given, settings
from hypothesis import strategies as st
from memory_cases import settings as run_settings
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from qlora_kit import build
from qlora_kit.adapters import inject
from qlora_kit.lean import half_blocks

SHARED_NORM = ("phi",)  # its halves each have the norm's gradient rounded, where transformers rounds their sum


def halved(variant, **changes):
    model = adapted(variant, **changes)
    half_blocks.put_on(model)
    return model


def halved_in_place(model):
    half_blocks.put_on(model)
    return model


def errors(found, exact):
    """The largest error of each gradient, as a share of its largest value."""
    return {name: float((found[name] - true).abs().max() / true.abs().max()) for name, true in exact.items()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_gives_the_same_with_halves_and_with_whole_blocks(variant):
    model, batches = adapted(variant), [make() for make in BATCHES]
    whole = gradients(model, *batches)
    found = gradients(halved_in_place(model), *batches)
    if variant not in SHARED_NORM:
        assert_same(found, whole)
        return
    assert found[0] == whole[0]
    exact = gradients(adapted(variant, dtype=torch.float64), *batches)[1]
    ours, theirs = errors(found[1], exact), errors(whole[1], exact)
    assert max(ours.values()) <= 2 * max(theirs.values())  # each is one rounding of the same sums


@pytest.mark.parametrize("variant", VARIANTS)
def test_with_dropout_halves_and_whole_blocks_draw_the_same_masks_and_draw_them_again(variant):
    model, batch = adapted(variant, dropout=0.3), plain_batch()
    whole = gradients(model, batch, seed=7)
    found = gradients(halved_in_place(model), batch, seed=7)
    assert found[0] == whole[0] != gradients(model.eval(), batch)[0]
    if variant not in SHARED_NORM:
        assert_same(found, whole)
    else:
        exact = gradients(adapted(variant, dropout=0.3, checkpointing=False), batch, seed=7)[1]
        assert max(errors(found[1], exact).values()) < 1e-5  # other masks give another gradient altogether


def test_a_step_without_any_checkpoint_gives_the_same():
    batches = [make() for make in BATCHES]
    for variant in ("gpt2", "llama"):
        kept = gradients(adapted(variant, dropout=0.3, checkpointing=False), *batches)
        assert_same(gradients(halved(variant, dropout=0.3), *batches), kept)


@settings(max_examples=6, deadline=None)
@given(rows=st.integers(1, 3), tokens=st.integers(1, 33), variant=st.sampled_from(["gpt2", "gemma2", "opt"]))
@example(rows=1, tokens=1, variant="llama")
def test_any_shape(rows, tokens, variant):
    model, batch = adapted(variant), plain_batch(rows, tokens)
    whole = gradients(model, batch)
    found = gradients(halved_in_place(model), batch)
    assert found[0] == whole[0]
    assert all(torch.equal(found[1][name], gradient) for name, gradient in whole[1].items())


def test_on_a_quantized_base_in_bf16():
    config = run_settings(bits=4, lean="off", adapter_dtype="bf16", dropout=0.1)
    model = build.build_model(config, torch.device("cpu"), FAMILIES["llama"]()).model.train()
    for _, factor in inject.trainable(model):
        torch.nn.init.normal_(factor, generator=torch.Generator().manual_seed(1))
    whole = gradients(model, padded_batch())
    assert_same(gradients(halved_in_place(model), padded_batch()), whole)


class Calls(TorchDispatchMode):
    """Counts the products with each weight that it was told of, by the name of its layer."""

    def __init__(self, layers):
        super().__init__()
        self.names = {layer.weight.untyped_storage()._cdata: name for name, layer in layers.items()}
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            for argument in args:
                name = self.names.get(argument.untyped_storage()._cdata)
                self.counts.update([name] if name else [])
        return func(*args, **(kwargs or {}))


def products(model):
    """How often a backward pass multiplies by each weight of the last block, and calls its attention and its MLP."""
    block = model.base_model.model.model.layers[-1]
    layers = {name: layer for name, layer in block.named_modules() if isinstance(layer, torch.nn.Linear)}
    layers = {name.split(".")[1]: layer for name, layer in layers.items() if "lora" not in name}
    loss = model(**plain_batch()).loss
    called = Counter()
    for name in ("self_attn", "mlp"):
        block.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: called.update([name]))
    with Calls(layers) as calls:
        loss.backward()
    return calls.counts, called


def test_each_half_is_recomputed_once_and_ends_before_its_last_product():
    inner = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"]
    last = ["o_proj", "down_proj"]  # frozen: they save only their weights, before their product
    model = adapted("llama", targets=tuple(inner))
    whole, _ = products(model)
    halves, called = products(halved_in_place(model))
    assert called == {"self_attn": 1, "mlp": 1}
    recomputed, gradients_of_inputs = Counter(inner), Counter(inner + last)
    assert halves == recomputed + gradients_of_inputs
    assert whole == halves + Counter(["o_proj"])  # the whole block needs it for the MLP's input


def test_evaluation_and_generation_are_those_of_the_model():
    plain, ours = adapted("qwen3").eval(), halved("qwen3").eval()
    ids = plain_batch()["input_ids"]
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, plain(ids).logits)
        assert torch.equal(ours.train()(ids).logits, plain(ids).logits)
    ours.eval()
    told = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 5, "do_sample": False}
    assert torch.equal(ours.generate(**told, use_cache=True), plain.generate(**told, use_cache=True))


def test_a_block_that_is_given_a_cache_fills_it_once():
    block = halved("gpt2").base_model.model.transformer.h[0]
    x = torch.randn(1, 5, 64, requires_grad=True)
    cache = DynamicCache()
    block(x, cache).sum().backward()
    assert cache.get_seq_length() == 5


@pytest.mark.parametrize("variant", ["gpt2", "llama", "gpt_neox"])
def test_attention_weights_are_captured_as_before(variant):
    ids = plain_batch()["input_ids"]
    model, found = adapted(variant), []
    model.set_attn_implementation("eager")
    for each in (model, halved_in_place(model)):
        found.append(each(ids, output_attentions=True).attentions)
    assert len(found[0]) == len(found[1]) == 2
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_hidden_states_are_captured_as_before():
    ids = plain_batch()["input_ids"]
    ours, theirs = (m(ids, output_hidden_states=True).hidden_states for m in (halved("gpt2"), adapted("gpt2")))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_copy_of_the_model_runs_its_own_blocks():
    model = halved("llama")
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert_same(gradients(twin, plain_batch()), gradients(adapted("llama"), plain_batch()))


def test_says_what_it_did():
    outcome = half_blocks.put_on(adapted("gemma2"))
    assert (outcome.done, outcome.left) == ("2 blocks: attention and MLP apart", "")


def test_without_checkpoints_it_leaves_the_model_alone():
    model = adapted("llama", checkpointing=False)
    assert half_blocks.put_on(model).left == "checkpointing is off"
    assert all("forward" not in vars(module) for module in model.modules())


def test_blocks_of_a_class_it_does_not_know_stay_whole():
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = AutoConfig.for_model("stablelm", vocab_size=320, num_key_value_heads=2, **sizes)
    model = AutoModelForCausalLM.from_config(config)
    build.enable_checkpointing(model)
    outcome = half_blocks.put_on(model)
    assert (outcome.done, outcome.left) == ("", "StableLmDecoderLayer: whole blocks")
    assert all(layer.gradient_checkpointing for layer in model.model.layers)


def test_a_foreign_class_of_a_known_name_stays_whole():
    model = adapted("llama")
    layers = model.base_model.model.model.layers
    kind = type(layers[0])
    layers[0].__class__ = type(kind.__name__, (kind,), {"__module__": "somebody.elses"})
    outcome = half_blocks.put_on(model)
    assert outcome.done.startswith("1 blocks")
    assert layers[0].gradient_checkpointing
    assert not layers[1].gradient_checkpointing
