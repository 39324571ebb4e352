"""The command line: parse once, dispatch, print a user's mistakes. The only place that knows tyro."""

from __future__ import annotations

import functools
import importlib
import math
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import Field, dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypedDict

import tyro

from qlora_kit.config.files import read_settings_file
from qlora_kit.config.rules import default_of, fields_of, flag
from qlora_kit.config.settings import DEFAULT_ASKED, DEFAULT_NEW_TOKENS, RunConfig, SearchConfig, settings
from qlora_kit.errors import Fault, Faults, UserError, as_flag
from qlora_kit.system import quiet
from qlora_kit.tasks.registry import names as task_names


@dataclass(frozen=True)
class Flag:
    """A flag of one command only: its help, its type, and what reads its text."""

    help: str
    kind: type = str  # str, bool, or list for one that may be given several times
    read: Callable[[str], Any] | None = None


@dataclass(frozen=True)
class Command:
    """A command: what it does, the function behind it in `cli` ("module:function"), and flags of its own.

    The function is called with the settings and, by name, those of its own flags that were given. A command that
    reads a finished run takes only `settings`, each with a help that fits there ("" for the setting's own), and is
    called with those that were given, by name: the run has the others. One that takes `lists` is called with every
    setting that was given, as it was given, by name. `helps` are of settings that mean something else here.
    """

    help: str
    door: str
    flags: Mapping[str, Flag] = field(default_factory=dict)
    settings: Mapping[str, str] | None = None
    lists: bool = False
    helps: Mapping[str, str] = field(default_factory=dict)


def _default_text(f: Field[Any]) -> str:
    default = default_of(f)
    return "" if default in (None, False) else f" (default: {default})"


def _rows(text: str) -> tuple[int, ...]:
    """`3` or `1,5,17` as numbers. Raises `UserError`."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise UserError.of("--rows", text, "must be numbers of examples", "For example --rows 1,5,17.")
    return tuple(int(part) for part in parts)


def _count(flag: str, example: int) -> Callable[[str], int]:
    """What reads a number of things; it raises `UserError`."""

    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < 1:
            raise UserError.of(flag, text, "must be a whole number, at least 1", f"For example {flag} {example}.")
        return int(text)

    return read


def _number(flag: str, rule: str, holds: Callable[[float], bool], example: float) -> Callable[[str], float]:
    """What reads a number for which `holds`; it raises `UserError` with the `rule`."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and holds(value)):
            raise UserError.of(flag, text, rule, f"For example {flag} {example:g}.")
        return value

    return read


PROFILE_FLAGS = {
    "steps": Flag("optimizer steps to measure (default: 3)", read=_count("--steps", 3)),
    "snapshot": Flag("also write a file for PyTorch's memory viewer (CUDA only)", bool),
}
PLAN_FLAGS = {
    "gpu": Flag("GPU to plan for: rtx3060, rtx4090, t4, a100, h100, …"),
    "fit": Flag("list what fits into so much memory: 8GiB, 6000MiB, 24GB, or device (what is free on the one present)"),
    "exact": Flag("simulate every layer instead of extrapolating from 3 and 4", bool),
    "json": Flag("print JSON instead of tables", bool),
    "plot": Flag("draw the plan into this PNG file"),
    "baselines": Flag("compare with 16-bit LoRA and full fine-tuning (default: yes)", bool),
}
RUN_FLAG = "finished run folder"
BASE_FLAG = "the run's base, where it lies elsewhere now"
GENERATE_FLAGS = {
    "run": Flag(f"{RUN_FLAG}: its trained model answers, on the base as it was trained on"),
    "base": Flag(BASE_FLAG),
    "prompt": Flag("prompt to answer; may be given several times (unset: --data, or lines of standard input)", list),
    "max_new_tokens": Flag(
        f"most tokens of an answer (default: {DEFAULT_NEW_TOKENS})",
        read=_count("--max-new-tokens", DEFAULT_NEW_TOKENS),
    ),
    "temperature": Flag(
        "0: always the likeliest token; higher: drawn, and the more varied (default: 0)",
        read=_number("--temperature", "must be a number, at least 0", lambda v: v >= 0, 0.7),
    ),
    "top_p": Flag(
        "draw from the likeliest tokens that together have this probability (default: 1)",
        read=_number("--top-p", "must be greater than 0 and at most 1", lambda v: 0 < v <= 1, 0.9),
    ),
    "raw": Flag("go on with the prompt as it stands, in no template (as after training on plain text)", bool),
    "json": Flag("print one JSON object a prompt, as for --data", bool),
}
GENERATE_SETTINGS = {
    "model": "model folder or hub id that answers instead of a run, e.g. a release",
    "revision": "",
    "bits": "load --model in 4 | 8 | 16 | 32 bits; unset: as it was saved",
    "tokenizer": "",
    "data": "answer the prompts of this file, folder or data set, in the forms of training; JSON lines",
    "columns": "",
    "batch_size": "prompts of --data answered at once (default: 4, or the run's)",
    "seed": "seed of what --temperature draws (default: 42)",
    "device": "",
    "trust_remote_code": "",
}
PREDICT_FLAGS = {"run": Flag(RUN_FLAG), "base": Flag(BASE_FLAG)}
PREDICT_SETTINGS = {
    "model": "model folder or hub id that predicts instead of a run, e.g. a release",
    "revision": "",
    "bits": "load --model in 4 | 8 | 16 | 32 bits; unset: as it was saved",
    "tokenizer": "",
    "data": "the examples: a file, folder or data set, in the forms of training; answers are not looked at",
    "columns": "",
    "out": "file of the predictions, a line of JSON each; unset: standard output",
    "batch_size": "examples in a forward pass (default: 4, or the run's)",
    "seq_len": "tokens an example may have; unset: the run's",
    "source_prefix": "text before each source for --model; unset: what its config.json says",
    "device": "",
    "trust_remote_code": "",
}
EVAL_FLAGS = {
    "run": Flag(RUN_FLAG),
    "release": Flag("also evaluate this model folder or hub id, on the same tokens"),
    "base": Flag(BASE_FLAG),
    "json": Flag("print JSON instead of a table", bool),
}
EVAL_SETTINGS = {
    "model": "model folder or hub id to evaluate alone instead of a run, e.g. a release of an adapter made elsewhere",
    "revision": "",
    "bits": "load --model in 4 | 8 | 16 | 32 bits; unset: as it was saved",
    "tokenizer": "",
    "data": "data to evaluate on; unset: what the run held out",
    "columns": "",
    "seq_len": "tokens an example may have; unset: the run's",
    "exact_match": f"answer so many prompts, and count exact matches (unset: as the run, else {DEFAULT_ASKED})",
    "batch_size": "examples in a forward pass (default: the run's)",
    "device": "",
    "trust_remote_code": "",
}
MERGE_FLAGS = {
    "run": Flag(f"{RUN_FLAG}: its adapter is merged, into the base as it was trained on"),
    "adapter": Flag(
        "adapter made elsewhere, DIR or DIR:weight; may be given several times, their changes then add up", list
    ),
    "base": Flag("the base of --adapter, or where the run's base lies now: folder, hub id or 'demo'"),
    "into": Flag(
        "base to merge into: trained (as the adapter saw it, e.g. nf4 and back) | original | best (both are scored "
        "on --data, the better one is kept) (default: trained)"
    ),
    "dtype": Flag("dtype of the release: bf16 | fp16 | fp32 (default: bf16)"),
    "format": Flag("dense | nf4 (quantized after the merge, for bitsandbytes) (default: dense)"),
    "allow_other_base": Flag("merge although the base is not the one that the run was trained on", bool),
}
MERGE_SETTINGS = {
    "out": "folder of the release",
    "overwrite": "replace an existing release",
    "data": "what the proof asks, and what --into best is decided on; unset: the run's held-out data",
    "columns": "",
    "seq_len": "tokens an example of it may have; unset: the run's",
    "bits": "how --adapter saw its base: 4 | 8 | 16 | 32 (default: 4)",
    "quant_type": "",
    "double_quant": "",
    "revision": "",
    "tokenizer": "tokenizer of the release; unset: the adapter's, else the base's",
    "source_prefix": "text before each source that --adapter was trained with; unset: the run's",
    "trust_remote_code": "",
}
SEARCH_FLAGS = {
    f.name: Flag(f.metadata["help"] + _default_text(f), bool if hint is bool else str)
    for f, hint in fields_of(SearchConfig)
}
SEARCH_HELPS = {
    "out": "folder of the search, which goes on where it is there already; unset: search/<model>",
    "overwrite": "begin anew where the folder is there already",
    "seed": "seed of the folds, of tpe, and of every run",
    "resume": "not for a search: the same command goes on",
}
COMMANDS = {
    "train": Command("fine-tune a model: the base frozen in 4 bits, LoRA factors on top", "train:run"),
    "plan": Command("predict the memory of a run, and what fits; needs no GPU", "plan:run", PLAN_FLAGS),
    "profile": Command("measure the memory of a few steps beside what was predicted", "profile:run", PROFILE_FLAGS),
    "preview": Command(
        "show examples token by token, and audit the data",
        "preview:preview",
        {"rows": Flag("numbers of the examples to show, e.g. 1,5,17 (default: 1,2,3)", read=_rows)},
    ),
    "merge": Command(
        "merge the adapter of a run into its base, and prove that the release is right",
        "merge:run",
        MERGE_FLAGS,
        MERGE_SETTINGS,
    ),
    "generate": Command(
        "answer prompts with the model of a finished run, or with any other",
        "generate:run",
        GENERATE_FLAGS,
        GENERATE_SETTINGS,
    ),
    "predict": Command(
        "labels with their scores, or texts, from the model of a finished run or from a release",
        "predict:run",
        PREDICT_FLAGS,
        PREDICT_SETTINGS,
    ),
    "eval": Command(
        "loss, perplexity and exact match of base, adapter and release, side by side; of other tasks their own figures",
        "evaluate:run",
        EVAL_FLAGS,
        EVAL_SETTINGS,
    ),
    "search": Command(
        "choose settings by cross-validation: every number of --r, --lr, … may be several, as in --r 4,8,16",
        "search:run",
        SEARCH_FLAGS,
        lists=True,
        helps=SEARCH_HELPS,
    ),
}
FILES = ("data", "eval_data")
ONE_FOLDER = "Give one; to read several files, put them into a folder (none of them named after a split) and give that."
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
EXIT_PIPE_CLOSED = 141


def main(argv: Sequence[str] | None = None) -> None:
    """Run `qlora-kit`; exits with 2 on a mistake that the user can mend."""
    args = list(sys.argv[1:] if argv is None else argv)
    signal.signal(signal.SIGTERM, _terminate)
    try:
        _run(args)
    except UserError as error:
        print(f"error: {error.text(as_flag)}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:  # `| head` has read enough; Python would complain once more when it closes the output
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_PIPE_CLOSED)


def _run(args: list[str]) -> None:
    try:
        if not args or args[0] in ("-h", "--help"):
            _print_commands()
            sys.exit(0 if args else EXIT_USER_ERROR)
        _dispatch(args[0], args[1:])
    finally:
        sys.stdout.flush()  # while a closed pipe can still be answered


def _terminate(*_: object) -> None:
    raise KeyboardInterrupt  # stop as on Ctrl-C: what can be resumed is kept, the rest removed


def _print_commands() -> None:
    print("usage: qlora-kit COMMAND [OPTIONS]\n")
    for name, command in COMMANDS.items():
        print(f"  {name:<10}{command.help}")
    print("\n`qlora-kit COMMAND --help` lists the options of a command.")


def _dispatch(name: str, args: list[str]) -> None:
    if name not in COMMANDS:
        remedy = f"The commands are: {', '.join(COMMANDS)}."
        raise UserError.of("command", name, "is not a command", remedy)
    command = COMMANDS[name]
    flags = _parse(name, command, args)
    given = {key: flags.pop(key) for key in command.flags if key in flags}
    given = _read(command, given)
    quiet.quiet_libraries()  # the command's module may import them
    module, function = command.door.split(":")
    door = getattr(importlib.import_module(f"qlora_kit.cli.{module}"), function)
    door(_settings_of(command, flags), **given)


def _read(command: Command, given: dict[str, Any]) -> dict[str, Any]:
    """The values of a command's own flags. Raises one `UserError` for all that break a rule."""
    faults = Faults()
    for key, text in list(given.items()):
        reads = command.flags[key].read
        if reads is not None:
            given[key] = faults.collect(functools.partial(reads, text))
    faults.raise_if_any()
    return given


def _parse(name: str, command: Command, args: list[str]) -> dict[str, Any]:
    """The flags that were given, as text by setting; unset ones are absent. tyro answers `--help` and unknown flags."""
    own = dict(command.flags)
    if command.settings is None:
        own["config"] = Flag("YAML or JSON file of settings, or a run's run.json; flags win")
    fields: dict[str, Any] = {key: _flag(flag.kind, flag.help, "") for key, flag in own.items()}
    for _, setting, hint in settings():
        if command.settings is not None and setting.name not in command.settings:
            continue
        default = default_of(setting)
        shown = "" if default in (None, {}, ()) or command.settings is not None else f"(default: {default})"
        text = (command.settings or command.helps).get(setting.name) or setting.metadata["help"]
        text = f"{' | '.join(task_names())}: {text}" if setting.name == "task" else text
        fields[setting.name] = _flag(bool if hint is bool else str, text, shown)
    once = [key for key in fields if key not in own or own[key].kind is not list]
    several = {name for name in once if command.lists and name not in own}
    _check_once(once, args, several)
    flags_type = TypedDict("Flags", fields, total=False)  # type: ignore[misc]
    lists: Any = {key: [] for key, flag in own.items() if flag.kind is list}  # tyro cannot leave these out
    parsed = tyro.cli(flags_type, prog=f"qlora-kit {name}", description=command.help, args=args, default=lists)
    return {key: value for key, value in parsed.items() if value != []}


def _check_once(names: Sequence[str], args: Sequence[str], several: Set[str]) -> None:
    """Check that no flag of `names` is given twice, where tyro takes the last; `several` take a list of values.

    Raises one `UserError` for all.
    """
    given: dict[str, list[str]] = {name: [] for name in names}
    for arg, following in zip(args, [*args[1:], "--"], strict=True):
        written, has_value, value = arg.partition("=")
        name = written.removeprefix("--").replace("-", "_")
        name = name if name in given else name.removeprefix("no_")
        if written.startswith("--") and name in given:
            given[name].append(value if has_value else arg if following.startswith("--") else following)
    faults = [
        Fault(flag(name), values, "is given more than once", _once_remedy(name, several))
        for name, values in given.items()
        if len(values) > 1
    ]
    if faults:
        raise UserError(faults)


def _once_remedy(name: str, several: Set[str]) -> str:
    if name in FILES:
        return ONE_FOLDER
    return "Give several values in one, as in --r 4,8,16." if name in several else "Give it once."


def _flag(kind: type, text: str, default: str) -> Any:
    metavar = None if kind is bool else "VALUE"
    given: Any = tyro.conf.UseAppendAction[list[str]] if kind is list else kind
    return Annotated[given, tyro.conf.arg(help=text, metavar=metavar, help_behavior_hint=default)]


def _settings_of(command: Command, flags: dict[str, Any]) -> Any:
    """What the door of `command` is called with."""
    if command.settings is not None:
        return flags
    from qlora_kit.tasks import registry

    given, config = _with_files(flags), None
    with Faults() as faults:
        with faults.collecting():
            registry.check_name(given.get("task"))
        if not command.lists:
            with faults.collecting():
                config = RunConfig.from_flat(given)
    return given if command.lists else config


def _with_files(flags: dict[str, Any]) -> dict[str, Any]:
    """Settings by name, from the resumed run, over them those of `--config`, over them the flags."""
    from qlora_kit.runs.folder import find_resume_point

    file = flags.pop("config", None)
    from_file = read_settings_file(Path(file)) if file is not None else {}
    resume = flags.get("resume", from_file.get("resume"))
    from_run = read_settings_file(find_resume_point(str(resume)).settings_file) if resume is not None else {}
    return {**from_run, **from_file, **flags}
