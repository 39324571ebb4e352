"""`qlora-kit train`."""

from __future__ import annotations

from qlora_kit.cli.flags import Command
from qlora_kit.config.settings import RunConfig


def run(config: RunConfig) -> None:
    """Train as `config` says. A hub that does not answer is found before the heavy libraries are imported."""
    from qlora_kit.model import source

    source.find_on_hub(config.base)
    from qlora_kit.training.run import train

    train(config)


COMMAND = Command(
    run=run,
    example="qlora-kit train --model Qwen/Qwen3-0.6B --data chat.jsonl --epochs 2 --out runs/chat",
)
