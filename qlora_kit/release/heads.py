"""The new head in a release: its weights come from the adapter alone, and `config.json` says what its answers mean."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora_kit.config.settings import BaseConfig
from qlora_kit.data import prepare_tokenizer
from qlora_kit.errors import UserError
from qlora_kit.model import load, source
from qlora_kit.model.heads import is_in_head
from qlora_kit.model.task_models import GENERATION, TASK_MODELS, class_name, task_of
from qlora_kit.model.tokenizer import load_tokenizer
from qlora_kit.release.factors import SETTING, Adapter
from qlora_kit.release.files.read import Checkpoint
from qlora_kit.release.files.side_files import GENERATION_FILE
from qlora_kit.runs.folder import LABELS_FILE
from qlora_kit.tasks.text2text.task import greedy_settings


def with_task(config: BaseConfig, adapters: Sequence[Adapter]) -> BaseConfig:
    """`config` with the task of the adapters and its labels, where no run has said them. Raises `UserError`."""
    if config.task is not None:
        return config
    kinds = {str(adapter.settings.get("task_type")) for adapter in adapters}
    named = next((name for name, own in TASK_MODELS.items() if own.loss is not None and own.peft_type in kinds), None)
    if named is None:
        return config
    file = adapters[0].folder / LABELS_FILE
    if not file.is_file():
        return dataclasses.replace(config, task=named)
    try:
        saved: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        labels, several = tuple(map(str, saved["labels"])), bool(saved["multi_label"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError.of(
            SETTING, adapters[0].given, f"its {file.name} cannot be read ({error})", "Mend it."
        ) from None
    return dataclasses.replace(config, task=named, labels=labels or None, multi_label=several)


def head_names(config: BaseConfig) -> list[str]:
    """The names of the modules that the task puts beside the base; empty where it has its own head."""
    architecture = source.load_model_config(config)
    return load.planned_heads(architecture, task_of(config.task, architecture))


def with_heads(checkpoint: Checkpoint, adapters: Sequence[Adapter], heads: Sequence[str]) -> Checkpoint:
    """The base's tensors, and in the place of its head the one in the adapter's file. Raises `UserError`."""
    found = {
        name: adapter.checkpoint.entries[key]
        for adapter in adapters
        for name, key in adapter.whole.items()
        if is_in_head(name, heads)
    }
    if not found:
        return checkpoint
    scaled = [adapter for adapter in adapters if adapter.weight != 1.0]
    if scaled:
        rule = f"cannot have the weight {scaled[0].weight:g}: it holds a head, of which the base has none to mix with"
        raise UserError.of(SETTING, scaled[0].given, rule, "Merge it with weight 1.")
    kept = {name: entry for name, entry in checkpoint.entries.items() if not is_in_head(name, heads)}
    return Checkpoint({**kept, **found})


def config_fields(config: BaseConfig) -> Mapping[str, Any]:
    """What `config.json` says beside what the base's said: the class, the labels, and what is padding.

    Of text to text it is the class and the prefix of the sources, under the name that transformers has for that.
    """
    import torch

    architecture = source.load_model_config(config)
    task = task_of(config.task, architecture)
    if TASK_MODELS[task].decodes:
        has_prefix = config.source_prefix is not None or hasattr(architecture, "prefix")
        prefix = {"prefix": config.source_prefix or ""} if has_prefix else {}
        return {"architectures": [class_name(task, architecture)], **prefix}
    if task == GENERATION or not TASK_MODELS[task].has_new_head:
        return {}
    load.set_padding(architecture, config, torch.device("cpu"))
    return {
        "architectures": [class_name(task, architecture)],
        "id2label": {str(number): label for number, label in architecture.id2label.items()},
        "label2id": dict(architecture.label2id),
        "problem_type": architecture.problem_type,
        "pad_token_id": architecture.pad_token_id,
    }


def generation_fields(config: BaseConfig, folder: Path) -> dict[str, Any] | None:
    """What `generation_config.json` is to say, for a base in `folder`; None where it stays as the base's.

    Of text to text it is what `predict` answers by, so that the release answers the same by itself.
    """
    from transformers import GenerationConfig

    architecture = source.load_model_config(config)
    if not TASK_MODELS[task_of(config.task, architecture)].decodes:
        return None
    has_own = (folder / GENERATION_FILE).is_file()
    own = GenerationConfig.from_pretrained(folder) if has_own else GenerationConfig.from_model_config(architecture)
    tokenizer = prepare_tokenizer(load_tokenizer(config), generates=False)
    return greedy_settings(own, architecture, tokenizer)
