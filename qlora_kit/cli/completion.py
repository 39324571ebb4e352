"""`qlora-kit completion`: a script with which a shell completes commands, flags, their choices and files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qlora_kit.cli.flags import Command, Flag, as_given
from qlora_kit.config.rules import Checked, one_of, setting
from qlora_kit.errors import UserError

if TYPE_CHECKING:
    from argparse import ArgumentParser

FILES = ("MODEL", "DATA", "ADAPTER", "FILE", "PATH")  # what stands for a value that may be a file or folder


@dataclass(frozen=True, kw_only=True)
class CompletionFlags(Checked):
    """The flags of this command alone."""

    shell: str | None = setting(None, "shell that is to complete", one_of("bash", "zsh", "fish"))


def run(_: Mapping[str, Any], shell: str | None = None) -> None:
    """Print the script for `shell`. Raises `UserError` without one."""
    import shtab

    if shell is None:
        raise UserError.of("shell", None, "is needed", "Write `qlora-kit completion bash`, or zsh or fish.")
    print(shtab.complete(make_parser(), shell))


def make_parser() -> ArgumentParser:
    """All commands and flags in the form that shtab reads; it parses nothing."""
    from argparse import ArgumentParser

    from qlora_kit.cli.main import COMMANDS, command_of

    parser = ArgumentParser("qlora-kit", allow_abbrev=False)
    commands = parser.add_subparsers()
    for name, (_, summary) in COMMANDS.items():
        own = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        own.add_argument("--help-all", action="store_true", help="show all flags and exit")
        command = command_of(name)
        for flag in command.all_flags().values():
            _add(own, flag, positional=flag.setting.name == command.positional)
    return parser


def _add(parser: ArgumentParser, flag: Flag, positional: bool) -> None:
    import shtab

    text = flag.help.replace("%", "%%")
    if flag.is_switch:
        parser.add_argument(flag.written, f"--no-{flag.written[2:]}", action="store_true", help=text)
        return
    name = flag.setting.name if positional else flag.written
    action: Any = parser.add_argument(name, choices=flag.choices or None, metavar=flag.metavar, help=text)
    if flag.metavar == "FOLDER":
        action.complete = shtab.DIRECTORY
    elif flag.metavar in FILES:
        action.complete = shtab.FILE


COMMAND = Command(
    run=run,
    example="qlora-kit completion bash > ~/.local/share/bash-completion/completions/qlora-kit",
    flags=CompletionFlags,
    settings={},
    read=as_given,
    positional="shell",
)
