"""Linear layers held in 4 or 8 bits, the weights that they compute with, and how many parameters a model has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qlora_kit.config.settings import BaseConfig
from qlora_kit.tasks import registry

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class ParameterCount:
    """True numbers of parameters: a packed 4-bit weight counts each of the two that share a byte."""

    total: int
    trainable: int


def quantization(config: BaseConfig, dtype: torch.dtype, heads: Sequence[str] = ()) -> Any:
    """The quantization settings for `config.bits`, or None for 16 and 32; the modules `heads` are left as they are."""
    from transformers import BitsAndBytesConfig

    skipped = {"llm_int8_skip_modules": list(heads)} if heads else {}

    if config.bits == 4:
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=config.quant_type,
            bnb_4bit_use_double_quant=config.double_quant,
            bnb_4bit_compute_dtype=dtype,
            **skipped,
        )
    return BitsAndBytesConfig(load_in_8bit=True, **skipped) if config.bits == 8 else None


def replace_linear_layers(
    model: PreTrainedModel, config: BaseConfig, dtype: torch.dtype, architecture: PretrainedConfig
) -> None:
    """Put bitsandbytes' layers, still empty, in the place of those to quantize, and mark the model as quantized."""
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear
    from transformers.quantizers.auto import AutoHfQuantizer
    from transformers.quantizers.base import get_keys_to_not_convert

    from qlora_kit.model.heads import head_names

    heads = head_names(model) if registry.task_of(config, architecture).model.has_new_head else []
    settings = quantization(config, dtype, heads)
    if settings is None:
        return
    # as transformers' own loading chooses: what is to be left the settings say, else transformers
    left = [*(heads or get_keys_to_not_convert(model)), *(model._keep_in_fp32_modules or ())]
    replace_with_bnb_linear(model, left, settings)
    model.is_quantized, model.quantization_method = True, settings.quant_method
    model.hf_quantizer = AutoHfQuantizer.from_config(settings, pre_quantized=False)
    setattr(model, f"is_loaded_in_{config.bits}bit", True)
    model.config.quantization_config = settings


def keep_weights_plain(model: PreTrainedModel) -> None:
    """Keep bitsandbytes from repacking weights at the first evaluation on CPUs with AVX512-BF16.

    A repacked weight dequantizes to garbage and its product has no gradient, so that training or merging after
    an evaluation would be silently wrong.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def dense_weight(layer: Any) -> torch.Tensor:
    """The weight (out × in) of a linear layer in 4, 8, 16 or 32 bits, of transformers' `Conv1D` too.

    A quantized one comes in the dtype that bitsandbytes dequantizes it to; any other shares memory with the layer's.
    """
    from bitsandbytes import functional
    from transformers.pytorch_utils import Conv1D

    weight = layer.weight
    if hasattr(weight, "quant_state"):
        dense: torch.Tensor = functional.dequantize_4bit(weight.data, weight.quant_state)
        return dense
    if hasattr(weight, "SCB"):  # the scales move from the weight to the layer when it first runs
        scales = weight.SCB if weight.SCB is not None else layer.state.SCB
        values: torch.Tensor = functional.int8_vectorwise_dequant(weight.data, scales)
        return values
    plain: torch.Tensor = weight.detach()
    return plain.T if isinstance(layer, Conv1D) else plain


def count_parameters(model: nn.Module) -> ParameterCount:
    """Count parameters; a 4-bit weight counts as many as its original shape holds."""
    sizes = [(true_numel(p), p.requires_grad) for p in model.parameters()]
    return ParameterCount(sum(n for n, _ in sizes), sum(n for n, trains in sizes if trains))


def true_numel(parameter: torch.nn.Parameter) -> int:
    """Number of weights that `parameter` stands for (4-bit packing halves `numel()`)."""
    state = getattr(parameter, "quant_state", None)
    return int(state.shape.numel()) if state is not None else parameter.numel()
