"""What `--help` prints: the commands, or the flags of one under their headings."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

from qlora_kit.cli.flags import OWN, Command, Flag

WIDTH = 100  # columns at most
NAMES = 31  # columns of the flags' names; a longer one has the line for itself
NO_SHORTER = 60
GLUE = "\N{NO-BREAK SPACE}"


def commands_text(summaries: Mapping[str, str]) -> str:
    """The commands, a line each."""
    names = max(map(len, summaries)) + 4
    lines = [line for name, summary in summaries.items() for line in _two_columns([f"  {name}"], summary, names)]
    end = "`qlora-kit COMMAND --help` lists the flags of a command."
    return "\n".join(["usage: qlora-kit COMMAND [--FLAG VALUE …]", "", *lines, "", end])


def command_text(name: str, summary: str, command: Command, *, everything: bool) -> str:
    """The flags of a command under their headings; the rare ones too if `everything` is asked for."""
    flags = list(command.all_flags().values())
    shown = [flag for flag in flags if everything or not flag.rare]
    words = command.all_flags()[command.positional].metavar if command.positional else "[--FLAG VALUE …]"
    lines = [f"usage: qlora-kit {name} {words}", "", *_filled(f"{summary[0].upper()}{summary[1:]}.")]
    lines.append(f"For example: {command.example}")
    order = [OWN, *command.headings, *(flag.heading for flag in shown)]
    for heading, members in groupby(sorted(shown, key=lambda flag: order.index(flag.heading)), lambda f: f.heading):
        lines += ["", heading, *(line for flag in members for line in _entry(flag))]
    hidden = len(flags) - len(shown)
    if hidden:
        lines += ["", f"`qlora-kit {name} --help-all` shows {hidden} more flags."]
    elif everything:
        lines += ["", "Each flag without a value has an opposite, such as --no-pack, which wins over a file's setting."]
    return "\n".join(lines)


def _entry(flag: Flag) -> list[str]:
    if flag.is_switch and flag.may_be_on:
        left = [f"  {flag.written}, --no-{flag.written[2:]}"]
    else:
        left = _wrapped_choices(f"  {flag.written} {flag.metavar}".rstrip())
    default = f" (default:{GLUE}{flag.default})" if flag.default else ""
    return [line.replace(GLUE, " ") for line in _two_columns(left, flag.help + default, NAMES)]


def _wrapped_choices(left: str) -> list[str]:
    """`left` as lines, broken between choices."""
    if len(left) <= _width():
        return [left]
    words, indent = left.replace(",", ", "), " " * (left.index("{") + 1)
    broken = textwrap.wrap(words, _width(), subsequent_indent=indent, break_on_hyphens=False)
    return [line.replace(", ", ",") for line in broken]


def _two_columns(left: Sequence[str], right: str, start: int) -> list[str]:
    """The lines `left`, and beside or below them the text `right`, which begins at the column `start`."""
    indent = " " * start
    lines = textwrap.wrap(right, _width(), initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
    if len(left) == 1 and len(left[0]) <= start - 2:
        return [left[0].ljust(start) + lines[0][start:], *lines[1:]]
    return [*left, *lines]


def _filled(text: str) -> Iterator[str]:
    yield from textwrap.wrap(text, _width(), break_on_hyphens=False)


def _width() -> int:
    return max(NO_SHORTER, min(WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns))
