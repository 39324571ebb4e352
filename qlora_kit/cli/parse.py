"""The words of a command line as settings, and every mistake in them at once.

A flag is `--name VALUE` or `--name=VALUE`, and for a switch `--name` or `--no-name`; its name is never shortened, and
`_` may stand for `-`. A value that begins with `--` needs the `=`.
"""

from __future__ import annotations

import difflib
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qlora_kit.cli.flags import Flag
from qlora_kit.errors import Fault, named

HELP = ("help", "help_all")
FILES = ("data", "eval_data")
ONE_FOLDER = "Give one; to read several files, put them into a folder (none of them named after a split) and give that."


@dataclass(frozen=True, kw_only=True)
class _Word:
    """A flag as it was written (`--no-pack`), the setting that it names (`pack`), and the text of its value."""

    written: str
    name: str  # "" for a value that follows no flag
    value: str | None
    is_off: bool = False


def parse(
    args: Sequence[str], flags: Mapping[str, Flag], command: str, positional: str = ""
) -> tuple[dict[str, Any], list[Fault]]:
    """What was given, by the name of the setting, and what is wrong with the rest.

    A value is text, True or False for a switch, and a list of texts for a flag that may be repeated. Among them are
    `help` and `help_all`, where they are asked for. `positional` is the flag whose value may stand without it.
    """
    given: dict[str, list[_Word]] = {}
    faults: list[Fault] = []
    for word in _words(args, flags, positional):
        fault = _fault_of(word, flags, command)
        if fault is None:
            given.setdefault(word.name, []).append(word)
        else:
            faults.append(fault)
    once = {name: words for name, words in given.items() if len(words) == 1 or name in HELP or flags[name].is_repeated}
    faults += [_twice(flags[name], words) for name, words in given.items() if name not in once]
    return {name: _value(flags.get(name), words) for name, words in once.items()}, faults


def _words(args: Sequence[str], flags: Mapping[str, Flag], positional: str) -> Iterator[_Word]:
    rest = deque(args)
    while rest:
        arg = rest.popleft()
        if not _is_flag(arg):
            yield _Word(written=arg, name=positional, value=arg)
            continue
        written, has_value, text = arg.partition("=")
        name = "help" if written == "-h" else written[2:].replace("-", "_")
        on = name.removeprefix("no_")
        is_off = name not in flags and on in flags and flags[on].is_switch
        value = text if has_value else rest.popleft() if rest and not _is_flag(rest[0]) else None
        yield _Word(written=written, name=on if is_off else name, value=value, is_off=is_off)


def _is_flag(arg: str) -> bool:
    return arg.startswith("--") or arg == "-h"


def _fault_of(word: _Word, flags: Mapping[str, Flag], command: str) -> Fault | None:
    """What is wrong with `word` as far as it stands for itself."""
    if word.name in HELP:
        return None
    flag = flags.get(word.name)
    if flag is None and not _is_flag(word.written):
        return Fault("argument", word.value, "follows no flag", f"See `qlora-kit {command} --help`.")
    if flag is None:
        return Fault(
            word.written, word.value, f"is not a flag of `qlora-kit {command}`", _nearest(word, flags, command)
        )
    if flag.is_switch and word.value is not None:
        on, off = named(word.name), named(word.name, False)
        return Fault(word.name, word.value, "takes no value", f"Write {on} or {off}.")
    if not flag.is_switch and word.value is None:
        return Fault(word.name, None, "needs a value", f"Write {named(word.name, flag.metavar)}.")
    return None


def _nearest(word: _Word, flags: Mapping[str, Flag], command: str) -> str:
    switches = [f"no_{name}" for name, flag in flags.items() if flag.is_switch]
    near = difflib.get_close_matches(word.name, [*flags, *switches], n=1)
    return f"Did you mean {named(near[0])}?" if near else f"See `qlora-kit {command} --help-all`."


def _twice(flag: Flag, words: Sequence[_Word]) -> Fault:
    values = [word.written if flag.is_switch else word.value for word in words]
    remedy = "Give it once."
    if flag.is_several:
        remedy = f"Give several values in one, as in {named(flag.setting.name, '4,8,16')}."
    if flag.setting.name in FILES:
        remedy = ONE_FOLDER
    return Fault(flag.setting.name, values, "is given more than once", remedy)


def _value(flag: Flag | None, words: Sequence[_Word]) -> Any:
    if flag is None:  # --help
        return True
    if flag.is_switch:
        return not words[0].is_off
    return [word.value for word in words] if flag.is_repeated else words[0].value
