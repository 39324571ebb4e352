"""Loads the frozen base in 4, 8, 16 or 32 bits.

`load_base` is the only function that builds a model, so that trainer, benchmarks and planner all use the same one.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from qlora_kit.config.settings import BaseConfig
from qlora_kit.errors import UserError
from qlora_kit.model import host_embedding
from qlora_kit.system import host_memory
from qlora_kit.tasks import registry
from qlora_kit.tasks.task_model import TaskModel

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel
from qlora_kit.model.device import compute_dtype
from qlora_kit.model.quantize import keep_weights_plain, quantization
from qlora_kit.model.source import first_line, load_model_config, model_source
from qlora_kit.model.synthetic import build_on_meta, build_random
from qlora_kit.model.tokenizer import load_tokenizer


def load_base(
    config: BaseConfig,
    device: torch.device,
    seed: int = 0,
    architecture: PretrainedConfig | None = None,
    dtype: torch.dtype | None = None,
    embedding_on_host: bool = False,
) -> PreTrainedModel:
    """The base model on `device`, quantized as `config` says, every weight frozen unless `config.full`.

    Linear layers in the blocks are 4- or 8-bit; embeddings, norms, biases and the head have `dtype`, by default that of
    `compute_dtype` (another one is for the release of a run from another kind of device). A head that the task puts on
    is fp32, drawn by `seed` if the files have none for these labels, and meant to be trained (see `heads`). On the
    `meta` device the model has the same structure but no values, whatever `config.weights` is: for the planner.
    `architecture` overrides the one that `config` names (it must be None for pretrained weights).
    With `embedding_on_host` the input embedding is a `HostEmbedding`, if the model allows it: it is loaded into host
    memory, and is never on `device` as a whole beside the rest of the model.
    Raises `UserError` if it is not found or cannot be read.
    """
    assert architecture is None or config.weights == "random" or device.type == "meta", "it would not fit the weights"
    with host_memory.building(device.type):
        return _build_base(config, device, seed, architecture, dtype, embedding_on_host)


def _build_base(
    config: BaseConfig,
    device: torch.device,
    seed: int,
    architecture: PretrainedConfig | None,
    dtype: torch.dtype | None,
    embedding_on_host: bool,
) -> PreTrainedModel:
    if architecture is None:
        architecture = load_model_config(config)
    dtype = compute_dtype(config, device) if dtype is None else dtype
    task = registry.task_of(config, architecture).model
    if task.has_new_head:
        set_padding(architecture, config, device)
    elsewhere = embedding_on_host and device.type != "cpu" and not config.full
    on_host = host_embedding.host_weight(_structure(architecture, task, config)) if elsewhere else None
    if device.type == "meta":
        model = build_on_meta(architecture, config, device, dtype, on_host)
    elif config.weights == "random":
        model = build_random(architecture, config, device, seed, dtype, on_host)
    else:
        model = _load_pretrained(architecture, config, device, dtype, seed, on_host)
    keep_weights_plain(model)
    _attend_by_kernel(model, device)
    if task.has_new_head and not config.full:
        from qlora_kit.model.heads import head_names, keep_in_fp32

        keep_in_fp32(model, head_names(model))
    model.requires_grad_(config.full)
    for module in computed_modules(model):
        module.requires_grad_(False)
    _forget_cache(model)
    return model


def computed_modules(model: nn.Module) -> list[Any]:
    """The modules whose weight transformers computes, and leaves out of the files: sines as positions (Marian's)."""
    return [module for module in model.modules() if hasattr(module, "create_weight")]


def _forget_cache(model: PreTrainedModel) -> None:
    """No cache in training; generation asks for its own."""
    model.config.use_cache = False
    for module in model.modules():  # the decoder of an encoder and a decoder has a configuration of its own
        if hasattr(module, "config"):
            module.config.use_cache = False


def load_originals(config: BaseConfig, device: torch.device, seed: int = 0) -> PreTrainedModel:
    """The base of `config` before quantization, frozen, with the same names.

    It is in host memory, at 2 bytes a parameter; random weights, which differ by kind of device, are on `device`.
    Raises `UserError` if it is not found or cannot be read.
    """
    import torch

    place = device if config.weights == "random" else torch.device("cpu")
    dtype = compute_dtype(config, device)
    return load_base(dataclasses.replace(config, bits=16), place, seed, dtype=dtype)


def load_as_saved(config: BaseConfig, device: torch.device) -> PreTrainedModel:
    """A model on `device` in the dtype and quantization of its files, frozen; `config.bits` is ignored.

    Raises `UserError` if it is not found or cannot be read.
    """
    with host_memory.building(device.type):
        model = _load_pretrained(load_model_config(config), config, device, None)
    keep_weights_plain(model)
    _attend_by_kernel(model, device)
    model.requires_grad_(False)
    return model


def _attend_by_kernel(model: PreTrainedModel, device: torch.device) -> None:
    """On a GPU, attention with grouped keys by a kernel that keeps no scores."""
    if device.type != "cpu":
        from qlora_kit.model import sdpa

        sdpa.put_on(model)


def set_padding(architecture: PretrainedConfig, config: BaseConfig, device: torch.device) -> None:
    """Set the padding token in the configuration of a model that reads its answer off the last token.

    It is the tokenizer's; without one it is the end-of-text token, as in `data.prepare_tokenizer`. Raises `UserError`
    if there is no tokenizer.
    """
    if device.type == "meta":  # a plan reads no tokenizer, and which token it is makes no difference to it
        pad = architecture.pad_token_id or 0
    else:
        tokenizer = load_tokenizer(config)
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    architecture.pad_token_id = architecture.get_text_config().pad_token_id = pad


def _load_pretrained(
    architecture: PretrainedConfig,
    config: BaseConfig,
    device: torch.device,
    dtype: torch.dtype | None,
    seed: int | None = None,
    on_host: str | None = None,
) -> PreTrainedModel:
    """The model in the files of `config`, quantized from `dtype`; if None, in the dtype and quantization of the files.

    With a `seed`, a head of the task that the files lack, or have for other labels, is drawn by it. The weight
    `on_host`, that of the input embedding, is never on the device.
    """
    import torch
    from safetensors import SafetensorError

    from qlora_kit.model.heads import draw, is_in_head

    task = registry.task_of(config, architecture).model
    heads = planned_heads(architecture, task) if seed is not None else []
    short_before = _times_short(device)
    try:
        model, loaded = _from_files(architecture, config, task, heads, dtype, placement(device, on_host))
    except (SafetensorError, OSError, ValueError, RuntimeError, ImportError) as error:
        if "out of memory" in str(error):
            raise
        if _times_short(device) > short_before:  # which transformers hides while it converts weights
            raise torch.OutOfMemoryError(f"loading {config.model}: {first_line(error)}") from error
        raise UserError.of(
            "model",
            config.model,
            f"its weights cannot be read ({first_line(error)})",
            "Fetch or convert the model again.",
        ) from None
    if on_host is not None:
        host_embedding.move_to_host(model.get_input_embeddings(), device)
    lacking = _not_loaded(loaded)
    _check_loaded(config, [name for name in lacking if not is_in_head(name, heads)])
    if seed is not None and any(is_in_head(name, heads) for name in lacking):
        draw(model, heads, seed)  # all of it, so that no part of it depends on what else was drawn
    return model


def _from_files(
    architecture: PretrainedConfig,
    config: BaseConfig,
    task: TaskModel,
    heads: list[str],
    dtype: torch.dtype | None,
    places: dict[str, str | torch.device],
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model as transformers reads it, and what that says of the weights it missed."""
    with nullcontext() if len(places) == 1 else _left_where_loaded():
        model, loaded = task.transformers_class.from_pretrained(
            model_source(config),
            config=architecture,
            revision=config.revision,
            dtype="auto" if dtype is None else dtype,
            quantization_config=None if dtype is None else quantization(config, dtype, heads),
            ignore_mismatched_sizes=bool(heads),  # another number of labels; what else differs is told by the caller
            device_map=places,
            use_safetensors=True,
            trust_remote_code=config.trust_remote_code,
            key_mapping=base_renaming(task, architecture),
            output_loading_info=True,
        )
    return model, loaded


def _times_short(device: torch.device) -> int:
    """How often an allocation on a GPU found no room in this process; 0 elsewhere."""
    import torch

    return torch.cuda.memory_stats(device).get("num_ooms", 0) if device.type == "cuda" else 0


def placement(device: torch.device, on_host: str | None = None) -> dict[str, str | torch.device]:
    """Where transformers loads each weight: all onto `device`, except the one that is `on_host`.

    The host is given as a torch device: the text "cpu" beside another device makes transformers refuse to quantize,
    for it would run a layer there in 32 bits. What lies there is none that it quantizes.
    """
    import torch

    # the weight in full: another that begins with the name of its module stays
    return {"": str(device), **({} if on_host is None else {on_host: torch.device("cpu")})}


@contextmanager
def _left_where_loaded() -> Iterator[None]:
    """Keep transformers from hooking a model on two devices: its hooks bring the whole embedding to each lookup."""
    from transformers import modeling_utils

    stock: Any = modeling_utils.accelerate_dispatch
    modeling_utils.accelerate_dispatch = lambda *args, **kwargs: None
    try:
        yield
    finally:
        modeling_utils.accelerate_dispatch = stock


def base_renaming(task: TaskModel, architecture: PretrainedConfig) -> dict[str, str] | None:
    """The name of the base in the files → its name in the class for `task`; None if they are the same.

    transformers calls the base "transformer" in its question-answering classes of Llama, Qwen and others, and "model"
    in all their other classes, and loads one into the other only with this mapping.
    """
    from transformers import AutoModel

    if not task.has_new_head:
        return None
    classes = (own._model_mapping.get(type(architecture), None) for own in (AutoModel, task.transformers_class))
    usual, here = (getattr(own, "base_model_prefix", None) for own in classes)
    return {rf"^{usual}\.": f"{here}."} if usual and here and usual != here else None


def planned_heads(architecture: PretrainedConfig, task: TaskModel) -> list[str]:
    """The names of the modules that `task` adds to the base of a model; empty if it uses the model's own head."""
    from qlora_kit.model.heads import head_names

    return head_names(_structure(architecture, task)) if task.has_new_head else []


def _structure(architecture: PretrainedConfig, task: TaskModel, config: BaseConfig | None = None) -> PreTrainedModel:
    """The modules of a model for `task`, with their ties, their weights on `meta`."""
    import torch
    from transformers.initialization import no_init_weights

    with torch.device("meta"), no_init_weights():
        trusted = {} if config is None else {"trust_remote_code": config.trust_remote_code}
        model = task.transformers_class.from_config(copy.deepcopy(architecture), **trusted)
    model.tie_weights()
    return model


def _not_loaded(loaded: dict[str, Any]) -> list[str]:
    """The weights that the files lack or have in another shape."""
    missing = [str(name) for name in loaded.get("missing_keys") or ()]
    mismatched = loaded.get("mismatched_keys") or ()
    return sorted({*missing, *(str(entry if isinstance(entry, str) else entry[0]) for entry in mismatched)})


def _check_loaded(config: BaseConfig, wrong: list[str]) -> None:
    """Check that every weight came from the files. Raises `UserError` naming those that did not."""
    if wrong:
        rule = f"{len(wrong)} weights are missing from its files or have another shape: {', '.join(wrong[:3])}"
        raise UserError.of("model", config.model, rule, "Fetch or convert the model again.")
