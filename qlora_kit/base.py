"""The frozen base: found, loaded in 4, 8, 16 or 32 bits, and counted.

`load_base` is the only place that builds a model, so that the trainer, the benchmarks and the planner
all see the same one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit import demo, host_memory, hub, shapes
from qlora_kit.config import BaseConfig
from qlora_kit.errors import Fault, UserError

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")


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
    """The model's architecture, from the embedded table, a local folder, or the hub.

    Raises `UserError` where it is not found, is not for causal language models, or lacks weights.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

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
    if not config.trust_remote_code and architecture.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UserError.of(
            "--model",
            config.model,
            f"a {architecture.model_type} model generates no text",
            "Give a causal language model.",
        )
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
    if config.tokenizer is None and not _has_tokenizer(folder):
        faults.append(Fault("--tokenizer", None, f"{config.model} has no tokenizer.json", "Give --tokenizer FOLDER."))
    if faults:
        raise UserError(faults)


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def load_tokenizer(config: BaseConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of `config.tokenizer`, or the model's own; random weights without one take the demo's.

    Raises `UserError` where there is none or it cannot be read.
    """
    from transformers import AutoTokenizer

    source, setting = _tokenizer_source(config)
    folder = Path(source)
    if folder.is_dir() and not _has_tokenizer(folder):
        raise UserError.of(setting, source, "the folder has no tokenizer.json", "Give a folder that has one.")
    if not folder.is_dir():
        hub.fetch_model_file(source, "tokenizer_config.json", config.revision, setting)
    try:
        revision = config.revision if source == model_source(config) else None
        return AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=config.trust_remote_code)
    except (ValueError, OSError, KeyError, json.JSONDecodeError) as error:
        raise UserError.of(
            setting,
            source,
            f"its tokenizer cannot be read ({_first_line(error)})",
            "Give a folder with tokenizer.json and tokenizer_config.json.",
        ) from None


def _tokenizer_source(config: BaseConfig) -> tuple[str, str]:
    """The folder or hub id of the tokenizer, and the setting that it comes from."""
    if config.tokenizer is not None:
        return (str(demo.base_folder()) if config.tokenizer == "demo" else config.tokenizer), "--tokenizer"
    folder = Path(model_source(config))
    if config.weights == "random" and not (folder.is_dir() and _has_tokenizer(folder)):
        return str(demo.base_folder()), "--model"  # any text will do
    return str(folder), "--model"


def max_positions(architecture: PretrainedConfig) -> int | None:
    """The longest sequence that the model has positions for; None where it has no limit."""
    return getattr(architecture, "max_position_embeddings", None)


def load_base(
    config: BaseConfig,
    device: torch.device,
    seed: int = 0,
    architecture: PretrainedConfig | None = None,
    dtype: torch.dtype | None = None,
) -> PreTrainedModel:
    """The base model on `device`, quantized as told, every weight frozen unless `config.full`.

    Linear layers in the blocks are 4- or 8-bit; embeddings, norms, biases and the head have `dtype`, unset that of
    `compute_dtype` (another is for the release of a run that was made on another kind of device). On the `meta`
    device the model has the same structure but no values, whatever `config.weights` says: for the planner.
    `architecture` overrides the one that `config` names (which must be None for pretrained weights).
    Raises `UserError` where it is not found or cannot be read.
    """
    assert architecture is None or config.weights == "random" or device.type == "meta", "it would not fit the weights"
    if device.type == "cpu":
        host_memory.return_large_blocks()
    if architecture is None:
        architecture = load_model_config(config)
    dtype = compute_dtype(config, device) if dtype is None else dtype
    if device.type == "meta":
        model = _build_meta(architecture, config, device, dtype)
    elif config.weights == "random":
        model = _build_random(architecture, config, device, seed, dtype)
    else:
        model = _load_pretrained(architecture, config, device, dtype)
    _keep_weights_plain(model)
    model.requires_grad_(config.full)
    model.config.use_cache = False  # no cache in training; generation asks for its own
    return model


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
    if device.type == "cpu":
        host_memory.return_large_blocks()
    model = _load_pretrained(load_model_config(config), config, device, None)
    _keep_weights_plain(model)
    model.requires_grad_(False)
    return model


def quantization(config: BaseConfig, dtype: torch.dtype) -> Any:
    """The quantization settings for `config.bits`, or None for 16 and 32."""
    from transformers import BitsAndBytesConfig

    if config.bits == 4:
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=config.quant_type,
            bnb_4bit_use_double_quant=config.double_quant,
            bnb_4bit_compute_dtype=dtype,
        )
    return BitsAndBytesConfig(load_in_8bit=True) if config.bits == 8 else None


def _load_pretrained(
    architecture: PretrainedConfig, config: BaseConfig, device: torch.device, dtype: torch.dtype | None
) -> PreTrainedModel:
    """The model in the files of `config`, quantized as told from `dtype`; None for both as the files have them."""
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    try:
        model, loaded = AutoModelForCausalLM.from_pretrained(
            model_source(config),
            config=architecture,
            revision=config.revision,
            dtype="auto" if dtype is None else dtype,
            quantization_config=None if dtype is None else quantization(config, dtype),
            device_map={"": str(device)},
            use_safetensors=True,
            trust_remote_code=config.trust_remote_code,
            output_loading_info=True,
        )
    except (SafetensorError, OSError, ValueError, RuntimeError, ImportError) as error:
        if "out of memory" in str(error):
            raise
        raise UserError.of(
            "--model",
            config.model,
            f"its weights cannot be read ({_first_line(error)})",
            "Fetch or convert the model again.",
        ) from None
    _check_loaded(config, loaded)
    return model


def _check_loaded(config: BaseConfig, loaded: dict[str, Any]) -> None:
    """Check that every weight came from the files. Raises `UserError` naming those that did not."""
    wrong = sorted(str(name) for key in ("missing_keys", "mismatched_keys") for name in loaded.get(key) or ())
    if wrong:
        rule = f"its files lack, or have in another shape, {len(wrong)} weights: {', '.join(wrong[:3])}"
        raise UserError.of("--model", config.model, rule, "Fetch or convert the model again.")


def _build_random(
    architecture: PretrainedConfig, config: BaseConfig, device: torch.device, seed: int, dtype: torch.dtype
) -> PreTrainedModel:
    """Seeded weights of true shapes, made and quantized one layer at a time so that 16-bit copies never add up."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(architecture, dtype=dtype)
    originals = {
        name: module
        for name, module in model.named_modules()
        if next(module.parameters(recurse=False), None) is not None
    }
    _replace_linear_layers(model, config, dtype)
    for name in list(originals):
        _materialize(model, name, originals.pop(name), dtype, device, seed)
    for buffer_owner in model.modules():
        for key, buffer in list(buffer_owner._buffers.items()):
            if buffer is not None:
                buffer_owner._buffers[key] = buffer.to(device)
    model.tie_weights()
    model.name_or_path = config.model
    return model.eval()


def _replace_linear_layers(model: PreTrainedModel, config: BaseConfig, dtype: torch.dtype) -> None:
    """Put bitsandbytes' layers, still empty, in the place of those to quantize, and mark the model as quantized."""
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear
    from transformers.quantizers.auto import AutoHfQuantizer
    from transformers.quantizers.base import get_keys_to_not_convert

    settings = quantization(config, dtype)
    if settings is None:
        return
    replace_with_bnb_linear(model, get_keys_to_not_convert(model), settings)
    model.is_quantized, model.quantization_method = True, settings.quant_method
    model.hf_quantizer = AutoHfQuantizer.from_config(settings, pre_quantized=False)
    setattr(model, f"is_loaded_in_{config.bits}bit", True)
    model.config.quantization_config = settings


def _build_meta(
    architecture: PretrainedConfig, config: BaseConfig, device: torch.device, dtype: torch.dtype
) -> PreTrainedModel:
    """The structure without values: every parameter, buffer and quantization state is a tensor on `meta`."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    with device, no_init_weights():
        model = AutoModelForCausalLM.from_config(architecture, dtype=dtype)
    shapes = {name: p.dtype for name, p in model.named_parameters()}
    _replace_linear_layers(model, config, dtype)
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if hasattr(weight, "_quantize"):  # `Params4bit.to("meta")` would skip the quantization
            value = torch.empty(weight.shape, dtype=shapes[f"{name}.weight"], device=device)
            with _code_tables_kept():
                module.weight = type(weight)(value, requires_grad=False, **weight.__dict__)._quantize(device)
            if module.bias is not None:
                module.bias.data = module.bias.data.to(value.dtype)
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


def _materialize(
    model: PreTrainedModel, name: str, original: nn.Module, dtype: torch.dtype, device: torch.device, seed: int
) -> None:
    """Give the module `name` of `model` the seeded weights of `original`, quantized where it is a 4- or 8-bit layer.

    The seed is the layer's own, so that its weights are the same at every number of bits.
    """
    import torch
    from torch import nn

    layer_seed = int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7], "big")
    original.to_empty(device=device, recurse=False)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
        torch.manual_seed(layer_seed)
        for parameter in original.parameters(recurse=False):
            parameter.zero_()
        model._init_weights(original)
    module = model.get_submodule(name)
    for key, parameter in original.named_parameters(recurse=False):
        value = parameter.detach().to(dtype)
        if key == "weight" and module is not original:
            if isinstance(original, nn.Linear) is False:  # Conv1D stores in × out
                value = value.T.contiguous()
            kind = type(module.weight)
            module.weight = kind(value, requires_grad=False, **module.weight.__dict__).to(device)
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
        digest.update(_file_digest(file))
    return f"sha256:{digest.hexdigest()}"


def _weight_files(source: Path, config: BaseConfig) -> Iterator[Path]:
    if not source.is_dir():
        source = hub.fetch_model_file(str(source), "config.json", config.revision).parent
    yield source / "config.json"
    yield from sorted(source.glob("*.safetensors"))


def _file_digest(file: Path) -> bytes:
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
