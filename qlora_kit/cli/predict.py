"""`qlora-kit predict`: the answers of a trained model to examples, a line of JSON each.

They go to `--out`, written whole, or to standard output; everything else to standard error.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from qlora_kit.cli.flags import Command, as_given
from qlora_kit.cli.open_model import faults_of_choice, open_chosen
from qlora_kit.config.rules import Checked, setting
from qlora_kit.config.settings import RunConfig
from qlora_kit.errors import Fault, UserError, named
from qlora_kit.system import files, quiet


@dataclass(frozen=True, kw_only=True)
class PredictFlags(Checked):
    """The flags of this command alone."""

    run: str | None = setting(None, "finished run, whose trained model predicts", metavar="FOLDER")
    base: str | None = setting(None, "where the run's base is now, if it has moved", metavar="MODEL")


SETTINGS = {
    "model": "model to ask instead of a run: folder or hub id, e.g. a release",
    "revision": "",
    "bits": "load --model in so many bits; unset: as it was saved",
    "tokenizer": "",
    "data": "examples, in any form that train takes; answers in it are ignored",
    "columns": "",
    "out": "file for the predictions, JSON lines; unset: standard output",
    "batch_size": "examples in a forward pass (default: 4, or the run's)",
    "seq_len": "longest example in tokens; unset: the run's",
    "source_prefix": "text before each source for --model; unset: what its config.json says",
    "device": "",
    "trust_remote_code": "",
}
OF_A_RUN = ("model", "revision", "bits", "tokenizer", "source_prefix")  # what a run has of its own


def run(given: Mapping[str, Any], run: str | None = None, base: str | None = None) -> None:
    """Answer the examples of `given["data"]` with the model of `run`, or with `given["model"]`.

    `given` holds those settings that were given, by name. Raises `UserError`.
    """
    _check(given, run, base)
    quiet.quiet_libraries()
    from qlora_kit.evaluate.predict import predict, read_examples
    from qlora_kit.runs.finished import memory_errors
    from qlora_kit.runs.messages import unread_lines
    from qlora_kit.system.progress import counted, say_line

    say = Console(stderr=True, highlight=False)
    of_model = {k: v for k, v in given.items() if k not in ("data", "out")}
    config, opened = open_chosen(of_model, run, base, "columns", lambda *_: None, say)
    out = Path(given["out"]) if "out" in given else None
    if out is not None:
        files.check_file(out)
    columns = RunConfig.from_flat({"columns": given["columns"]}).data.columns if "columns" in given else {}
    asked = read_examples(opened, given["data"], columns, config.data.seq_len, config.data.columns)
    for line in unread_lines(asked.unread):
        say_line(say, line)
    with memory_errors(config.base.device):
        with say.status("loading the model"):
            model = opened.load()
        with counted(say, "predicted", len(asked.examples)) as tick:
            lines = [
                json.dumps(line, ensure_ascii=False) for line in predict(model, asked, config.optim.batch_size, tick)
            ]
    text = "".join(f"{line}\n" for line in lines)
    if out is None:
        sys.stdout.write(text)
        return
    with files.disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        files.write_text(out, text)
    say_line(say, f"{len(lines):,} predictions: {out}")


def _check(given: Mapping[str, Any], run: str | None, base: str | None) -> None:
    """The rules that join several flags. Raises one `UserError` with every fault."""
    faults = faults_of_choice(given, run, base, OF_A_RUN)
    if "data" not in given:
        remedy = f"Give {named('data', 'FILE')} with the examples to answer."
        faults.append(Fault("data", None, "is missing", remedy))
    elif "out" in given and _is_same_file(given["data"], given["out"]):
        rule = f"is the file of {named('data')}, which would be lost"
        faults.append(Fault("out", given["out"], rule, "Give the name of another file."))
    if faults:
        raise UserError(faults)


def _is_same_file(one: str, other: str) -> bool:
    paths = Path(one).expanduser(), Path(other)
    return all(path.is_file() for path in paths) and paths[0].samefile(paths[1])


COMMAND = Command(
    run=run,
    example="qlora-kit predict --run runs/reviews --data new.jsonl --out labels.jsonl",
    flags=PredictFlags,
    settings=SETTINGS,
    read=as_given,
)
