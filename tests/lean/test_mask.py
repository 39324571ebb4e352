"""Padding on the right without a mask, against the stock mask."""

from __future__ import annotations

import copy

import pytest
import torch
from families import FAMILIES
from lean_cases import batch, take_step, tiny_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from qlora_kit.adapters import inject
from qlora_kit.config.settings import AdapterConfig
from qlora_kit.lean import mask


def padded(tokens=20):
    """Three rows of which the last two end early, the padding not supervised."""
    inputs = batch(3, tokens, supervised=1.0)
    for row, length in ((1, tokens - 3), (2, tokens // 2)):
        inputs["attention_mask"][row, length:] = 0
        inputs["labels"][row, length:] = -100
        inputs["input_ids"][row, length:] = 0
    return inputs


@pytest.mark.parametrize("family", FAMILIES)
def test_real_tokens_never_see_the_padding(family):
    """fp64: what differs is the order of sums alone."""
    stock = tiny_peft_model(family).double()
    lean = copy.deepcopy(stock)
    assert mask.put_on(lean).done
    expected, found = take_step(stock, padded()), take_step(lean, padded())
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-6, atol=0)  # fp32 inside both
    for name, gradient in expected.gradients.items():
        torch.testing.assert_close(found.gradients[name], gradient, rtol=1e-5, atol=1e-8, msg=name)


def test_the_decoder_gets_no_mask_with_labels_and_keeps_it_without():
    model = tiny_peft_model("llama").eval()
    assert mask.put_on(model).done
    masks = []
    decoder = model.get_base_model().model
    decoder.register_forward_pre_hook(lambda m, a, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True)
    inputs = padded()
    model(**inputs)
    model(**{name: tensor for name, tensor in inputs.items() if name != "labels"})
    assert masks[0] is None
    assert masks[1] is inputs["attention_mask"]


def test_answers_to_prompts_padded_on_the_left_are_as_before():
    stock = tiny_peft_model("llama").eval()
    lean = copy.deepcopy(stock)
    mask.put_on(lean)
    ids = torch.randint(0, 256, (2, 9), generator=torch.Generator().manual_seed(0))
    left = torch.ones_like(ids)
    left[0, :4] = 0
    options = {"attention_mask": left, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(stock.generate(input_ids=ids, **options), lean.generate(input_ids=ids, **options))


def test_packed_rows_keep_their_mask():
    inputs = batch(1, 8)
    four = torch.ones(1, 1, 8, 8, dtype=torch.bool).tril()
    assert mask._drop_mask(None, (), {**inputs, "attention_mask": four})[1]["attention_mask"] is four


def test_experts_keep_the_mask_for_it_says_what_to_balance():
    config = AutoConfig.for_model(
        "mixtral", vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=2,
    )  # fmt: skip
    model = inject.inject(AutoModelForCausalLM.from_config(config), AdapterConfig(targets=("q_proj",)))
    assert "experts" in mask.put_on(model).left
