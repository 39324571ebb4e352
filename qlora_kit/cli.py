"""The command line: parse once, dispatch, print a user's mistakes. The only place that knows tyro."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypedDict

import tyro

from qlora_kit import quiet
from qlora_kit.config import RunConfig, default_of, read_settings_file, settings
from qlora_kit.errors import UserError


@dataclass(frozen=True)
class Flag:
    """A flag of one command only: its help, its type, and what reads its text."""

    help: str
    kind: type = str
    read: Callable[[str], Any] | None = None


@dataclass(frozen=True)
class Command:
    """A command: what it does, the function behind it in `commands` ("module:function"), and flags of its own.

    The function is called with the settings and, by name, those of its own flags that were given.
    """

    help: str
    door: str
    flags: Mapping[str, Flag] = field(default_factory=dict)


def _rows(text: str) -> tuple[int, ...]:
    """`3` or `1,5,17` as numbers. Raises `UserError`."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise UserError.of("--rows", text, "must be numbers of examples", "For example --rows 1,5,17.")
    return tuple(int(part) for part in parts)


def _count(text: str) -> int:
    """A number of steps. Raises `UserError`."""
    if not text.isdecimal() or int(text) < 1:
        raise UserError.of("--steps", text, "must be a whole number, at least 1", "For example --steps 3.")
    return int(text)


PROFILE_FLAGS = {
    "steps": Flag("optimizer steps to measure (default: 3)", read=_count),
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
COMMANDS = {
    "train": Command("fine-tune a model: the base frozen in 4 bits, LoRA factors on top", "train:run"),
    "plan": Command("predict the memory of a run, and what fits; needs no GPU", "plan:run", PLAN_FLAGS),
    "profile": Command("measure the memory of a few steps beside what was predicted", "profile:run", PROFILE_FLAGS),
    "preview": Command(
        "show examples token by token, and audit the data",
        "preview:preview",
        {"rows": Flag("numbers of the examples to show, e.g. 1,5,17 (default: 1,2,3)", read=_rows)},
    ),
}
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141


def main(argv: Sequence[str] | None = None) -> None:
    """Run `qlora-kit`; exits with 2 on a mistake that the user can mend."""
    args = list(sys.argv[1:] if argv is None else argv)
    signal.signal(signal.SIGTERM, _terminate)
    try:
        _run(args)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains at its end
        sys.exit(EXIT_BROKEN_PIPE)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)


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
    for key, value in given.items():
        reads = command.flags[key].read
        given[key] = value if reads is None else reads(value)
    config = _run_config(flags)
    quiet.quiet_libraries()  # the command's module may import them
    module, function = command.door.split(":")
    getattr(importlib.import_module(f"qlora_kit.commands.{module}"), function)(config, **given)


def _parse(name: str, command: Command, args: list[str]) -> dict[str, Any]:
    """The flags that were given, as text by setting; unset ones are absent. tyro answers `--help` and unknown flags."""
    shared = {"config": Flag("YAML or JSON file of settings, or a run's run.json; flags win")}
    fields: dict[str, Any] = {key: _flag(flag.kind, flag.help, "") for key, flag in {**command.flags, **shared}.items()}
    for _, setting, hint in settings():
        default = default_of(setting)
        shown = "" if default in (None, {}, ()) else f"(default: {default})"
        fields[setting.name] = _flag(bool if hint is bool else str, setting.metadata["help"], shown)
    flags_type = TypedDict("Flags", fields, total=False)  # type: ignore[misc]
    return dict(tyro.cli(flags_type, prog=f"qlora-kit {name}", description=command.help, args=args))


def _flag(kind: type, text: str, default: str) -> Any:
    metavar = None if kind is bool else "VALUE"
    return Annotated[kind, tyro.conf.arg(help=text, metavar=metavar, help_behavior_hint=default)]


def _run_config(flags: dict[str, Any]) -> RunConfig:
    """Settings from the resumed run, over them those of `--config`, over them the flags."""
    from qlora_kit.runs import find_resume_point

    file = flags.pop("config", None)
    from_file = read_settings_file(Path(file)) if file is not None else {}
    resume = flags.get("resume", from_file.get("resume"))
    from_run = read_settings_file(find_resume_point(str(resume)).settings_file) if resume is not None else {}
    return RunConfig.from_flat({**from_run, **from_file, **flags})
