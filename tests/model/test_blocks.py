from __future__ import annotations

import pytest
from families import tiny_model

from qlora_kit.adapters.targets import linear_layers
from qlora_kit.model.blocks import block_of, find_blocks


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("model.layers.11.mlp.down_proj.weight", 11),
        ("model.layers.2.experts.7.up_proj", 2),
        ("3.attention", 3),
        ("lm_head.weight", None),
        ("transformer.h2.weight", None),
    ],
)
def test_the_first_number_in_a_name_is_that_of_the_block(name, number):
    assert block_of(name) == number


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_names_and_structure_tell_the_same_blocks(family):
    model = tiny_model(family)
    blocks = find_blocks(model)
    names = {name: module for name, module in model.named_modules() if name}
    assert {block_of(name) for name in linear_layers(model)} == set(range(len(blocks)))
    for number, block in enumerate(blocks):
        (name,) = [name for name, module in names.items() if module is block]
        assert block_of(name) == number
