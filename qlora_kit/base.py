"""The frozen base: found, loaded in 4, 8, 16 or 32 bits, and counted.

`load_base` is the only place that builds a model, so that the trainer, the benchmarks and the planner
all see the same one.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit import demo, host_embedding, host_memory, hub, shapes
from qlora_kit.config import BaseConfig
from qlora_kit.errors import Fault, UserError
from qlora_kit.seeding import drawn_by
from qlora_kit.task_models import TASK_MODELS, check_can_do, check_starts, task_of, transformers_class

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

# kinds of models that give the first token the position after that of the padding token
PADDED_POSITIONS = (
    "camembert",
    "data2vec-text",
    "ibert",
    "longformer",
    "mpnet",
    "roberta",
    "roberta-prelayernorm",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xmod",
)
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")
LICENCE_PATTERNS = ("LICENSE*", "LICENCE*", "NOTICE*")
# files one of which a folder with a tokenizer has
VOCABULARY_PATTERNS = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "*.tiktoken",
)


@dataclass(frozen=True)
class ParameterCount:
    """True numbers of parameters: a packed 4-bit weight counts each of the two that share a byte."""

    total: int
    trainable: int


def resolve_device(device: str) -> torch.device:
    """The device to run on; `auto` takes CUDA where there is one. Raises `UserError` for CUDA without one."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise UserError.of("--device", device, "this machine has no usable CUDA device", "Use --device cpu or auto.")
    if device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", 0)


_planned_gpu_has_bf16: ContextVar[bool] = ContextVar("_planned_gpu_has_bf16", default=True)


@contextmanager
def planned_for(has_bf16: bool) -> Iterator[None]:
    """Meanwhile what is built on `meta` is that of a GPU with or without bf16."""
    token = _planned_gpu_has_bf16.set(has_bf16)
    try:
        yield
    finally:
        _planned_gpu_has_bf16.reset(token)


def compute_dtype(config: BaseConfig, device: torch.device) -> torch.dtype:
    """The dtype of every unquantized weight and of the arithmetic: bf16, or fp16 where CUDA lacks it.

    On `meta` it is that of the GPU in `planned_for`, by default one that has bf16.
    """
    import torch

    if config.bits == 32:
        return torch.float32
    if device.type == "meta":
        has_bf16 = _planned_gpu_has_bf16.get()
    else:
        has_bf16 = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_bf16 else torch.float16


def model_source(config: BaseConfig) -> str:
    """The folder or hub id that `config.model` stands for."""
    return str(demo.base_folder()) if config.model == "demo" else config.model


def find_on_hub(config: BaseConfig) -> None:
    """Where the model is neither random nor a local folder, ask the hub for it. Raises `UserError`."""
    source = model_source(config)
    if config.weights == "pretrained" and not Path(source).exists():
        hub.fetch_model_file(source, "config.json", config.revision)


def load_model_config(config: BaseConfig) -> PretrainedConfig:
    """The model's architecture with the task's labels, from the embedded table, a local folder, or the hub.

    Raises `UserError` where it is not found, cannot do the task, or lacks weights.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    source = model_source(config)
    if config.weights == "random":
        architecture = shapes.config_from(source)
    else:
        find_on_hub(config)
        if Path(source).exists():
            _check_folder(config, Path(source))
        try:
            architecture = AutoConfig.from_pretrained(
                source, revision=config.revision, trust_remote_code=config.trust_remote_code
            )
        except (*shapes.BAD_CONFIG, StrictDataclassError, OSError) as error:
            raise UserError.of(
                "--model",
                config.model,
                f"its config.json cannot be used ({_first_line(error)})",
                "Give a model that the installed transformers knows.",
            ) from None
    return with_labels(architecture, config)


def with_labels(architecture: PretrainedConfig, config: BaseConfig) -> PretrainedConfig:
    """`architecture` with the labels of the task, from where every model of it takes them; changed in place.

    Raises `UserError` where it cannot do the task.
    """
    task = task_of(config.task, architecture)
    if not config.trust_remote_code:
        check_can_do(task, architecture, config.model)
    if TASK_MODELS[task].decodes:
        check_starts(architecture, config.model)
    if TASK_MODELS[task].has_new_head and config.labels is not None:
        architecture.id2label = dict(enumerate(config.labels))
        architecture.label2id = {label: number for number, label in enumerate(config.labels)}
        kind = "multi_label_classification" if config.multi_label else "single_label_classification"
        architecture.problem_type = kind
    own_number = TASK_MODELS[task].num_labels
    if own_number is not None and architecture.num_labels != own_number:
        architecture.num_labels = own_number  # the model may have been saved for something else
    return architecture


def _check_folder(config: BaseConfig, folder: Path) -> None:
    faults = []
    if not (folder / "config.json").is_file():
        faults.append(
            Fault("--model", config.model, "the folder has no config.json", "Give a transformers model folder.")
        )
    if not any((folder / name).is_file() for name in WEIGHT_FILES):
        if any(folder.glob("*.bin")):
            rule = "its weights are pickle files (.bin), which can run code when opened"
            remedy = "Convert them to safetensors first."
        else:
            rule, remedy = "the folder has no model.safetensors", "Complete it, or use --weights random."
        faults.append(Fault("--model", config.model, rule, remedy))
    if config.tokenizer is None and not has_tokenizer(folder):
        faults.append(Fault("--tokenizer", None, f"{config.model} has no tokenizer.json", "Give --tokenizer FOLDER."))
    if faults:
        raise UserError(faults)


def has_tokenizer(folder: Path) -> bool:
    """Whether the folder holds a tokenizer."""
    return any(file.is_file() for pattern in VOCABULARY_PATTERNS for file in folder.glob(pattern))


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def load_tokenizer(config: BaseConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of `config.tokenizer`, or the model's own; random weights without one take the demo's.

    Raises `UserError` where there is none, it cannot be read, or a package that it needs is missing.
    """
    from transformers import AutoTokenizer

    source, setting = _tokenizer_source(config)
    folder = Path(source)
    if folder.is_dir() and not has_tokenizer(folder):
        raise UserError.of(setting, source, "the folder has no tokenizer.json", "Give a folder that has one.")
    if not folder.is_dir():
        hub.fetch_model_file(source, "tokenizer_config.json", config.revision, setting)
    try:
        revision = config.revision if source == model_source(config) else None
        return AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=config.trust_remote_code)
    except ImportError as error:
        raise _lacks_package(setting, source, error) from None
    except (ValueError, OSError, KeyError, json.JSONDecodeError) as error:
        raise UserError.of(
            setting,
            source,
            f"its tokenizer cannot be read ({_first_line(error)})",
            "Give a folder with tokenizer.json and tokenizer_config.json.",
        ) from None


def _lacks_package(setting: str, source: str, error: ImportError) -> UserError:
    """What to say where a tokenizer needs a package that is not there: Marian's needs sentencepiece."""
    if "sentencepiece" in str(error).lower():
        rule, remedy = "its tokenizer needs the package sentencepiece", "Install it: pip install sentencepiece"
    else:
        rule, remedy = f"its tokenizer needs a package that is missing ({_first_line(error)})", "Install it."
    return UserError.of(setting, source, rule, remedy)


def _tokenizer_source(config: BaseConfig) -> tuple[str, str]:
    """The folder or hub id of the tokenizer, and the setting that it comes from."""
    if config.tokenizer is not None:
        return (str(demo.base_folder()) if config.tokenizer == "demo" else config.tokenizer), "--tokenizer"
    folder = Path(model_source(config))
    if config.weights == "random" and not (folder.is_dir() and has_tokenizer(folder)):
        return str(demo.base_folder()), "--model"  # any text will do
    return str(folder), "--model"


def max_positions(architecture: PretrainedConfig) -> int | None:
    """The longest sequence that the model has positions for; None where it has no limit."""
    positions: int | None = getattr(architecture, "max_position_embeddings", None)
    if positions is not None and architecture.model_type in PADDED_POSITIONS:
        positions -= (architecture.pad_token_id or 0) + 1
    return positions


def load_base(
    config: BaseConfig,
    device: torch.device,
    seed: int = 0,
    architecture: PretrainedConfig | None = None,
    dtype: torch.dtype | None = None,
    embedding_on_host: bool = False,
) -> PreTrainedModel:
    """The base model on `device`, quantized as told, every weight frozen unless `config.full`.

    Linear layers in the blocks are 4- or 8-bit; embeddings, norms, biases and the head have `dtype`, unset that of
    `compute_dtype` (another is for the release of a run that was made on another kind of device). A head that the
    task puts on is fp32, drawn by `seed` where the files have none for these labels, and meant to be trained (see
    `new_head`). On the `meta`
    device the model has the same structure but no values, whatever `config.weights` says: for the planner.
    `architecture` overrides the one that `config` names (which must be None for pretrained weights).
    With `embedding_on_host` the input embedding is a `HostEmbedding`, where the model allows it: it lies in the host's
    memory from the first, and what `device` has of it at any time is little beside the rest of the model.
    Raises `UserError` where it is not found or cannot be read.
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
    task = task_of(config.task, architecture)
    if TASK_MODELS[task].has_new_head:
        set_padding(architecture, config, device)
    elsewhere = embedding_on_host and device.type != "cpu" and not config.full
    on_host = host_embedding.host_weight(_structure(architecture, task, config)) if elsewhere else None
    if device.type == "meta":
        model = _build_meta(architecture, config, device, dtype, on_host)
    elif config.weights == "random":
        model = _build_random(architecture, config, device, seed, dtype, on_host)
    else:
        model = _load_pretrained(architecture, config, device, dtype, seed, on_host)
    _keep_weights_plain(model)
    _attend_by_kernel(model, device)
    if TASK_MODELS[task].has_new_head and not config.full:
        from qlora_kit import new_head

        new_head.keep_in_fp32(model, new_head.head_names(model))
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
    """The base of `config` on `device` as it is before it is quantized, frozen: with the names and weights of it.

    It lies whole in the host's memory, at 2 bytes a parameter; random weights, which every kind of device draws
    otherwise, on `device`. Raises `UserError` where it is not found or cannot be read.
    """
    import torch

    place = device if config.weights == "random" else torch.device("cpu")
    dtype = compute_dtype(config, device)
    return load_base(dataclasses.replace(config, bits=16), place, seed, dtype=dtype)


def load_as_saved(config: BaseConfig, device: torch.device) -> PreTrainedModel:
    """A whole model on `device` as its files are, in their dtype and quantization, frozen; `config.bits` is ignored.

    Raises `UserError` where it is not found or cannot be read.
    """
    with host_memory.building(device.type):
        model = _load_pretrained(load_model_config(config), config, device, None)
    _keep_weights_plain(model)
    _attend_by_kernel(model, device)
    model.requires_grad_(False)
    return model


def _attend_by_kernel(model: PreTrainedModel, device: torch.device) -> None:
    """On a GPU, attention with grouped keys by a kernel that keeps no scores."""
    if device.type != "cpu":
        from qlora_kit import sdpa

        sdpa.put_on(model)


def set_padding(architecture: PretrainedConfig, config: BaseConfig, device: torch.device) -> None:
    """Let a model that reads its answer off the last token know what is padding: the tokenizer's padding token.

    Without one it is the end-of-text token, as in `data.prepare_tokenizer`. Raises `UserError` without a tokenizer.
    """
    if device.type == "meta":  # a plan reads no tokenizer, and which token it is makes no difference to it
        pad = architecture.pad_token_id or 0
    else:
        tokenizer = load_tokenizer(config)
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    architecture.pad_token_id = architecture.get_text_config().pad_token_id = pad


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


def _load_pretrained(
    architecture: PretrainedConfig,
    config: BaseConfig,
    device: torch.device,
    dtype: torch.dtype | None,
    seed: int | None = None,
    on_host: str | None = None,
) -> PreTrainedModel:
    """The model in the files of `config`, quantized as told from `dtype`; None for both as the files have them.

    With a `seed`, a head of the task that the files do not have, or have for other labels, is drawn by it. The weight
    `on_host`, that of the input embedding, never sees the device.
    """
    import torch
    from safetensors import SafetensorError

    from qlora_kit import new_head

    task = task_of(config.task, architecture)
    heads = planned_heads(architecture, task) if seed is not None else []
    short_before = _times_short(device)
    try:
        with nullcontext() if on_host is None else _left_where_loaded():
            model, loaded = transformers_class(task).from_pretrained(
                model_source(config),
                config=architecture,
                revision=config.revision,
                dtype="auto" if dtype is None else dtype,
                quantization_config=None if dtype is None else quantization(config, dtype, heads),
                ignore_mismatched_sizes=bool(heads),  # another number of labels; what else differs is told below
                device_map=placement(device, on_host),
                use_safetensors=True,
                trust_remote_code=config.trust_remote_code,
                key_mapping=base_renaming(task, architecture),
                output_loading_info=True,
            )
    except (SafetensorError, OSError, ValueError, RuntimeError, ImportError) as error:
        if "out of memory" in str(error):
            raise
        if _times_short(device) > short_before:  # which transformers keeps to itself while it converts weights
            raise torch.OutOfMemoryError(f"loading {config.model}: {_first_line(error)}") from error
        raise UserError.of(
            "--model",
            config.model,
            f"its weights cannot be read ({_first_line(error)})",
            "Fetch or convert the model again.",
        ) from None
    if on_host is not None:
        host_embedding.move_to_host(model.get_input_embeddings(), device)
    lacking = _not_loaded(loaded)
    _check_loaded(config, [name for name in lacking if not new_head.is_in_head(name, heads)])
    if seed is not None and any(new_head.is_in_head(name, heads) for name in lacking):
        new_head.draw(model, heads, seed)  # all of it, so that no part of it depends on what else was drawn
    return model


def _times_short(device: torch.device) -> int:
    """How often an allocation on a GPU found no room in this process; 0 elsewhere."""
    import torch

    return torch.cuda.memory_stats(device).get("num_ooms", 0) if device.type == "cuda" else 0


def placement(device: torch.device, on_host: str | None = None) -> dict[str, str | torch.device]:
    """Where transformers is to load each weight: all onto `device`, but for the one that is `on_host`.

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


def base_renaming(task: str, architecture: PretrainedConfig) -> dict[str, str] | None:
    """The name of the base in files of such models → the one it has in the class for `task`, where that is another.

    transformers calls the base "transformer" in its classes of Llama, Qwen and others for question answering, and
    "model" in all others of them, and loads the one into the other only when it is told.
    """
    from transformers import AutoModel

    if not TASK_MODELS[task].has_new_head:
        return None
    classes = (own._model_mapping.get(type(architecture), None) for own in (AutoModel, transformers_class(task)))
    usual, here = (getattr(own, "base_model_prefix", None) for own in classes)
    return {rf"^{usual}\.": f"{here}."} if usual and here and usual != here else None


def planned_heads(architecture: PretrainedConfig, task: str) -> list[str]:
    """The names of the modules that `task` puts on a model beside its base; empty where it has its own head."""
    from qlora_kit import new_head

    return new_head.head_names(_structure(architecture, task)) if TASK_MODELS[task].has_new_head else []


def _structure(architecture: PretrainedConfig, task: str, config: BaseConfig | None = None) -> PreTrainedModel:
    """The modules of a model for `task`, with their ties, their weights on `meta`."""
    import torch
    from transformers.initialization import no_init_weights

    with torch.device("meta"), no_init_weights():
        trusted = {} if config is None else {"trust_remote_code": config.trust_remote_code}
        model = transformers_class(task).from_config(copy.deepcopy(architecture), **trusted)
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
        rule = f"its files lack, or have in another shape, {len(wrong)} weights: {', '.join(wrong[:3])}"
        raise UserError.of("--model", config.model, rule, "Fetch or convert the model again.")


def _build_random(
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
        model = transformers_class(task_of(config.task, architecture)).from_config(architecture, dtype=dtype)
    originals = {
        name: module
        for name, module in model.named_modules()
        if next(module.parameters(recurse=False), None) is not None
    }
    _replace_linear_layers(model, config, dtype, architecture)
    _materialize_all(model, originals, dtype, device, seed, on_host)
    for buffer_owner in model.modules():
        for key, buffer in list(buffer_owner._buffers.items()):
            if buffer is not None:
                buffer_owner._buffers[key] = buffer.to(device)
    model.tie_weights()
    model.name_or_path = config.model
    return model.eval()


def _replace_linear_layers(
    model: PreTrainedModel, config: BaseConfig, dtype: torch.dtype, architecture: PretrainedConfig
) -> None:
    """Put bitsandbytes' layers, still empty, in the place of those to quantize, and mark the model as quantized."""
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear
    from transformers.quantizers.auto import AutoHfQuantizer
    from transformers.quantizers.base import get_keys_to_not_convert

    from qlora_kit import new_head

    has_new_head = TASK_MODELS[task_of(config.task, architecture)].has_new_head
    heads = new_head.head_names(model) if has_new_head else []
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


def _build_meta(
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
        model = transformers_class(task_of(config.task, architecture)).from_config(architecture, dtype=dtype)
    shapes = {name: p.dtype for name, p in model.named_parameters()}
    _replace_linear_layers(model, config, dtype, architecture)
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


def _keep_weights_plain(model: PreTrainedModel) -> None:
    """Keep bitsandbytes from repacking weights at the first evaluation on CPUs with AVX512-BF16.

    A repacked weight dequantizes to garbage and its product has no gradient, so that training or merging after
    an evaluation would be silently wrong.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def count_parameters(model: nn.Module) -> ParameterCount:
    """Count parameters; a 4-bit weight counts as many as its original shape holds."""
    sizes = [(true_numel(p), p.requires_grad) for p in model.parameters()]
    return ParameterCount(sum(n for n, _ in sizes), sum(n for n, trains in sizes if trains))


def true_numel(parameter: torch.nn.Parameter) -> int:
    """Number of weights that `parameter` stands for (4-bit packing halves `numel()`)."""
    state = getattr(parameter, "quant_state", None)
    return int(state.shape.numel()) if state is not None else parameter.numel()


def hash_base(config: BaseConfig, seed: int) -> str:
    """A content hash of the base: the same weights give the same hash, wherever they lie."""
    source = Path(model_source(config))
    digest = hashlib.sha256()
    if config.weights == "random":
        digest.update(json.dumps([load_model_config(config).to_json_string(use_diff=False), seed]).encode())
        return f"random:{digest.hexdigest()}"
    for file in _weight_files(source, config):
        digest.update(file.name.encode())
        digest.update(file_digest(file))
    return f"sha256:{digest.hexdigest()}"


def _weight_files(source: Path, config: BaseConfig) -> Iterator[Path]:
    if not source.is_dir():
        source = hub.fetch_model_file(str(source), "config.json", config.revision).parent
    yield source / "config.json"
    yield from sorted(file for name in weight_names(source) if (file := source / name).is_file())


def weight_names(folder: Path) -> set[str]:
    """The names of the safetensors files that loading the model in `folder` reads, as transformers chooses them.

    Others may lie beside them (Mistral's `consolidated.safetensors`). Empty where neither a single file nor a readable
    index is there.
    """
    single, index = (folder / name for name in WEIGHT_FILES)
    if single.is_file():
        return {single.name}
    try:
        named = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return {Path(name).name for name in named}  # never a file elsewhere
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return set()


def file_digest(file: Path) -> bytes:
    """The SHA-256 of a file's content."""
    blob = file.resolve().name  # the hub's cache names each large file by its sha256
    if file.is_symlink() and len(blob) == 64:
        return bytes.fromhex(blob)
    with file.open("rb") as stream:
        return (
            hashlib.file_digest(stream, "sha256").digest()
            if hasattr(hashlib, "file_digest")
            else _digest_chunks(stream)
        )


def _digest_chunks(stream: Any) -> bytes:
    digest = hashlib.sha256()  # Python 3.10 has no hashlib.file_digest
    while chunk := stream.read(1 << 20):
        digest.update(chunk)
    return digest.digest()
