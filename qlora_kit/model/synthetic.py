"""Models of true shapes without a download: with seeded weights, or with none on `meta`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from qlora_kit.config.settings import BaseConfig
from qlora_kit.model import host_embedding
from qlora_kit.model.seeding import drawn_by
from qlora_kit.tasks import registry

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel
from qlora_kit.model.quantize import replace_linear_layers


def build_random(
    architecture: PretrainedConfig,
    config: BaseConfig,
    device: torch.device,
    seed: int,
    dtype: torch.dtype,
    on_host: str | None = None,
) -> PreTrainedModel:
    """Seeded weights of true shapes, made and quantized one layer at a time so that 16-bit copies never add up."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        model = registry.task_of(config, architecture).model.transformers_class.from_config(architecture, dtype=dtype)
    originals = {
        name: module
        for name, module in model.named_modules()
        if next(module.parameters(recurse=False), None) is not None
    }
    replace_linear_layers(model, config, dtype, architecture)
    _materialize_all(model, originals, dtype, device, seed, on_host)
    for buffer_owner in model.modules():
        for key, buffer in list(buffer_owner._buffers.items()):
            if buffer is not None:
                buffer_owner._buffers[key] = buffer.to(device)
    model.tie_weights()
    model.name_or_path = config.model
    return model.eval()


def build_on_meta(
    architecture: PretrainedConfig,
    config: BaseConfig,
    device: torch.device,
    dtype: torch.dtype,
    on_host: str | None = None,
) -> PreTrainedModel:
    """The structure without values: every parameter, buffer and quantization state is a tensor on `meta`."""
    import torch
    from transformers.initialization import no_init_weights

    with device, no_init_weights():
        model = registry.task_of(config, architecture).model.transformers_class.from_config(architecture, dtype=dtype)
    shapes = {name: p.dtype for name, p in model.named_parameters()}
    replace_linear_layers(model, config, dtype, architecture)
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if hasattr(weight, "_quantize"):  # `Params4bit.to("meta")` would skip the quantization
            value = torch.empty(weight.shape, dtype=shapes[f"{name}.weight"], device=device)
            with _code_tables_kept():
                module.weight = type(weight)(value, requires_grad=False, **weight.__dict__)._quantize(device)
            if module.bias is not None:
                module.bias.data = module.bias.data.to(value.dtype)
    if on_host is not None:
        host_embedding.move_to_host(model.get_input_embeddings())
    model.tie_weights()
    model.name_or_path = config.model
    return model.eval()


@contextmanager
def _code_tables_kept() -> Iterator[None]:
    """Keep bitsandbytes' cache of code tables, one for the whole process, as it was.

    A table cached by a quantization on `meta` would break every later real one ("Cannot copy out of meta tensor").
    """
    from bitsandbytes import functional

    kept = dict(functional.name2qmap)
    try:
        yield
    finally:
        functional.name2qmap.clear()
        functional.name2qmap.update(kept)


def _materialize_all(
    model: PreTrainedModel,
    originals: dict[str, nn.Module],
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
    on_host: str | None = None,
) -> None:
    """Give each module of `model` its weights, but for those that are ties to others, and leave `originals` empty.

    The embedding whose weight is `on_host` comes first, and goes to the host before anything else is on the device. It
    is drawn on the device like all others, for every kind of device draws its own numbers: else the same run would
    have other weights once it has room for them.
    """
    owner = None if on_host is None else on_host.removesuffix(".weight")
    for name in sorted(originals, key=lambda name: name != owner):
        original = originals.pop(name)
        if all(f"{name}.{key}" in model.all_tied_weights_keys for key, _ in original.named_parameters(recurse=False)):
            continue  # a second copy of an embedding, while all the rest is there
        _materialize(model, name, original, dtype, device, seed)
        if name == owner:
            host_embedding.move_to_host(model.get_submodule(name))


def _materialize(
    model: PreTrainedModel, name: str, original: nn.Module, dtype: torch.dtype, device: torch.device, seed: int
) -> None:
    """Give the module `name` of `model` the seeded weights of `original`, quantized where it is a 4- or 8-bit layer.

    The seed is the layer's own, so that its weights are the same at every number of bits.
    """
    from torch import nn

    original.to_empty(device=device, recurse=False)
    with drawn_by(seed, name, device):
        for parameter in original.parameters(recurse=False):
            parameter.zero_()
        model._init_weights(original)
    module = model.get_submodule(name)
    for key, parameter in original.named_parameters(recurse=False):
        value = parameter.detach().to(dtype)
        if key == "weight" and module is not original:
            if isinstance(original, nn.Linear) is False:  # Conv1D stores in × out
                value = value.T.contiguous()
            kind = type(module.weight)  # not `to`: 8-bit weights are quantized by it only on their way from a CPU
            module.weight = kind(value, requires_grad=False, **module.weight.__dict__)._quantize(device)
        else:
            module.register_parameter(key, nn.Parameter(value, requires_grad=False))
