"""The result of a search as a table, as JSON, and as settings to train with."""

from __future__ import annotations

import dataclasses
from typing import Any

import yaml
from rich.table import Table

from qlora_kit.config.rules import default_of
from qlora_kit.config.settings import PER_CALL, RunConfig, settings
from qlora_kit.search.choice import Tried
from qlora_kit.search.result import SearchResult
from qlora_kit.system import files
from qlora_kit.system.progress import human_bytes
from qlora_kit.training.check import OF_HELD_OUT

RESULTS_FILE, BEST_FILE = "results.json", "best.yaml"
SAID = ("model", "data")  # written to the file even if they have their default


def table(result: SearchResult) -> Table:
    """Every combination with its mean over the folds, the standard error of it, and their spread."""
    title = f"{result.metric} over {result.n_folds} folds"
    shown = Table(title=title, title_justify="left", box=None, padding=(0, 3, 0, 0), pad_edge=False)
    for name in result.tried[0].point:
        shown.add_column(name, justify="right", no_wrap=True)
    for heading in ("mean ± standard error", "spread", "trainable", "memory (planned)"):
        shown.add_column(heading, justify="right", no_wrap=True)
    shown.add_column("", overflow="fold")
    for one in result.tried:
        shown.add_row(*(str(value) for value in one.point.values()), *_figures(one), _note(one, result))
    return shown


def _figures(one: Tried) -> tuple[str, str, str, str]:
    mean = f"{one.mean:.4f} ± {one.standard_error:.4f}" if one.is_finished else ""
    spread = f"{min(one.values):.4f} – {max(one.values):.4f}" if one.values else ""
    trainable = "" if one.trainable is None else f"{one.trainable:,}"
    memory = "" if one.device_bytes is None else human_bytes(one.device_bytes)
    return mean, spread, trainable, memory


def _note(one: Tried, result: SearchResult) -> str:
    if not one.is_finished:
        return one.state
    notes = [word for word, is_it in (("best", one == result.best), ("chosen", one == result.chosen)) if is_it]
    return ", ".join(notes)


def closing(result: SearchResult) -> list[str]:
    """The choice, what is still open, and how to train with it, a line each."""
    best, chosen = result.best, result.chosen
    lines = [
        f"best: {best.label}: {result.metric} {best.mean:.4f} ± {best.standard_error:.4f}",
        f"chosen: {chosen.label}: the smallest rank within one standard error of the best ({chosen.mean:.4f})",
    ]
    if result.n_open:
        lines.append(
            f"{result.n_open} combinations are still open in other processes: the last one to finish chooses again"
        )
    lines.append(f"train with it: qlora-kit train --config {result.folder / BEST_FILE}")
    return lines


def write(result: SearchResult) -> None:
    """Write the results and the settings to train with into the folder of the search, each whole or not at all."""
    files.write_json(result.folder / RESULTS_FILE, _as_json(result))
    files.write_text(result.folder / BEST_FILE, best_yaml(result))


def _as_json(result: SearchResult) -> dict[str, Any]:
    return {
        "metric": result.metric,
        "folds": result.n_folds,
        "best": dict(result.best.point),
        "chosen": dict(result.chosen.point),
        "settings": result.config.to_dict(),
        "versions": files.versions(),
        "tried": [_tried_as_json(one) for one in result.tried],
    }


def _tried_as_json(one: Tried) -> dict[str, Any]:
    figures = {"mean": one.mean, "standard_error": one.standard_error} if one.is_finished else {}
    return {**dataclasses.asdict(one), **figures}


def best_yaml(result: SearchResult) -> str:
    """The chosen settings and those that differ from their default, as `train --config` reads them.

    Settings that need held-out data are left out if a run would have none: in the search the folds were held out.
    """
    chosen = result.chosen
    lines = [
        f"# chosen by qlora-kit search: {chosen.label}",
        f"# {result.metric} {chosen.mean:.4f} ± {chosen.standard_error:.4f} over {result.n_folds} folds; the smallest "
        "rank within one standard error of the best",
    ]
    return "\n".join(lines) + "\n" + yaml.safe_dump(_to_train_with(result.config, chosen), sort_keys=False)


def _to_train_with(config: RunConfig, chosen: Tried) -> dict[str, Any]:
    plain = config.to_dict()
    dropped = {*PER_CALL, *(OF_HELD_OUT if not config.data.holds_out else ())}
    found: dict[str, Any] = {}
    for group, f, _ in settings():
        owner = getattr(config, group) if group else config
        is_told = f.name in (*SAID, *chosen.point) or getattr(owner, f.name) != default_of(f)
        if is_told and f.name not in dropped:
            found[f.name] = (plain[group] if group else plain)[f.name]
    return found
