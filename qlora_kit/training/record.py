"""What `run.json` says of a run, from before its first step to its end."""

from __future__ import annotations

import dataclasses
import platform
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from qlora_kit.model import quantize, source
from qlora_kit.model.device import compute_dtype
from qlora_kit.runs.inputs import digest_of
from qlora_kit.system import files
from qlora_kit.training.result import RunResult

if TYPE_CHECKING:
    import torch

    from qlora_kit.training.prepare import Prepared


def run_record(prepared: Prepared) -> dict[str, Any]:
    """What is known before the first step; the settings in it repeat the run. Reads the base to hash it."""
    config, inputs = prepared.config, prepared.inputs
    return {
        "settings": config.to_dict(),
        "resolved": {
            "optim": prepared.optim,
            "seq_len": inputs.seq_len,
            "alpha": config.adapter.resolved_alpha,
            "dtype": str(compute_dtype(config.base, prepared.device)).removeprefix("torch."),
        },
        "base_hash": source.hash_base(config.base, config.seed),
        "parameters": dataclasses.asdict(quantize.count_parameters(prepared.built.model)),
        "lean": {name: outcome.said() for name, outcome in prepared.built.outcomes.items()},
        "examples": {"train": len(inputs.train), "evaluation": len(inputs.evaluation) if inputs.evaluation else 0},
        "held_out_hash": digest_of(inputs.held_out),
        "truncated": inputs.report.truncated,
        "dropped": inputs.report.examples - inputs.report.kept,
        "plain_text": inputs.plain_text,
        "device": _name_of(prepared.device),
        "versions": files.versions(),
        "started": _now(),
    }


def finished_record(record: Mapping[str, Any], result: RunResult) -> dict[str, Any]:
    """The same of a run that has ended with `result`."""
    results = {k: v for k, v in dataclasses.asdict(result).items() if k not in ("folder", "adapter")}
    return {**record, "steps": result.steps, "results": results, "finished": _now()}


def _name_of(device: torch.device) -> str:
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_name(device)
    return f"CPU, {platform.machine()}"


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
