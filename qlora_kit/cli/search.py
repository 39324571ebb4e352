"""`qlora-kit search`: the settings that cross-validation chooses, with a table, a picture and a file to train with."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console

from qlora_kit.config.settings import SearchConfig
from qlora_kit.errors import Faults
from qlora_kit.model import source
from qlora_kit.system import quiet

WIDTH = 160  # columns where the output is no terminal


def run(given: Mapping[str, Any], **flags: Any) -> None:
    """Search, and print what was found; progress goes to standard error.

    `given` holds every setting that was given, by name, a number maybe several times; `flags` are those of
    `SearchConfig`, which win over those of a file among `given`. Raises `UserError`.
    """
    quiet.quiet_libraries()
    from qlora_kit.search import picture, report
    from qlora_kit.search.run import search
    from qlora_kit.search.space import Space
    from qlora_kit.system.progress import say_line

    own = SearchConfig.names()
    faults = Faults()
    space = faults.collect(lambda: Space.from_flat({name: v for name, v in given.items() if name not in own}))
    told = {name: value for name, value in given.items() if name in own and value is not None}
    settings = faults.collect(lambda: SearchConfig.from_flat({**told, **flags}))
    faults.raise_if_any()
    assert space is not None
    assert settings is not None
    source.find_on_hub(space.config.base)
    say = Console(stderr=True, highlight=False)
    result = search(space, settings, say)
    if result is None:
        say_line(say, "nothing is finished yet: other processes are at work on what is left")
        return
    console = Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH)
    console.print(report.table(result))
    for line in (*report.closing(result), f"picture: {result.folder / picture.PICTURE_FILE}"):
        say_line(console, line)
