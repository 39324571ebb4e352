"""`qlora-kit train`."""

from __future__ import annotations

from qlora_kit.config import RunConfig


def run(config: RunConfig) -> None:
    """Train as `config` says."""
    from qlora_kit.training import train

    train(config)
