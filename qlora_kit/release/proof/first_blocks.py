"""The first blocks of a model as a model of its own, for a proof where the whole does not fit into memory.

No weights are copied: the stand-in's folder has a `config.json` with fewer blocks and links to everything else.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_kit.adapters.files import CONFIG_FILE as ADAPTER_CONFIG
from qlora_kit.adapters.files import WEIGHTS_FILE
from qlora_kit.model.blocks import block_of
from qlora_kit.release.files.read import Checkpoint, TensorEntry
from qlora_kit.system import files

MODEL_CONFIG = "config.json"


def blocks_that_fit(entries: Mapping[str, TensorEntry], available_bytes: int, bytes_per_weight: int) -> int:
    """How many of the first blocks fit into memory with all that is outside the blocks, at least one."""
    sizes: dict[int | None, int] = {}
    for name, entry in entries.items():
        sizes[block_of(name)] = sizes.get(block_of(name), 0) + entry.numel * bytes_per_weight
    room = available_bytes - sizes.get(None, 0)
    fitting = 0
    for number in sorted(number for number in sizes if number is not None):
        room -= sizes[number]
        if room < 0:
            break
        fitting = number + 1
    return max(1, fitting)


def first_blocks(folder: Path, count: int, stand_in: Path) -> Path:
    """Make `stand_in` a model of the first `count` blocks of the one in `folder`; returns it."""
    from transformers import AutoConfig

    stand_in.mkdir()
    config: Any = AutoConfig.from_pretrained(folder)
    blocks = config.num_hidden_layers
    for name, value in config.to_dict().items():
        if isinstance(value, list) and len(value) == blocks and name.startswith("layer"):  # one entry a block
            setattr(config, name, value[:count])
    config.num_hidden_layers = count
    config.save_pretrained(stand_in)
    for file in folder.iterdir():
        if file.is_file() and file.name != MODEL_CONFIG and not file.name.startswith("."):
            (stand_in / file.name).symlink_to(file.resolve())
    return stand_in


def adapter_of_first_blocks(folder: Path, count: int, stand_in: Path) -> Path | None:
    """Make `stand_in` the part of the adapter in `folder` that belongs to the first `count` blocks; returns it.

    None where the adapter has nothing there.
    """
    from safetensors.torch import save_file

    checkpoint = Checkpoint.open([folder / WEIGHTS_FILE])
    kept = {
        name: checkpoint.read(name)
        for name in checkpoint.entries
        if (number := block_of(name)) is None or number < count
    }
    if not kept:
        return None
    stand_in.mkdir()
    save_file(kept, stand_in / WEIGHTS_FILE, {"format": "pt"})
    files.write_bytes(stand_in / ADAPTER_CONFIG, (folder / ADAPTER_CONFIG).read_bytes())
    return stand_in
