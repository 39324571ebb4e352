"""How a setting is declared: its rule, its check, and how text becomes its value."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from qlora_kit.errors import Fault, UserError, named


@dataclass(frozen=True)
class Rule:
    """What a value must satisfy, in words and as a check."""

    text: str
    holds: Callable[[Any], bool]
    choices: tuple[object, ...] = ()  # all the values there are, if they can be listed


def one_of(*choices: object) -> Rule:
    """One of `choices`."""
    return Rule("must be one of " + ", ".join(str(c) for c in choices), lambda v: v in choices, choices)


def at_least(low: float) -> Rule:
    """No less than `low`."""
    return Rule(f"must be at least {low:g}", lambda v: v >= low)


def above(low: float) -> Rule:
    """More than `low`."""
    return Rule(f"must be greater than {low:g}", lambda v: v > low)


def fraction() -> Rule:
    """At least 0 and less than 1."""
    return Rule("must be at least 0 and less than 1", lambda v: 0 <= v < 1)


def setting(default: Any, help: str, rule: Rule | None = None, **shown: Any) -> Any:
    """Declare a setting: its default, the line that `--help` prints, and the rule its values obey.

    `shown` says how the command line shows it, all optional: `group` (its heading in `--help`, instead of the
    dataclass's), `rare` (only `--help-all` shows it), `metavar` (what stands for its value), `choices` (a tuple, or
    "module:attribute" of a table or a function, which only the command line asks; those of `one_of` need no mention),
    `repeated` (the flag may be given several times), `switch` (`--x` and `--no-x`, also with a third state, unset).
    """
    metadata = {"help": help, "rule": rule, **shown}
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


class Checked:
    """Checks the rules of a group of settings when it is made; `extra_faults` adds rules across settings."""

    def __post_init__(self) -> None:
        faults = [*self._rule_faults(), *self.extra_faults()]
        if faults:
            raise UserError(faults)

    def _rule_faults(self) -> Iterator[Fault]:
        hints = typing.get_type_hints(type(self))
        for f in dataclasses.fields(self):  # type: ignore[arg-type]  # every subclass is a dataclass
            value, rule = getattr(self, f.name), f.metadata.get("rule")
            wrong = _wrong_type(value, hints[f.name]) if "help" in f.metadata else None
            if wrong is not None:
                yield wrong_type(f.name, value, wrong)
            elif rule is not None and value is not None and not rule.holds(value):
                yield Fault(f.name, value, rule.text, f"For example {named(f.name, _example(f))}.")

    def extra_faults(self) -> Iterator[Fault]:
        yield from ()


def wrong_type(setting: str, value: object, rule: str) -> Fault:
    """The fault of a value that cannot be converted to the setting's type."""
    return Fault(setting, value, rule, "See `qlora-kit train --help`.")


def _wrong_type(value: object, hint: Any) -> str | None:
    """The rule that the type of `value` breaks; None if the type is as declared."""
    try:
        return None if convert(value, hint) == value else "has the wrong type"
    except ValueError as error:
        return str(error)


def _example(f: dataclasses.Field[Any]) -> object:
    if f.default is not None and f.default is not dataclasses.MISSING and f.default != 0:
        return f.default
    return f.metadata["rule"].text.removeprefix("must be one of ").split(",")[0].rsplit(" ", 1)[-1]


def fields_of(cls: type[Checked]) -> Iterator[tuple[dataclasses.Field[Any], Any]]:
    """The fields of a group of settings, each with its resolved type."""
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):  # type: ignore[arg-type]
        yield f, hints[f.name]


def default_of(f: dataclasses.Field[Any]) -> Any:
    """The default of a setting."""
    if f.default_factory is not dataclasses.MISSING:
        return f.default_factory()
    return f.default


def convert(value: object, hint: Any) -> Any:
    """`value` (text of a flag, or a value from YAML or JSON) as type `hint`; raises `ValueError` with the rule."""
    options = [h for h in typing.get_args(hint) if h is not type(None)] if isinstance(hint, types.UnionType) else [hint]
    if value is None:
        if isinstance(hint, types.UnionType):
            return None
        raise ValueError("must have a value")
    kind = options[0]
    if kind is bool:
        return _as_bool(value)
    if kind is int or kind is float:
        return _as_number(value, kind)
    if kind is str:
        return (
            ("on" if value else "off") if isinstance(value, bool) else str(value)
        )  # YAML reads on and off as booleans
    if typing.get_origin(kind) is tuple:
        return _as_numbers(value) if typing.get_args(kind)[0] is int else _as_names(value)
    if typing.get_origin(kind) is dict:
        return _as_mapping(value, typing.get_args(kind)[1])
    raise AssertionError(f"no conversion to {kind}")


def read_value(f: dataclasses.Field[Any], hint: Any, value: object) -> Any:
    """`value` as the type `hint` of the setting `f`, its own rule checked. Raises `UserError`."""
    try:
        read = convert(value, hint)
    except ValueError as error:
        raise UserError.of(f.name, value, str(error), "See the help of this setting.") from None
    rule = f.metadata.get("rule")
    if rule is not None and read is not None and not rule.holds(read):
        raise UserError.of(f.name, read, rule.text, f"For example {named(f.name, _example(f))}.")
    return read


def _as_bool(value: object) -> bool:
    if isinstance(value, bool):
        return value
    if str(value).lower() in ("true", "yes", "on", "1", "false", "no", "off", "0"):
        return str(value).lower() in ("true", "yes", "on", "1")
    raise ValueError("must be true or false")


def _as_number(value: object, kind: type) -> Any:
    try:
        number = float(str(value))  # YAML reads 2e-4 as text
    except ValueError:
        number = float("nan")
    if isinstance(value, bool) or not math.isfinite(number) or (kind is int and not number.is_integer()):
        raise ValueError("must be a whole number" if kind is int else "must be a number")
    return kind(number)


def _as_names(value: object) -> tuple[str, ...]:
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",")) if value else ()
    if isinstance(value, (list, tuple)) and all(isinstance(part, str) for part in value):
        return tuple(value)
    raise ValueError("must be names, separated by commas")


def _as_numbers(value: object) -> tuple[int, ...]:
    parts = value.split(",") if isinstance(value, str) else value
    try:
        return tuple(_as_number(part, int) for part in parts)  # type: ignore[attr-defined]  # a TypeError if it is none
    except (TypeError, ValueError):
        raise ValueError("must be whole numbers, separated by commas") from None


def _as_mapping(value: object, kind: Any) -> dict[str, Any]:
    if isinstance(value, Mapping):
        return {str(k): convert(v, kind) for k, v in value.items()}
    pairs = [part.split("=", 1) for part in str(value).split(",") if part]
    if any(len(pair) != 2 or not all(pair) for pair in pairs):
        example = "32" if kind is int else "column"
        raise ValueError(f"must look like name={example},name={example}")
    names = [name.strip() for name, _ in pairs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"names {' and '.join(map(repr, twice))} more than once")
    return {name: convert(text.strip(), kind) for name, (_, text) in zip(names, pairs, strict=True)}
