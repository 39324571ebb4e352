"""`qlora-kit search`: the settings that cross-validation chooses, with a table, a picture and a file to train with."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qlora_kit.cli.flags import Command, check_choices, with_files
from qlora_kit.config.settings import SearchConfig
from qlora_kit.errors import Faults

if TYPE_CHECKING:
    from qlora_kit.search.space import Space

WIDTH = 160  # columns where the output is no terminal
HELPS = {
    "out": "folder of the search, continued if it exists; unset: search/<model>",
    "overwrite": "start over if the folder exists",
    "seed": "seed of the folds, of tpe, and of every run",
    "resume": "not for a search: repeat the command to continue",
}


@dataclass(frozen=True, kw_only=True)
class AskedSearch:
    """What is searched, and how."""

    space: Space
    settings: SearchConfig


def read(given: Mapping[str, Any], flags: Mapping[str, Any]) -> AskedSearch:
    """The settings that were `given`, by flag or file, a number maybe several times; `flags` win over a file's.

    Raises one `UserError` for all that break a rule.
    """
    from qlora_kit.search.space import Space

    flat, own = with_files(given), SearchConfig.names()
    told = {name: value for name, value in flat.items() if name in own and value is not None}
    with Faults() as faults:
        with faults.collecting():
            check_choices(flat)
        with faults.collecting():
            space = Space.from_flat({name: value for name, value in flat.items() if name not in own})
        with faults.collecting():
            settings = SearchConfig.from_flat({**told, **flags})
    return AskedSearch(space=space, settings=settings)


def run(asked: AskedSearch, **_: Any) -> None:
    """Search, and print what was found; progress goes to standard error. Raises `UserError`."""
    from rich.console import Console

    from qlora_kit.model import source
    from qlora_kit.search import picture, report
    from qlora_kit.search.run import search
    from qlora_kit.system.progress import say_line

    source.find_on_hub(asked.space.config.base)
    say = Console(stderr=True, highlight=False)
    result = search(asked.space, asked.settings, say)
    if result is None:
        say_line(say, "nothing is finished yet: other processes are at work on what is left")
        return
    console = Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH)
    console.print(report.table(result))
    for line in (*report.closing(result), f"picture: {result.folder / picture.PICTURE_FILE}"):
        say_line(console, line)


COMMAND = Command(
    run=run,
    example="qlora-kit search --data chat.jsonl --r 4,8,16 --lr 1e-4,1e-3 --out search/chat",
    flags=SearchConfig,
    helps=HELPS,
    read=read,
    headings=("model", "adapter", "data", "optimizer", "run"),
    lists=("base", "adapter", "optim"),
)
