"""The command line: the list of commands, dispatch, and how a user's mistakes are printed.

Each command is a module of this folder whose `COMMAND` has its flags. Nothing heavy is imported before the flags are
read, so that `--help` and a mistake are answered at once.
"""

from __future__ import annotations

import difflib
import importlib
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

from qlora_kit.cli.flags import Command, read_own
from qlora_kit.cli.help_text import command_text, commands_text
from qlora_kit.cli.parse import parse
from qlora_kit.errors import Faults, UserError, as_field, as_flag
from qlora_kit.system import quiet

# name: (module in this folder, what the command does)
COMMANDS = {
    "train": ("train", "fine-tune a model: the base frozen in 4 bits, LoRA factors on top"),
    "plan": ("plan", "predict the memory of a run, and what fits; needs no GPU"),
    "profile": ("profile", "measure the memory of a few steps beside what was predicted"),
    "preview": ("preview", "show examples token by token, and audit the data"),
    "merge": ("merge", "merge the adapter of a run into its base, and prove that the release is right"),
    "generate": ("generate", "answer prompts with the model of a finished run, or with any other"),
    "predict": ("predict", "predict labels with their scores, or texts, with the model of a run or with a release"),
    "eval": (
        "evaluate",
        "compare base, adapter and release: loss and exact match, or the task's metrics",
    ),
    "search": ("search", "choose settings by cross-validation; a number may be several, as in --r 4,8,16"),
    "completion": ("completion", "print a script with which bash, zsh or fish completes commands and flags"),
}
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
EXIT_PIPE_CLOSED = 141


def main(argv: Sequence[str] | None = None) -> None:
    """Run `qlora-kit`; exits with 2 on a mistake that the user can mend."""
    args = list(sys.argv[1:] if argv is None else argv)
    signal.signal(signal.SIGTERM, _terminate)
    try:
        _run(args)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:  # `| head` has read enough; Python would complain once more when it closes the output
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_PIPE_CLOSED)


def _run(args: list[str]) -> None:
    try:
        if not args or args[0] in ("-h", "--help", "--help-all"):
            print(commands_text({name: summary for name, (_, summary) in COMMANDS.items()}))
            sys.exit(0 if args else EXIT_USER_ERROR)
        _dispatch(args[0], args[1:])
    finally:
        sys.stdout.flush()  # while a closed pipe can still be answered


def _terminate(*_: object) -> None:
    raise KeyboardInterrupt  # stop as on Ctrl-C: what can be resumed is kept, the rest removed


def _dispatch(name: str, args: list[str]) -> None:
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"Did you mean {near[0]}? " if near else ""
        _fail(f"{name} is not a command.\n    {hint}The commands are: {', '.join(COMMANDS)}.")
    command = command_of(name)
    try:
        asked = read(name, command, args)
        if asked is None:
            print(command_text(name, COMMANDS[name][1], command, everything="--help-all" in args))
            return
        settings, own = asked
        command.run(settings, **own)
    except UserError as error:
        _fail(_in_words(error, command))


def command_of(name: str) -> Command:
    """The command `name`, declared in its module."""
    command: Command = importlib.import_module(f"qlora_kit.cli.{COMMANDS[name][0]}").COMMAND
    return command


def read(name: str, command: Command, args: Sequence[str]) -> tuple[Any, dict[str, Any]] | None:
    """What the command is to be run with: the settings, and its own flags; None where `--help` is asked for.

    Raises one `UserError` with every mistake in `args`, and in the file of settings that they name.
    """
    flags = command.all_flags()
    given, wrong = parse(args, flags, name, command.positional)
    if "help" in given or "help_all" in given:
        return None
    quiet.quiet_libraries()  # reading may import them
    texts = {key: given.pop(key) for key in command.own_names() if key in given}
    own: dict[str, Any] = {}
    with Faults() as faults:
        for fault in wrong:
            faults.add(fault)
        with faults.collecting():
            own = read_own(command.flags, texts)
        with faults.collecting():
            settings = command.read(given, own)
    return settings, own


def _in_words(error: UserError, command: Command) -> str:
    """The mistakes with settings as flags; what is no flag of `command` stands as it is."""
    flags = command.all_flags()

    def written(setting: str, value: str | None) -> str:
        name = command.renamed.get(setting, setting).removeprefix("no_")
        return as_flag(command.renamed.get(setting, setting), value) if name in flags else as_field(setting, value)

    return error.text(written)


def _fail(text: str) -> None:
    print(f"error: {text}", file=sys.stderr)
    sys.exit(EXIT_USER_ERROR)
