"""The base as the adapter saw it, tensor by tensor from the files, equals the live model's bit for bit."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes import functional
from families import FAMILIES, save_tiny
from releases import live_weights
from transformers.pytorch_utils import Conv1D

from qlora_kit.config.settings import BaseConfig
from qlora_kit.model.load import load_base
from qlora_kit.release.files.read import open_base
from qlora_kit.release.mapping import read_layout
from qlora_kit.release.quantize import PackedWeight, Quantization, as_seen, dequantized, row_pieces

CPU = torch.device("cpu")
DTYPES = {4: torch.bfloat16, 8: torch.bfloat16, 16: torch.bfloat16, 32: torch.float32}


def together(pieces) -> torch.Tensor:
    return torch.cat([rows for _, rows in pieces])


@pytest.mark.parametrize("bits", [4, 8, 16, 32])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_of_the_files_becomes_what_the_live_model_has(tmp_path, family, bits):
    config = BaseConfig(model=str(save_tiny(tmp_path, family)), bits=bits)
    live = live_weights(load_base(config, CPU))
    _, checkpoint = open_base(config)
    layout = read_layout(config, DTYPES[bits], checkpoint)
    assert not layout.unknown
    assert not layout.converted
    found = 0
    for name, file_name in layout.file_names.items():
        weight, value = layout.weights[name], checkpoint.read(file_name)
        if weight.linear:
            value = value.T.contiguous() if weight.transposed else value
            how = Quantization(bits) if weight.quantized else None
            seen = together(as_seen(value, weight.dtype, how))
            if weight.transposed and bits > 8:
                seen = seen.T
            found += weight.quantized
        else:
            seen = value.to(weight.dtype).float()
        assert torch.equal(seen, live[name]), name
    assert (found > 0) == (bits <= 8)
    stood_for = {name for group in layout.tied for name in group} | set(layout.file_names)
    assert stood_for == set(live)


@pytest.mark.parametrize(("quant_type", "double_quant"), [("nf4", False), ("fp4", True), ("fp4", False)])
def test_other_four_bit_settings(tmp_path, quant_type, double_quant):
    config = BaseConfig(model=str(save_tiny(tmp_path, "llama")), quant_type=quant_type, double_quant=double_quant)
    live = live_weights(load_base(config, CPU))
    _, checkpoint = open_base(config)
    name = "model.layers.0.mlp.down_proj.weight"
    how = Quantization(4, quant_type, double_quant)
    assert torch.equal(together(as_seen(checkpoint.read(name), torch.bfloat16, how)), live[name])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_base_loaded_in_another_dtype(tmp_path, dtype):
    """A GPU without bf16 trains in fp16; what it saw is quantized from fp16 and rounded to it."""
    config = BaseConfig(model=str(save_tiny(tmp_path, "gpt2")))
    live = live_weights(load_base(config, CPU, dtype=dtype))
    _, checkpoint = open_base(config)
    name = "transformer.h.1.attn.c_proj.weight"
    value = checkpoint.read(name).T.contiguous()
    assert torch.equal(together(as_seen(value, dtype, Quantization(4))), live[name])


@pytest.mark.parametrize("shape", [(5, 96), (300, 100), (4100, 320), (7, 64), (3, 30)])
@pytest.mark.parametrize("double_quant", [True, False])
def test_pieces_of_rows_give_what_the_whole_gives(shape, double_quant, monkeypatch):
    """Rows that do not end with a block of 64, and more scales than one block of 256."""
    monkeypatch.setattr("qlora_kit.release.quantize.PIECE_BYTES", 1 << 14)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    assert len(list(row_pieces(*shape))) > 1 or shape[0] < 8
    packed, state = functional.quantize_4bit(weight, compress_statistics=double_quant, quant_type="nf4")
    ours = PackedWeight.of(weight, torch.bfloat16, Quantization(4, "nf4", double_quant))
    assert torch.equal(ours.packed, packed)
    assert torch.equal(ours.state.absmax, state.absmax)
    assert torch.equal(together(dequantized(ours)), functional.dequantize_4bit(packed, state).float())


def test_square_conv1d_layers_are_told_by_their_class_not_their_shape(tmp_path):
    config = BaseConfig(model=str(save_tiny(tmp_path, "gpt2")), bits=16)
    _, checkpoint = open_base(config)
    model = load_base(config, CPU)
    for bits in (4, 8, 16):
        layout = read_layout(BaseConfig(model=config.model, bits=bits), torch.bfloat16, checkpoint)
        conv1d = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)}
        assert {name for name, weight in layout.weights.items() if weight.transposed} == conv1d
        square = layout.weights["transformer.h.0.attn.c_proj.weight"]
        assert square.shape == (64, 64)
        assert square.transposed
