"""qlora_kit: fine-tune large language models on the GPU you own.

from qlora_kit import BaseConfig, RunConfig, train
result = train(RunConfig(base=BaseConfig(model="gpt2-large", bits=4)))
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qlora_kit.config.settings import (
    AdapterConfig,
    BaseConfig,
    DataConfig,
    EvalConfig,
    LeanConfig,
    OptimConfig,
    RunConfig,
    SearchConfig,
)
from qlora_kit.errors import UserError

if TYPE_CHECKING:
    from qlora_kit.training.run import RunResult, train

__all__ = [
    "AdapterConfig",
    "BaseConfig",
    "DataConfig",
    "EvalConfig",
    "LeanConfig",
    "OptimConfig",
    "RunConfig",
    "RunResult",
    "SearchConfig",
    "UserError",
    "train",
]


def __getattr__(name: str) -> Any:
    """Import the heavy part only when it is used, so that `--help` and settings stay light."""
    if name in ("train", "RunResult"):
        import importlib

        return getattr(importlib.import_module("qlora_kit.training.run"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
