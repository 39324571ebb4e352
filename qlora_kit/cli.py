"""The command line: parse once, dispatch, print a user's mistakes. The only place that knows tyro."""

from __future__ import annotations

import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypedDict

import tyro

from qlora_kit.config import RunConfig, default_of, read_settings_file, settings
from qlora_kit.errors import UserError

COMMANDS = {
    "train": "fine-tune a model: the base frozen in 4 bits, LoRA factors on top",
    "preview": "show examples token by token, and audit the data",
}
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> None:
    """Run `qlora-kit`; exits with 2 on a mistake that the user can mend."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help"):
        _print_commands()
        sys.exit(0 if args else EXIT_USER_ERROR)
    signal.signal(signal.SIGTERM, _terminate)
    try:
        _dispatch(args[0], args[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)


def _terminate(*_: object) -> None:
    raise KeyboardInterrupt  # stop as on Ctrl-C: what can be resumed is kept, the rest removed


def _print_commands() -> None:
    print("usage: qlora-kit COMMAND [OPTIONS]\n")
    for name, text in COMMANDS.items():
        print(f"  {name:<10}{text}")
    print("\n`qlora-kit COMMAND --help` lists the options of a command.")


def _dispatch(command: str, args: list[str]) -> None:
    if command not in COMMANDS:
        remedy = f"The commands are: {', '.join(COMMANDS)}."
        raise UserError.of("command", command, "is not a command", remedy)
    if command == "train":
        flags = _parse(command, args, {})
        from qlora_kit.commands import train

        train.run(_run_config(flags))
    else:
        flags = _parse(command, args, {"rows": "numbers of the examples to show, e.g. 1,5,17 (default: 1,2,3)"})
        rows = str(flags.pop("rows", "1,2,3"))
        from qlora_kit.commands import preview

        preview.preview(_run_config(flags), _rows(rows))


def _rows(text: str) -> tuple[int, ...]:
    """`3` or `1,5,17` as numbers. Raises `UserError`."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise UserError.of("--rows", text, "must be numbers of examples", "For example --rows 1,5,17.")
    return tuple(int(part) for part in parts)


def _parse(command: str, args: list[str], extra: Mapping[str, str]) -> dict[str, Any]:
    """The flags that were given, as text by setting; unset ones are absent. tyro answers `--help` and unknown flags."""
    shared = {"config": "YAML or JSON file of settings, or a run's run.json; flags win"}
    fields: dict[str, Any] = {name: _flag(str, text, "") for name, text in {**extra, **shared}.items()}
    for _, setting, hint in settings():
        default = default_of(setting)
        shown = "" if default in (None, {}, ()) else f"(default: {default})"
        fields[setting.name] = _flag(bool if hint is bool else str, setting.metadata["help"], shown)
    flags_type = TypedDict("Flags", fields, total=False)  # type: ignore[misc]
    return dict(tyro.cli(flags_type, prog=f"qlora-kit {command}", description=COMMANDS[command], args=args))


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
