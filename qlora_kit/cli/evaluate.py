"""`qlora-kit eval`: what a run trained, its base and a release on the same tokens, or any model alone."""

from __future__ import annotations

import json as jsonlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from qlora_kit.cli.flags import Command, as_given
from qlora_kit.cli.open_model import faults_of_choice
from qlora_kit.config.rules import Checked, setting
from qlora_kit.config.settings import DEFAULT_ASKED, RunConfig
from qlora_kit.errors import Fault, UserError, named
from qlora_kit.system import quiet


@dataclass(frozen=True, kw_only=True)
class EvalFlags(Checked):
    """The flags of this command alone."""

    run: str | None = setting(None, "finished run: its base and its trained model are evaluated", metavar="FOLDER")
    release: str | None = setting(
        None, "also evaluate this model, on the same tokens: folder or hub id", metavar="MODEL"
    )
    base: str | None = setting(None, "where the run's base is now, if it has moved", metavar="MODEL")
    json: bool = setting(False, "print JSON instead of a table")


SETTINGS = {
    "model": "model to evaluate instead of a run: folder or hub id",
    "revision": "",
    "bits": "load --model in so many bits; unset: as it was saved",
    "tokenizer": "",
    "data": "data to evaluate on; unset: what the run held out",
    "columns": "",
    "seq_len": "longest example in tokens; unset: the run's",
    "exact_match": f"prompts to answer, to count exact matches; unset: as the run, else {DEFAULT_ASKED}",
    "batch_size": "examples in a forward pass (default: the run's)",
    "device": "",
    "trust_remote_code": "",
}
OF_A_MODEL = ("model", "revision", "bits", "tokenizer")  # what a run has of its own
WIDTH = 10_000  # columns where the output is no terminal: a line is never broken


def run(
    given: Mapping[str, Any],
    run: str | None = None,
    release: str | None = None,
    base: str | None = None,
    json: bool = False,
) -> None:
    """Evaluate the run, or the model in `given`, and print what was found, as a table or `json`.

    Progress goes to standard error. `given` holds those settings that were given, by name. Raises `UserError`.
    """
    _check(given, run, release, base)
    quiet.quiet_libraries()
    from qlora_kit.evaluate.evaluate import evaluate, evaluate_model
    from qlora_kit.model.device import resolve_device
    from qlora_kit.runs import finished, messages
    from qlora_kit.system.progress import say_line

    found = None if run is None else finished.find_run(run, given, base)
    config = RunConfig.from_flat(given) if found is None else found.config
    device = resolve_device(config.base.device)
    quiet.quiet_progress_bars()
    say = Console(stderr=True, highlight=False)
    for line in messages.opening(config, device):
        say_line(say, line)
    with finished.memory_errors(config.base.device):
        if found is None:
            opened = finished.open_model(config.base, device, as_saved="bits" not in given)
            task, result = opened.task, evaluate_model(config, opened, given["data"], say)
        else:
            task, result = found.task, evaluate(found, given.get("data"), release, say)
    if json:
        print(jsonlib.dumps(task.evaluation_dict(result), indent=2, ensure_ascii=False))
        return
    console = Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH)
    for part in task.evaluation_lines(result):
        say_line(console, part) if isinstance(part, str) else console.print(part)


def _check(given: Mapping[str, Any], run: str | None, release: str | None, base: str | None) -> None:
    """The rules that join several flags. Raises one `UserError` with every fault."""
    hint = f" ({named('release')} adds a model, {named('base')} says where a base moved)"
    faults = faults_of_choice(given, run, None, OF_A_MODEL, hint)
    if run is None and "model" in given:
        others = {"release": release, "base": base}
        rule, remedy = f"needs {named('run')}", f"Evaluate each model on its own with {named('model')}."
        faults += [Fault(name, value, rule, remedy) for name, value in others.items() if value is not None]
        if "data" not in given:
            remedy = f"Give {named('data', 'FILE')}."
            faults.append(Fault("data", None, "is required: a model has no held-out data", remedy))
    if faults:
        raise UserError(faults)


COMMAND = Command(
    run=run,
    example="qlora-kit eval --run runs/chat --release release/chat",
    flags=EvalFlags,
    settings=SETTINGS,
    read=as_given,
)
