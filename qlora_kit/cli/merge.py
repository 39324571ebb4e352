"""`qlora-kit merge`: the release of a run, with its proof."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console

from qlora_kit.config.settings import RunConfig
from qlora_kit.errors import Faults, UserError
from qlora_kit.system import quiet

if TYPE_CHECKING:
    from qlora_kit.release.request import MergeRequest


def run(
    given: Mapping[str, Any],
    run: str | None = None,
    adapter: Sequence[str] = (),
    base: str | None = None,
    **choices: Any,
) -> None:
    """Merge, prove, and print what was found; progress goes to standard error.

    `given` holds those settings that were given, by name; `choices` are those of `MergeRequest`. Raises `UserError`.
    """
    quiet.quiet_libraries()
    request = make_request(given, run, adapter, base, choices)
    from qlora_kit.release import report
    from qlora_kit.release.merge import merge

    result = merge(request, Console(stderr=True, highlight=False))
    for line in report.closing(result.report, request.out):
        print(line)


def make_request(
    given: Mapping[str, Any], run: str | None, adapters: Sequence[str], base: str | None, choices: Mapping[str, Any]
) -> MergeRequest:
    """The merge that was asked for on the command line. Raises one `UserError` with every fault."""
    from qlora_kit.release.factors import parse_adapter
    from qlora_kit.release.request import MergeRequest

    faults = Faults()
    parsed = [faults.collect(lambda text=text: parse_adapter(text)) for text in adapters]  # type: ignore[misc]
    chosen = [own for own in parsed if own is not None]
    folders = [folder for folder, _ in chosen]
    settings = faults.collect(lambda: _settings(given, run, folders, base, choices.get("into")))
    faults.raise_if_any()
    assert settings is not None
    config, into = settings
    if not chosen and run is not None:
        chosen = [(f"{run.rstrip('/')}/adapter", 1.0)]
    data = dataclasses.replace(config.data, eval_data=None, eval_fraction=0.0) if "data" in given else config.data
    return MergeRequest(
        base=config.base,
        adapters=tuple(chosen),
        out=config.out or "",
        run=run,
        overwrite=config.overwrite,
        data=data if "data" in given or run is not None else None,
        data_given="data" in given,
        seed=config.seed,
        **{"into": into, **choices},
    )


def _settings(
    given: Mapping[str, Any], run: str | None, adapters: Sequence[str], base: str | None, into: str | None
) -> tuple[RunConfig, str]:
    """The settings of the run with those that were given over them; without a run, those that were given.

    And what to merge into by default: where nothing says how the base was seen, its own weights.
    """
    if "out" not in given:
        raise UserError.of("--out", None, "is needed", "Say where to write the release, for example --out release/x.")
    if run is not None:
        return _run_settings(given, run, adapters, base), "trained"
    if not adapters:
        raise UserError.of("--run", None, "is needed", "Give --run runs/x, or --adapter DIR --base MODEL.")
    if base is None:
        rule = "is needed beside --adapter"
        raise UserError.of("--base", None, rule, "Give the model that the adapter was trained on.")
    from qlora_kit.release.request import held_by

    held = held_by(adapters, given, into)
    known = {"bits": 16} if held is None else held
    return RunConfig.from_flat({**known, **given, "model": base}), "original" if held is None else "trained"


def _run_settings(given: Mapping[str, Any], run: str, adapters: Sequence[str], base: str | None) -> RunConfig:
    from qlora_kit.runs.finished import find_run

    if adapters:
        remedy = f"To merge both, give --adapter {run.rstrip('/')}/adapter --adapter {adapters[0]} --base MODEL."
        raise UserError.of("--adapter", adapters[0], "cannot go with --run, whose own adapter is merged", remedy)
    if "source_prefix" in given:
        rule = "cannot go with --run, which has its own"
        raise UserError.of("--source-prefix", given["source_prefix"], rule, "Drop it.")
    config = find_run(run, given, base).config
    if "tokenizer" in given:
        return config
    saved = dataclasses.replace(config.base, tokenizer=None)  # the one that was saved beside the adapter
    return dataclasses.replace(config, base=saved)
