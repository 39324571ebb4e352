"""`qlora-kit train`."""

from __future__ import annotations

from qlora_kit.config.settings import RunConfig
from qlora_kit.model import source


def run(config: RunConfig) -> None:
    """Train as `config` says. A hub that does not answer is found before the heavy libraries are imported."""
    source.find_on_hub(config.base)
    from qlora_kit.training.run import train

    train(config)
