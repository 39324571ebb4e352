"""A search on a tiny model, for the tests of what searches."""

from __future__ import annotations

import gc
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console
from tiny_runs import TinyRuns

from qlora_kit import SearchConfig
from qlora_kit.search import fold_run
from qlora_kit.search.result import SearchResult
from qlora_kit.search.run import search
from qlora_kit.search.space import Space

N_EXAMPLES = 6
ROWS = [{"text": f"{i} and {i + 1} make {2 * i + 1}"} for i in range(N_EXAMPLES)]


def settings_of(tiny_runs: TinyRuns, out: Path, **changes) -> dict[str, object]:
    """The settings of a search over two ranks, each run one step on a tiny gpt2."""
    return {
        "model": str(tiny_runs.base("gpt2")),
        "data": str(tiny_runs.data(ROWS, "search")),
        "bits": 32,
        "adapter_dtype": "fp32",
        "device": "cpu",
        "seq_len": 32,
        "batch_size": 4,
        "max_steps": 1,
        "warmup": 0.0,
        "preflight": False,
        "out": str(out),
        "r": "2,4",
        "lr": 1e-2,
        **changes,
    }


def search_of(flat: dict[str, object], say: io.StringIO | None = None, **settings) -> SearchResult | None:
    """Search as `flat` says, in two folds unless `settings` say otherwise."""
    settings = {"folds": 2, **settings}
    console = Console(file=say if say is not None else io.StringIO(), width=300)
    return search(Space.from_flat(flat), SearchConfig.from_flat(settings), console)


def note_trainings(monkeypatch, file: Path) -> None:
    """Add a line to `file` for each fold that is trained: the process, the combination and the fold."""
    train = fold_run._train

    def noted(config, examples, folder):
        with file.open("a") as notes:
            notes.write(f"{os.getpid()} {folder.parent.name} {folder.name}\n")
        train(config, examples, folder)

    monkeypatch.setattr(fold_run, "_train", noted)


def trainings(file: Path) -> list[str]:
    """What was trained, in order: `r=2/fold-1`."""
    return ["/".join(line.split()[1:]) for line in file.read_text().splitlines()] if file.exists() else []


@pytest.fixture(scope="module", autouse=True)
def light_collections() -> Iterator[None]:
    """A run collects garbage twice, which takes long among all that the libraries hold: leave that out."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


FOUR = ["r=2/fold-1", "r=2/fold-2", "r=4/fold-1", "r=4/fold-2"]


def results_of(folder: Path) -> dict[str, list[float]]:
    content = json.loads((folder / "results.json").read_text())
    return {json.dumps(one["point"]): one["values"] for one in content["tried"]}
