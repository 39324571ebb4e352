"""The workflow of a search, from the request to the chosen combination."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from qlora_kit.config.settings import GROUPS, PER_CALL, RunConfig, SearchConfig
from qlora_kit.errors import Fault, Faults, UserError, as_field, named, rendered
from qlora_kit.model import device, hub
from qlora_kit.model.source import hash_base, model_source
from qlora_kit.runs import messages
from qlora_kit.runs.inputs import Examples, digest_of, read_inputs, read_material
from qlora_kit.search import picture, report
from qlora_kit.search.choice import Tried, best_of, choose, higher_is_better, metric_of
from qlora_kit.search.fold_run import DIVERGED, OUT_OF_MEMORY, EndedEarlyError, run_fold
from qlora_kit.search.folder import check_place, discard_if_empty, exists, remove
from qlora_kit.search.folds import make_folds
from qlora_kit.search.planning import PlannedMemory, plan_memory, read_budget
from qlora_kit.search.result import SearchResult
from qlora_kit.search.space import Space, label_of
from qlora_kit.search.store import BASE, DATA, Claim, Store, opened
from qlora_kit.system import files, quiet
from qlora_kit.system.progress import counted, say_line
from qlora_kit.tasks import registry
from qlora_kit.training.check import check_settings

FREE = (
    *PER_CALL,
    "allow_16_bit_experts",
    "device",
    "preflight",
    "report_to",
)  # settings that may change when a search goes on
FREE_OF_SEARCH = ("trials", "keep_runs")
OF_EVERY_RUN = ("eval_loss", "exact_match")  # besides the metrics of its task


@dataclass(frozen=True, kw_only=True)
class _Search:
    """What the runs of a search have in common."""

    space: Space
    search: SearchConfig
    folds: Sequence[Examples]
    say: Console


def search(space: Space, settings: SearchConfig, console: Console) -> SearchResult | None:
    """Try the combinations of `space` that are not tried yet, and choose among all; progress goes to `console`.

    Other processes may do the same in the same folder. None if nothing is finished while others still work. A search
    that was stopped or killed goes on where it was, with the same settings. Raises `UserError`.
    """
    quiet.quiet_libraries()
    config = space.config
    folder = folder_of(config)
    device_type = device.resolve_device(config.base.device).type
    _check(space, settings, folder, device_type)
    quiet.quiet_progress_bars()
    space, settings, examples = _resolved(space, settings, console)
    config = space.config
    folds = make_folds(examples, settings.folds, config.seed, config.data.data)
    check_settings(config, folds[0])
    longest_row = read_inputs(config, Examples(examples, [])).longest_row
    if config.overwrite:
        remove(folder)

    def plan() -> PlannedMemory:
        with console.status("planning the memory") as status:
            say = status.update
            return plan_memory(space, settings.budget, longest_row, device_type, lambda n: say(f"planning: {n} plans"))

    job = _Search(space=space, search=settings, folds=folds, say=console)
    with console.status("hashing the base"):
        described = _described(space, settings, examples)
    with (
        files.disk_errors(folder),
        opened(folder, space, settings, described, plan) as store,
        _kept_or_discarded(folder, console),
    ):
        n_open = _say_beginning(store, len(examples), job)
        _work(store, n_open, job)
        with store.locked():  # or another process, which ends later, might write first
            result = _result(store, space, settings)
            if result is not None:
                report.write(result)
                picture.write_picture(result)
        return result


def folder_of(config: RunConfig) -> Path:
    """The folder of the search: as set, or named after the model."""
    return Path("search") / Path(config.base.model.rstrip("/")).name if config.out is None else Path(config.out)


def _check(space: Space, settings: SearchConfig, folder: Path, device_type: str) -> None:
    """The checks that need no data. Raises one `UserError` with every fault."""
    with Faults() as faults:
        with faults.collecting():
            _check_request(space.config)
        with faults.collecting():
            read_budget(settings.budget, device_type)
        with faults.collecting():
            check_place(folder)


def _check_request(config: RunConfig) -> None:
    faults = []
    if config.resume is not None:
        remedy = "Drop it: the same command continues a search."
        faults.append(Fault("resume", config.resume, "does not apply to a search", remedy))
    stops = config.evaluation.early_stopping
    if stops is not None:
        rule = "would stop each run where the fold that scores it is best"
        remedy = f"Drop it; search {named('epochs')} or {named('max_steps')} instead."
        faults.append(Fault("early_stopping", stops, rule, remedy))
    if faults:
        raise UserError(faults)


def _resolved(space: Space, settings: SearchConfig, console: Console) -> tuple[Space, SearchConfig, list[Any]]:
    """The space and the settings with what the data decides, and the examples to divide. Raises `UserError`.

    The runs follow the same metric, if it is one of the task's.
    """
    material = read_material(space.config)
    for line in messages.unread_lines(material.unread):
        say_line(console, line)
    metric = material.task.metric if settings.metric == "auto" else settings.metric
    config = material.config
    counts = config.evaluation.exact_match is not None
    if metric == "exact_match" and metric not in material.task.metrics and not counts:
        rule = "is not measured by these runs"
        remedy = f"Add for example {named('exact_match', 100)}, so that 100 held-out prompts are answered."
        raise UserError.of("metric", metric, rule, remedy)
    if metric in material.task.metrics or metric not in OF_EVERY_RUN:
        registry.metric_of(material.task, metric)
        config = dataclasses.replace(config, evaluation=dataclasses.replace(config.evaluation, metric=metric))
    return dataclasses.replace(space, config=config), dataclasses.replace(settings, metric=metric), material.train


def _described(space: Space, settings: SearchConfig, examples: Sequence[Any]) -> dict[str, Any]:
    """What must be unchanged when the search goes on, by the name of the setting."""
    nested = space.config.to_dict()
    flat = {name: value for group in GROUPS for name, value in nested.pop(group).items()} | nested
    flat |= {name: list(values) for name, values in space.values.items()}
    kept = {name: value for name, value in flat.items() if name not in FREE}
    own = {name: value for name, value in dataclasses.asdict(settings).items() if name not in FREE_OF_SEARCH}
    return {**kept, **own, DATA: digest_of(examples), BASE: _identity(space.config)}


def _identity(config: RunConfig) -> str:
    """A hash of the base's weights; of one on the hub, whose weights may not be here yet, its commit."""
    source = model_source(config.base)
    if config.base.weights == "random" or Path(source).is_dir():
        return hash_base(config.base, config.seed)
    return hub.fetch_model_file(source, "config.json", config.base.revision).parent.name


@contextmanager
def _kept_or_discarded(folder: Path, say: Console) -> Iterator[None]:
    """When the search stops early, keep it if a fold is finished, and say how to continue."""
    try:
        yield
    except BaseException:
        if exists(folder) and not discard_if_empty(folder):
            say_line(say, f"stopped; the finished folds are in {folder}, and the same command continues")
        raise


def _say_beginning(store: Store, n_examples: int, job: _Search) -> int:
    """Print what is ruled out and what is left to do; returns the number of combinations still to be tried."""
    with store.locked():
        tried, n_open = store.tried(), store.n_open()
    for one in tried:
        if one.is_ruled_out:
            say_line(job.say, f"{one.label}: {one.state}")
    settings = job.search
    direction = "higher" if higher_is_better(settings.metric) else "lower"
    say_line(
        job.say,
        f"{n_open} combinations to try, each in {settings.folds} folds of {n_examples:,} examples; "
        f"{settings.metric} decides, {direction} is better",
    )
    if job.space.config.data.eval_data is not None:
        say_line(job.say, "eval_data is not used here: it is for the run with the chosen settings")
    return n_open


def _work(store: Store, n_open: int, job: _Search) -> None:
    total = n_open * len(job.folds)
    bar = counted(job.say, "folds", total) if job.say.is_terminal else nullcontext(lambda _: None)
    with bar as tick:
        while (claim := store.claim()) is not None:
            try:
                _try(store, claim, job, tick)
            finally:
                claim.lock.release()


def _try(store: Store, claim: Claim, job: _Search, tick: Callable[[int], None]) -> None:
    """Run the folds of a combination that are missing, and end its trial."""
    values: list[float] = []
    reason = _run_folds(store, claim, job, tick, values)
    if reason is not None:
        say_line(job.say, f"{label_of(claim.point)}: {reason}")
        tick(len(job.folds) - len(values))
    store.finish(claim, values, reason)


def _run_folds(
    store: Store, claim: Claim, job: _Search, tick: Callable[[int], None], values: list[float]
) -> str | None:
    """Append the metric of each fold to `values`; returns why some were not run, or None."""
    for fold in range(1, len(job.folds) + 1):
        try:
            values.append(_value_of(store, claim, fold, job))
        except EndedEarlyError as ended:
            return f"{ended} in fold {fold}"
        tick(1)
        _say_fold(claim, values, job)
        if store.report(claim, values) and fold < len(job.folds):
            return f"stopped after {fold} folds: its best mean is worse than the median of the others"
    return None


def _say_fold(claim: Claim, values: Sequence[float], job: _Search) -> None:
    where = f"{label_of(claim.point)}: fold {len(values)} of {len(job.folds)}"
    mean = sum(values) / len(values)
    say_line(job.say, f"{where}, {job.search.metric} {values[-1]:.4f} (mean {mean:.4f})")


def _value_of(store: Store, claim: Claim, fold: int, job: _Search) -> float:
    """The metric of a fold, trained unless it is recorded. Raises `EndedEarlyError`, and `UserError`.

    A fault of a searched value ends only its combination.
    """
    results = claim.results(fold)
    if results is None:
        config = job.space.config_of(claim.point)
        folder = store.folder_of(claim.point) / f"fold-{fold}"
        try:
            record = run_fold(config, job.folds[fold - 1], folder, job.search.keep_runs)
        except UserError as error:
            if any(fault.setting not in claim.point for fault in error.faults):
                raise
            reasons = (f"{fault.setting} {rendered(fault.rule, as_field)}" for fault in error.faults)
            raise EndedEarlyError("; ".join(reasons)) from None
        results = record["results"]
        value = metric_of(results, job.search.metric)
        assert value is not None, "the metric was checked"
        if not math.isfinite(value):
            raise EndedEarlyError(DIVERGED)
        store.record(claim, fold, results, record["parameters"]["trainable"])
        return value
    value = metric_of(results, job.search.metric)
    assert value is not None, "as it was when it was recorded"
    return value


def _fault_of(tried: Tried) -> Fault:
    """Why a combination has no figure, and what helps."""
    smaller = f"Give a smaller {named('batch_size')} or {named('seq_len')}."
    remedies = {DIVERGED: f"Lower {named('lr')}.", OUT_OF_MEMORY: smaller}
    remedy = next((own for reason, own in remedies.items() if reason in tried.state), "Search other values.")
    return Fault("the combination", tried.label, f"has no figure: {tried.state}", remedy)


def _result(store: Store, space: Space, settings: SearchConfig) -> SearchResult | None:
    """The result so far, or None. Raises `UserError` if every combination ended without a figure."""
    tried = store.tried()
    if not any(one.is_finished for one in tried):
        if any(one.is_open for one in tried):
            return None
        raise UserError(_fault_of(one) for one in tried)
    higher = higher_is_better(settings.metric)
    best, chosen = best_of(tried, higher), choose(tried, higher)
    config = space.config_of(chosen.point)
    return SearchResult(
        folder=store.folder,
        metric=settings.metric,
        n_folds=settings.folds,
        tried=tuple(tried),
        best=best,
        chosen=chosen,
        config=config,
    )
