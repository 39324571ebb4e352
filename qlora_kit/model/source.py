"""The source of a base, a folder or the hub: its configuration, its files and the hash of their content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit import demo
from qlora_kit.config.settings import BaseConfig
from qlora_kit.errors import Fault, UserError, named
from qlora_kit.model import architectures, hub
from qlora_kit.tasks import registry

if TYPE_CHECKING:
    from transformers import PretrainedConfig

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


def model_source(config: BaseConfig) -> str:
    """The folder or hub id that `config.model` stands for."""
    return str(demo.base_folder()) if config.model == "demo" else config.model


def find_on_hub(config: BaseConfig) -> None:
    """Check that the hub has the model, unless it is random or a local folder. Raises `UserError`."""
    source = model_source(config)
    if config.weights == "pretrained" and not Path(source).exists():
        hub.fetch_model_file(source, "config.json", config.revision)


def load_model_config(config: BaseConfig) -> PretrainedConfig:
    """The model's architecture with the task's labels, from the embedded table, a local folder, or the hub.

    Raises `UserError` if it is not found, cannot do the task, or lacks weights.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    source = model_source(config)
    if config.weights == "random":
        architecture = architectures.config_from(source)
    else:
        find_on_hub(config)
        if Path(source).exists():
            _check_folder(config, Path(source))
        try:
            architecture = AutoConfig.from_pretrained(
                source, revision=config.revision, trust_remote_code=config.trust_remote_code
            )
        except (*architectures.BAD_CONFIG, StrictDataclassError, OSError) as error:
            raise UserError.of(
                "model",
                config.model,
                f"its config.json cannot be used ({first_line(error)})",
                "Give a model that the installed transformers knows.",
            ) from None
    return with_labels(architecture, config)


def with_labels(architecture: PretrainedConfig, config: BaseConfig) -> PretrainedConfig:
    """`architecture` with the task's labels set, in place, so that every model built from it has them.

    Raises `UserError` if it cannot do the task.
    """
    task = registry.task_of(config, architecture)
    if not config.trust_remote_code:
        registry.check_can_do(task, architecture, config.model)
    task.model.configure(architecture, config)
    return architecture


def _check_folder(config: BaseConfig, folder: Path) -> None:
    faults = []
    if not (folder / "config.json").is_file():
        faults.append(
            Fault("model", config.model, "the folder has no config.json", "Give a transformers model folder.")
        )
    if not any((folder / name).is_file() for name in WEIGHT_FILES):
        if any(folder.glob("*.bin")):
            rule = "its weights are pickle files (.bin), which can run code when opened"
            remedy = "Convert them to safetensors first."
        else:
            rule, remedy = "the folder has no model.safetensors", f"Complete it, or use {named('weights', 'random')}."
        faults.append(Fault("model", config.model, rule, remedy))
    if config.tokenizer is None and not has_tokenizer(folder):
        remedy = f"Give {named('tokenizer', 'FOLDER')}."
        faults.append(Fault("tokenizer", None, f"{config.model} has no tokenizer.json", remedy))
    if faults:
        raise UserError(faults)


def has_tokenizer(folder: Path) -> bool:
    """Whether the folder holds a tokenizer."""
    return any(file.is_file() for pattern in VOCABULARY_PATTERNS for file in folder.glob(pattern))


def first_line(error: BaseException) -> str:
    """The first line of the message of `error`, or the name of its class if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def max_positions(architecture: PretrainedConfig) -> int | None:
    """The longest sequence that the model has positions for; None where it has no limit."""
    positions: int | None = getattr(architecture, "max_position_embeddings", None)
    if positions is not None and architecture.model_type in PADDED_POSITIONS:
        positions -= (architecture.pad_token_id or 0) + 1
    return positions


def hash_base(config: BaseConfig, seed: int) -> str:
    """A content hash of the base: the same weights give the same hash, wherever they are stored."""
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

    There may be others beside them (Mistral's `consolidated.safetensors`). Empty if there is neither a single file nor
    a readable index.
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
