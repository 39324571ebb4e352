"""What the site takes from the code: `<!-- settings: NAME -->` in a page becomes the table of that class's settings."""

from __future__ import annotations

import dataclasses
import re
import typing
from typing import Any

import qlora_kit

MARK = re.compile(r"<!-- settings: (\w+) -->")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """MkDocs calls this for each page before it is rendered."""
    return MARK.sub(lambda found: table(settings_class(found[1])), markdown)


def settings_class(name: str) -> type:
    """A public dataclass of settings, or one that `RunConfig` is made of."""
    parts = [part for part in typing.get_type_hints(qlora_kit.RunConfig).values() if dataclasses.is_dataclass(part)]
    found: type = {part.__name__: part for part in parts}.get(name) or getattr(qlora_kit, name)
    return found


def table(cls: type) -> str:
    """The settings declared in `cls`, each with its type, default and help; fields that are groups are left out."""
    hints = typing.get_type_hints(cls)
    lines = ["| setting | type | default | |", "|---|---|---|---|"]
    for field in dataclasses.fields(cls):
        if "help" in field.metadata:
            cells = (f"`{field.name}`", said(hints[field.name]), default(field), escaped(field.metadata["help"]))
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def said(hint: Any) -> str:
    """A type as it is written, less the `None` of one that may be unset."""
    text = hint.__name__ if hint in (str, int, float, bool) else str(hint)
    return f"`{text.removesuffix(' | None')}`"


def default(field: dataclasses.Field[Any]) -> str:
    """The default of a field as Python writes it."""
    value = field.default if field.default is not dataclasses.MISSING else field.default_factory()
    return "unset" if value is None else f"`{value!r}`"


def escaped(text: str) -> str:
    """`text` as it may stand in a cell."""
    return text.replace("|", "\\|").replace("<", "&lt;")
