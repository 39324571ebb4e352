"""How a command declares its flags, and what is known of each: every flag is the field of a dataclass of settings."""

from __future__ import annotations

import importlib
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import Field, dataclass, field
from pathlib import Path
from typing import Any

from qlora_kit.config.rules import Checked, default_of, fields_of, read_value, setting
from qlora_kit.config.settings import RunConfig, settings
from qlora_kit.errors import Fault, Faults, named

# the headings of `--help`, by the group of settings in `config`
HEADINGS = {
    "base": "model",
    "adapter": "adapter",
    "data": "data",
    "optim": "optimizer",
    "lean": "memory",
    "evaluation": "evaluation",
    "": "run",
}
OWN = "options"  # the heading of a command's own flags
METAVARS = {int: "N", float: "X", tuple: "A,B,…", dict: "A=B,…"}


@dataclass(frozen=True, kw_only=True)
class NoFlags(Checked):
    """The flags of a command that has none of its own."""


@dataclass(frozen=True, kw_only=True)
class _ConfigFile(Checked):
    """What every command takes that takes all settings of a run."""

    config: str | None = setting(None, "YAML or JSON file of settings, or a run's run.json; flags win", metavar="FILE")


@dataclass(frozen=True, kw_only=True)
class Flag:
    """A flag: the setting behind it, its resolved type, and how this command shows it."""

    setting: Field[Any]
    hint: Any
    help: str
    heading: str
    shows_default: bool = True
    rare: bool = False
    is_several: bool = False  # whether its value may be several numbers, separated by commas

    @property
    def written(self) -> str:
        """`--batch-size`."""
        return f"--{self.setting.name.replace('_', '-')}"

    @property
    def is_switch(self) -> bool:
        """Whether it has no value: `--x` and `--no-x`."""
        return self.hint is bool or bool(self.setting.metadata.get("switch"))

    @property
    def may_be_on(self) -> bool:
        """Whether a switch is on, or may be, where neither of its forms is given."""
        return default_of(self.setting) is not False

    @property
    def is_repeated(self) -> bool:
        """Whether it may be given several times."""
        return bool(self.setting.metadata.get("repeated"))

    @property
    def choices(self) -> tuple[str, ...]:
        """All the values there are, if they can be listed; may import the module that knows them."""
        if self.hint == bool | None and not self.is_switch:
            return ("true", "false")
        return choices_of(self.setting)

    @property
    def kind(self) -> type:
        """The type of its value, apart from unset."""
        one = self.hint
        if isinstance(one, types.UnionType):
            (one,) = (h for h in typing.get_args(one) if h is not type(None))
        kind: type = typing.get_origin(one) or one
        return kind

    @property
    def metavar(self) -> str:
        """What stands for its value; "" for a switch."""
        if self.is_switch:
            return ""
        choices = self.choices
        shown = "{" + ",".join(choices) + "}" if choices else METAVARS.get(self.kind, "VALUE")
        return str(self.setting.metadata.get("metavar", shown)) + (",…" if self.is_several else "")

    @property
    def default(self) -> str:
        """The default as text; "" for one that is unset, empty or off."""
        value = default_of(self.setting)
        if not self.shows_default or value is None or value is False or value in ((), {}):
            return ""
        if value is True:
            return "on"
        if isinstance(value, tuple):
            return ",".join(str(part) for part in value)
        return f"{value:g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command: the function behind it, and its flags.

    `read` makes what `run` is called with, from the settings that were given (text by name) and from those of the
    command's own `flags` that were given, which `run` gets by name as well. A command that reads a finished run lists
    the `settings` that it takes, each with a help that fits there ("" for the setting's own); any other takes all of
    them, and `helps` are of those that mean something else here.
    """

    run: Callable[..., object]
    example: str
    flags: type[Checked] = NoFlags
    settings: Mapping[str, str] | None = None
    helps: Mapping[str, str] = field(default_factory=dict)
    headings: tuple[str, ...] = tuple(HEADINGS.values())  # what `--help` shows; `--help-all` shows the rest too
    common: tuple[str, ...] = ()  # if given: the settings that `--help` shows
    read: Callable[[Mapping[str, Any], Mapping[str, Any]], object] = field(default_factory=lambda: read_config)
    renamed: Mapping[str, str] = field(default_factory=dict)  # setting: the flag that gives it here
    lists: tuple[str, ...] = ()  # the groups of settings whose numbers may be several, as in `--r 4,8,16`
    positional: str = ""  # the flag whose value may stand alone, as in `qlora-kit completion bash`

    def all_flags(self) -> dict[str, Flag]:
        """Every flag by the name of its setting, in the order of `--help`."""
        own = {f.name: _own_flag(f, hint) for f, hint in fields_of(self.flags)}
        if self.settings is None:
            (config, hint), *_ = fields_of(_ConfigFile)
            own = {config.name: _own_flag(config, hint, OWN if own else HEADINGS[""]), **own}
        return own | {flag.setting.name: flag for flag in self._of_settings() if flag.setting.name not in own}

    def own_names(self) -> list[str]:
        """The names of the command's own flags."""
        return [f.name for f, _ in fields_of(self.flags)]

    def _of_settings(self) -> Iterator[Flag]:
        known = {f.name: (group, f, hint) for group, f, hint in settings()}
        texts = dict.fromkeys(known, "") | dict(self.helps) if self.settings is None else self.settings
        for name, text in texts.items():
            group, f, hint = known[name]
            heading = f.metadata.get("group") or HEADINGS[group]
            yield Flag(
                setting=f,
                hint=hint,
                help=text or f.metadata["help"],
                heading=heading if self.settings is None else OWN,
                shows_default=self.settings is None,
                rare=self.settings is None and self._is_rare(f, heading),
                is_several=group in self.lists and _is_number(hint),
            )

    def _is_rare(self, f: Field[Any], heading: str) -> bool:
        if self.common:
            return f.name not in self.common
        return bool(f.metadata.get("rare")) or heading not in self.headings


def _is_number(hint: Any) -> bool:
    return hint in (int, float) or hint in (int | None, float | None)


def _own_flag(f: Field[Any], hint: Any, heading: str = OWN) -> Flag:
    return Flag(setting=f, hint=hint, help=f.metadata["help"], heading=heading, rare=bool(f.metadata.get("rare")))


def choices_of(f: Field[Any]) -> tuple[str, ...]:
    """All the values of a setting, if they can be listed; may import the module that knows them."""
    rule = f.metadata.get("rule")
    found = f.metadata.get("choices") or (rule.choices if rule is not None else ())
    if isinstance(found, str):
        module, attribute = found.split(":")
        found = getattr(importlib.import_module(module), attribute)
        found = found() if callable(found) else found
    return tuple(str(choice) for choice in found)


def check_choices(given: Mapping[str, Any]) -> None:
    """Check those settings whose values a table elsewhere knows. Raises one `UserError` for all that it does not."""
    with Faults() as faults:
        for _, f, _ in settings():
            value = given.get(f.name)
            if isinstance(f.metadata.get("choices"), str) and value is not None and value not in choices_of(f):
                choices = choices_of(f)
                rule, remedy = f"must be one of {', '.join(choices)}", f"For example {named(f.name, choices[0])}."
                faults.add(Fault(f.name, value, rule, remedy))


def read_own(cls: type[Checked], given: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the settings `cls` that were given, as their types. Raises one `UserError` for all that break a rule."""
    values: dict[str, Any] = {}
    with Faults() as faults:
        for f, hint in fields_of(cls):
            if f.name in given:
                with faults.collecting():
                    values[f.name] = read_value(f, hint, given[f.name])
    return values


def read_config(given: Mapping[str, Any], own: Mapping[str, Any]) -> RunConfig:
    """The run that was given, by flags and by file. Raises one `UserError` for all that break a rule."""
    flat = with_files(given)
    with Faults() as faults:
        with faults.collecting():
            check_choices(flat)
        with faults.collecting():
            config = RunConfig.from_flat(flat)
    return config


def as_given(given: Mapping[str, Any], own: Mapping[str, Any]) -> Mapping[str, Any]:
    """Settings as they were given, each checked by itself: the run has the others. Raises one `UserError`."""
    with Faults() as faults:
        with faults.collecting():
            check_choices(given)
        for _, f, hint in settings():
            if f.name in given:
                with faults.collecting():
                    read_value(f, hint, given[f.name])
    return given


def with_files(given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by name, from the resumed run, over them those of `--config`, over them those given as flags."""
    from qlora_kit.config.files import read_settings_file

    flags: dict[str, Any] = dict(given)
    file = flags.pop("config", None)
    from_file = read_settings_file(Path(file)) if file is not None else {}
    resume = flags.get("resume", from_file.get("resume"))
    if resume is None:
        return {**from_file, **flags}
    from qlora_kit.runs.folder import find_resume_point

    return {**read_settings_file(find_resume_point(str(resume)).settings_file), **from_file, **flags}
