"""The space of a search: the settings with several values, and the run in which they are tried."""

from __future__ import annotations

import itertools
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qlora_kit.config.rules import convert
from qlora_kit.config.settings import RunConfig, settings
from qlora_kit.errors import Fault, Faults, UserError, named
from qlora_kit.memory.fit import with_settings

GROUPS = ("base", "adapter", "optim")  # whose numbers can be searched; others would change what is measured

Number = int | float
Point = Mapping[str, Number]  # one combination: a value for each setting that is searched


@dataclass(frozen=True)
class Space:
    """The values of each setting that is searched; `config` has the first of each."""

    config: RunConfig
    values: Mapping[str, tuple[Number, ...]]

    @classmethod
    def from_flat(cls, flat: Mapping[str, object]) -> Space:
        """Read `{setting name: text or value}`, where a number may be several: `4,8,16`, or a list.

        Raises one `UserError` with every fault of every value.
        """
        kinds = {f.name: kind for group, f, hint in settings() if (kind := _number(hint)) and group in GROUPS}
        lists = {name: parts for name, value in flat.items() if name in kinds and len(parts := _parts(value)) > 1}
        single = {name: value for name, value in flat.items() if name not in lists}
        values: dict[str, tuple[Number, ...]] = {}
        with Faults() as faults:
            for name, parts in lists.items():
                with faults.collecting():
                    values[name] = _values(name, parts, kinds[name])
            first = {name: several[0] for name, several in values.items()}
            with faults.collecting():
                config = RunConfig.from_flat({**single, **first})
                if not lists:
                    _nothing_to_search(config)
            for name, value in ((name, value) for name, several in values.items() for value in several[1:]):
                with faults.collecting():
                    RunConfig.from_flat({**single, **first, name: value})
        return cls(config, values)

    def points(self) -> list[Point]:
        """Every combination, in the order of the values given; the first setting changes last."""
        return [dict(zip(self.values, values, strict=True)) for values in itertools.product(*self.values.values())]

    def config_of(self, point: Point) -> RunConfig:
        """The run with the values of `point`. Raises `UserError` where they break a rule."""
        return with_settings(self.config, point)


def label_of(point: Point) -> str:
    """`r = 8, lr = 0.0001`."""
    return ", ".join(f"{name} = {value}" for name, value in point.items())


def folder_name(point: Point) -> str:
    """`r=8,lr=0.0001`: each combination has its own."""
    return ",".join(f"{name}={value}" for name, value in point.items())


def _number(hint: Any) -> type | None:
    """The type of a setting that is a number (or unset); None for any other."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return next((kind for kind in options if kind in (int, float)), None)


def _parts(value: object) -> list[object]:
    if isinstance(value, (list, tuple)):
        return list(value)
    return list(value.split(",")) if isinstance(value, str) else [value]


def _values(name: str, parts: list[object], kind: type) -> tuple[Number, ...]:
    """The numbers in `parts`. Raises `UserError` for what is not a number, and for a number given twice."""
    values: list[Number] = []
    faults: list[Fault] = []
    for part in parts:
        try:
            value = convert(part, kind)
        except ValueError as error:
            faults.append(Fault(name, part, str(error), f"For example {named(name, '4,8,16')}."))
            continue
        if value in values:
            faults.append(Fault(name, part, "is given twice", "Drop one of them."))
        values.append(value)
    if faults:
        raise UserError(faults)
    return tuple(values)


def _nothing_to_search(config: RunConfig) -> None:
    rule = "is a single value, as is every other setting: there is nothing to choose from"
    remedy = f"For example {named('r', '4,8,16,32')} {named('lr', '1e-4,1e-3')}."
    raise UserError.of("r", config.adapter.r, rule, remedy)
