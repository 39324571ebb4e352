"""What a search has found."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qlora_kit.config.settings import RunConfig
from qlora_kit.search.choice import Tried


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """What a search found in `folder`: every combination, the best one, and the one that is chosen.

    The chosen one has the smallest rank within one standard error of the best; `config` is a run with it.
    """

    folder: Path
    metric: str
    n_folds: int
    tried: tuple[Tried, ...]
    best: Tried
    chosen: Tried
    config: RunConfig

    @property
    def n_open(self) -> int:
        """Combinations that wait, or that other processes work on."""
        return sum(one.is_open for one in self.tried)
