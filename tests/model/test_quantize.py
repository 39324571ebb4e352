from __future__ import annotations

import pytest
import torch
from families import save_tiny
from releases import live_weights

from qlora_kit.adapters.targets import linear_layers
from qlora_kit.config.settings import BaseConfig
from qlora_kit.model.load import load_base
from qlora_kit.model.quantize import dense_weight

CPU = torch.device("cpu")
IDS = torch.arange(12).reshape(1, 12)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("bits", [4, 8, 16, 32])
def test_the_weight_is_that_which_the_layer_multiplies_with(tmp_path, family, bits):
    model = load_base(BaseConfig(model=str(save_tiny(tmp_path, family)), bits=bits), CPU)
    live = live_weights(model)
    layers = linear_layers(model)
    before = {name: dense_weight(layer).clone() for name, layer in layers.items()}
    with torch.no_grad():
        model(IDS)
    for name, layer in layers.items():
        weight_NK = dense_weight(layer)
        x_NK = torch.eye(weight_NK.shape[1], dtype=weight_NK.dtype)
        plain = live[f"{name}.weight"]
        assert torch.equal(weight_NK.float(), plain.T if type(layer).__name__ == "Conv1D" else plain)
        assert torch.equal(weight_NK, before[name])
        if bits != 8:  # whose product rounds
            bias_N = 0 if layer.bias is None else layer.bias
            expected = weight_NK.T + bias_N
            assert torch.equal(layer(x_NK), expected)
