"""One run of a search: a combination of settings, trained on all folds but one."""

from __future__ import annotations

import dataclasses
import gc
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from qlora_kit.config.settings import RunConfig
from qlora_kit.model import device
from qlora_kit.runs.folder import CARD_FILE, CHECKPOINTS, RUN_FILE, RunFolder
from qlora_kit.runs.inputs import Examples

DIVERGED, OUT_OF_MEMORY = "diverged", "out of memory"
WEIGHTS = ("adapter", "model", CHECKPOINTS)  # what a finished run leaves beside its figures, and its card names


class EndedEarlyError(Exception):
    """These settings give no figure, and others may; says why in a word."""


def run_fold(config: RunConfig, examples: Examples, folder: Path, keep: bool) -> Mapping[str, Any]:
    """The `run.json` of the run in `folder`, trained unless it is there; its figures are kept, and weights if `keep`.

    What the run says goes to a log beside the folder. One that does not end leaves nothing but the log.
    Raises `EndedEarlyError`, and `UserError` for what no other settings would mend.
    """
    if not (folder / RUN_FILE).is_file():
        _train(config, examples, folder)
    if not keep:
        for name in WEIGHTS:
            shutil.rmtree(folder / name, ignore_errors=True)
        (folder / CARD_FILE).unlink(missing_ok=True)
    record: dict[str, Any] = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
    return record


def _train(config: RunConfig, examples: Examples, folder: Path) -> None:
    import torch

    from qlora_kit.training.callback import DivergedError
    from qlora_kit.training.run import train

    is_planned = (
        config.preflight and device.resolve_device(config.base.device).type == "cuda"
    )  # elsewhere it is a record
    scored_at_its_end = dataclasses.replace(config.evaluation, keep_best=False)  # the fold that scores must not choose
    here = dataclasses.replace(
        config, evaluation=scored_at_its_end, out=str(folder), overwrite=True, preflight=is_planned
    )
    _forget_last_run()
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with folder.with_name(folder.name + ".log").open("w", encoding="utf-8") as log:
            train(here, Console(file=log, width=120), examples)
    except DivergedError:
        raise EndedEarlyError(DIVERGED) from None
    except torch.OutOfMemoryError:
        raise EndedEarlyError(OUT_OF_MEMORY) from None
    finally:  # a finished run has moved to its place
        RunFolder.at(folder).remove_unfinished()


def _forget_last_run() -> None:
    """Give back the memory of the run before, so that each has the device to itself and measures its own peak."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
