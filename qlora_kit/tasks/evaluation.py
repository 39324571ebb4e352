"""How well models do on held-out examples: the scores of one, and those of several beside each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Scores:
    """How well a model does on held-out examples: figures by name, and for a task that has more to say its report."""

    metrics: dict[str, float]
    report: Mapping[str, Any] = field(default_factory=dict)  # plain values, ready for JSON


@dataclass(frozen=True, kw_only=True)
class ModelScores:
    """What one model reaches; `exact_match` is the share of prompts answered to the letter, None where none was asked.

    `model` says in words what it is.
    """

    model: str
    scores: Scores
    exact_match: float | None = None


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What models of one task reach, by name (base, adapter or full, release; or model), and on what.

    `encoded` is the set that all were scored on, with its report; `prompts` were asked for exact answers.
    """

    source: str
    seq_len: int
    encoded: Any
    prompts: int
    models: Mapping[str, ModelScores]
    warning: str | None  # what to mind about the base
