"""`qlora-kit train`."""

from __future__ import annotations

from qlora_kit import base
from qlora_kit.config import RunConfig


def run(config: RunConfig) -> None:
    """Train as `config` says. A hub that does not answer is found before the heavy libraries are imported."""
    base.find_on_hub(config.base)
    from qlora_kit.training import train

    train(config)
