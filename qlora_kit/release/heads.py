"""The new head in a release: its weights come from the adapter alone, and `config.json` says what its answers mean."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora_kit.config.settings import BaseConfig
from qlora_kit.errors import UserError
from qlora_kit.model import load, source
from qlora_kit.model.heads import is_in_head
from qlora_kit.model.tokenizer import load_tokenizer
from qlora_kit.release.factors import SETTING, Adapter
from qlora_kit.release.files.read import Checkpoint
from qlora_kit.release.files.side_files import GENERATION_FILE
from qlora_kit.runs.folder import LABELS_FILE
from qlora_kit.tasks import registry


def with_task(config: BaseConfig, adapters: Sequence[Adapter]) -> BaseConfig:
    """`config` with the task of the adapters and its labels, where no run has said them. Raises `UserError`."""
    if config.task is not None:
        return config
    kinds = {str(adapter.settings.get("task_type")) for adapter in adapters}
    found = (task for task in registry.all_tasks() if task.model.replaces_loss and task.model.peft_type in kinds)
    task = next(found, None)
    if task is None:
        return config
    file = adapters[0].folder / LABELS_FILE
    if not file.is_file():
        return dataclasses.replace(config, task=task.name)
    try:
        saved: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        labels, several = tuple(map(str, saved["labels"])), bool(saved["multi_label"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError.of(
            SETTING, adapters[0].given, f"its {file.name} cannot be read ({error})", "Mend it."
        ) from None
    return dataclasses.replace(config, task=task.name, labels=labels or None, multi_label=several)


def head_names(config: BaseConfig) -> list[str]:
    """The names of the modules that the task puts beside the base; empty where it has its own head."""
    architecture = source.load_model_config(config)
    return load.planned_heads(architecture, registry.task_of(config, architecture).model)


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
    """What `config.json` says beside what the base's said, as the task has it."""
    import torch

    architecture = source.load_model_config(config)
    task = registry.task_of(config, architecture)
    if task.model.has_new_head:
        load.set_padding(architecture, config, torch.device("cpu"))
    return task.config_fields(config, architecture)


def generation_fields(config: BaseConfig, folder: Path) -> dict[str, Any] | None:
    """What `generation_config.json` is to say, for a base in `folder`; None where it stays as the base's."""
    from transformers import GenerationConfig

    architecture = source.load_model_config(config)
    task = registry.task_of(config, architecture)
    if not task.model.decodes:
        return None
    has_own = (folder / GENERATION_FILE).is_file()
    own = GenerationConfig.from_pretrained(folder) if has_own else GenerationConfig.from_model_config(architecture)
    return task.generation_fields(own, architecture, task.prepare(load_tokenizer(config)))
