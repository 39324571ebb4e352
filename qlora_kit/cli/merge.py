"""`qlora-kit merge`: the release of a run, with its proof."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qlora_kit.cli.flags import Command, as_given
from qlora_kit.config.rules import Checked, setting
from qlora_kit.config.settings import RunConfig
from qlora_kit.errors import Faults, UserError, named

if TYPE_CHECKING:
    from qlora_kit.release.request import MergeRequest


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergeFlags(Checked):
    """The flags of this command alone."""

    run: str | None = setting(None, "finished run, whose adapter is merged into its base", metavar="FOLDER")
    adapter: tuple[str, ...] = setting(
        (),
        "adapter made elsewhere, DIR or DIR:weight; repeat it to add up several",
        repeated=True,
        metavar="ADAPTER",
    )
    base: str | None = setting(
        None, "the base of --adapter, or where the run's base is now: folder or hub id", metavar="MODEL"
    )
    into: str | None = setting(
        None,
        "base to merge into; trained: as the adapter saw it, e.g. nf4 and back; best: both are scored on --data, the "
        "better one is kept (default: trained)",
        choices=("trained", "original", "best"),
    )
    dtype: str = setting("bf16", "dtype of the release", choices=("bf16", "fp16", "fp32"))
    format: str = setting("dense", "nf4: quantized after the merge, for bitsandbytes", choices=("dense", "nf4"))
    allow_other_base: bool = setting(False, "merge even if the base is not the one that the run was trained on")


SETTINGS = {
    "out": "folder of the release",
    "overwrite": "replace an existing release",
    "data": "data for the proof and for --into best; unset: the run's held-out data",
    "columns": "",
    "seq_len": "longest example of --data in tokens; unset: the run's",
    "bits": "how --adapter saw its base (default: 4)",
    "quant_type": "",
    "double_quant": "",
    "revision": "",
    "tokenizer": "tokenizer of the release; unset: the adapter's, else the base's",
    "source_prefix": "text before each source that --adapter saw; unset: the run's",
    "trust_remote_code": "",
}


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
    from rich.console import Console

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

    chosen: list[tuple[str, float]] = []
    with Faults() as faults:
        for text in adapters:
            with faults.collecting():
                chosen.append(parse_adapter(text))
        with faults.collecting():
            config, into = _settings(given, run, [folder for folder, _ in chosen], base, choices.get("into"))
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
        remedy = f"Say where to write the release, for example {named('out', 'release/x')}."
        raise UserError.of("out", None, "is needed", remedy)
    if run is not None:
        return _run_settings(given, run, adapters, base), "trained"
    if not adapters:
        remedy = f"Give {named('run', 'runs/x')}, or {named('adapter', 'DIR')} {named('base', 'MODEL')}."
        raise UserError.of("run", None, "is needed", remedy)
    if base is None:
        rule = f"is needed beside {named('adapter')}"
        raise UserError.of("base", None, rule, "Give the model that the adapter was trained on.")
    from qlora_kit.release.request import held_by

    held = held_by(adapters, given, into)
    known = {"bits": 16} if held is None else held
    return RunConfig.from_flat({**known, **given, "model": base}), "original" if held is None else "trained"


def _run_settings(given: Mapping[str, Any], run: str, adapters: Sequence[str], base: str | None) -> RunConfig:
    from qlora_kit.runs.finished import find_run

    if adapters:
        both = f"{named('adapter', run.rstrip('/') + '/adapter')} {named('adapter', adapters[0])}"
        rule = f"cannot be combined with {named('run')}, whose own adapter is merged"
        remedy = f"To merge both, give {both} {named('base', 'MODEL')}."
        raise UserError.of("adapter", adapters[0], rule, remedy)
    if "source_prefix" in given:
        rule = f"cannot be combined with {named('run')}, which has its own"
        raise UserError.of("source_prefix", given["source_prefix"], rule, "Drop it.")
    config = find_run(run, given, base).config
    if "tokenizer" in given:
        return config
    saved = dataclasses.replace(config.base, tokenizer=None)  # the one that was saved beside the adapter
    return dataclasses.replace(config, base=saved)


COMMAND = Command(
    run=run,
    example="qlora-kit merge --run runs/chat --out release/chat",
    flags=MergeFlags,
    settings=SETTINGS,
    read=as_given,
    renamed={"model": "base"},
)
