"""Settings read from YAML and JSON files. A file may give each setting once."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from qlora_kit.config.settings import GROUPS, PER_CALL
from qlora_kit.errors import UserError


class _TwiceError(ValueError):
    """A file gives a setting twice, so that the last would silently win."""

    @classmethod
    def check(cls, names: Iterable[object]) -> None:
        """Raise it if one of `names` occurs twice."""
        twice = [name for name, count in Counter(names).items() if count > 1]
        if twice:
            raise cls(f"gives {' and '.join(repr(str(name)) for name in twice)} more than once")


class _OnceLoader(yaml.SafeLoader):
    """Reads YAML in which no mapping has a key twice. Raises `_TwiceError`."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        _TwiceError.check(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        return super().construct_mapping(node, deep)


def _object_once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    _TwiceError.check(name for name, _ in pairs)
    return dict(pairs)


def read_settings_file(path: Path) -> dict[str, object]:
    """The settings in a YAML or JSON file, flat; from a `run.json`, those that repeat the run.

    Raises `UserError` if the file is missing, is not a mapping of settings, or gives one twice.
    """
    try:
        content = _parsed(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError.of(
            "config", str(path), f"cannot be read ({error.strerror})", "Give a YAML or JSON file."
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError.of("config", str(path), f"is neither YAML nor JSON ({error})", "Fix the file.") from None
    except _TwiceError as error:
        raise _given_twice(path, error) from None
    if not isinstance(content, dict):
        raise UserError.of("config", str(path), "must be a mapping of settings", "For example: {r: 16, lr: 2e-4}.")
    try:
        return read_settings(content)
    except _TwiceError as error:  # in a group and outside, or with - and with _
        raise _given_twice(path, error) from None


def _given_twice(path: Path, error: _TwiceError) -> UserError:
    return UserError.of("config", str(path), str(error), "Give each setting once.")


def read_settings(content: Mapping[object, Any]) -> dict[str, object]:
    """Settings by name from a mapping that may group them; from a `run.json`, those that repeat the run."""
    if isinstance(content.get("settings"), dict):
        content = {k: v for k, v in content["settings"].items() if k not in PER_CALL}
    return _flat(content)


def _parsed(text: str) -> object:
    """JSON, or YAML (which forbids tabs, with which JSON may be indented)."""
    try:
        return json.loads(text, object_pairs_hook=_object_once)
    except json.JSONDecodeError:
        return yaml.load(text, _OnceLoader)  # noqa: S506  # a safe one


def _flat(content: Mapping[object, object]) -> dict[str, object]:
    pairs = list(_pairs(content))
    _TwiceError.check(name for name, _ in pairs)
    return dict(pairs)


def _pairs(content: Mapping[object, object]) -> Iterator[tuple[str, object]]:
    """Each setting with its name, those in groups included."""
    for key, value in content.items():
        if key in GROUPS and isinstance(value, dict):
            yield from ((str(k), v) for k, v in value.items())
        else:
            yield str(key).replace("-", "_"), value
