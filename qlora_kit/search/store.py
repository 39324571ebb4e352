"""The trials of a search in SQLite: its settings, which process works on what, and the results.

search/x/search.db      an Optuna study: a trial for each combination, in it the results of each finished fold
search/x/search.lock    held while the study is read and changed, so that no two processes take the same trial
search/x/runs/r=8,…/    the finished runs of a combination (fold-1, …), and the lock of the process that works on it

Optuna's own heartbeat takes a trial for dead after a while and starts it again. A lock dies with its process, so that a
trial whose process was killed goes on at once, and keeps its finished folds.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.config.rules import default_of, fields_of
from qlora_kit.config.settings import DEFAULT_TRIALS, SearchConfig
from qlora_kit.config.settings import settings as declared
from qlora_kit.errors import Fault, UserError, named
from qlora_kit.search.choice import FINISHED, RULED_OUT, RUNNING, WAITING, Tried, higher_is_better, metric_of
from qlora_kit.search.folder import DB_FILE, LOCK_FILE, RUNS, discard_if_empty, exists
from qlora_kit.search.planning import PlannedMemory
from qlora_kit.search.space import Point, Space, folder_name
from qlora_kit.system.locks import Lock, locked, take

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.distributions import BaseDistribution
    from optuna.storages import RDBStorage
    from optuna.trial import FrozenTrial

STUDY = "search"
BUSY_S = 60.0  # how long SQLite waits for another process's reading or writing
PRUNE_AFTER = 3  # finished combinations before any is stopped early
PRUNE_FROM_FOLD = 2  # one fold is too few to judge
RANDOM_SHARE = 4  # TPE draws the first quarter of its combinations at random
DRAWS = 20  # of TPE, before the first untried combination is taken instead

POINT, REASON, TRAINABLE = "point", "reason", "trainable"  # what a trial has beside Optuna's own
SETTINGS, DEVICE_BYTES = "settings", "device_bytes"  # what the study has
DATA, BASE = "examples", "weights"  # among its settings: the digests of the examples, and of the base


@dataclass(frozen=True)
class Claim:
    """A trial that this process works on, for as long as it holds the lock."""

    point: Point
    trial: Trial
    lock: Lock

    def results(self, fold: int) -> dict[str, Any] | None:
        """What the run of `fold` (from 1) reported; None where it is not recorded yet."""
        found: dict[str, Any] | None = self.trial.user_attrs.get(_fold_key(fold))
        return found


class Store:
    """The study of a search, for `opened` to make; what changes it holds the lock of the search meanwhile."""

    def __init__(self, folder: Path, space: Space, search: SearchConfig, storage: RDBStorage) -> None:
        self.folder = folder
        self._space = space
        self._search = search
        self._storage = storage
        self._study = self._load_study()

    def begin_or_check(self, settings: Mapping[str, Any], plan: Callable[[], PlannedMemory]) -> None:
        """Begin the study with `settings`, ruling out what does not fit, or continue the existing one.

        Raises `UserError` with every setting that has changed.
        """
        stored = self._study.user_attrs.get(SETTINGS)
        if stored is not None:
            before = {**_defaults(), **stored}
            differing = {name for name in {*stored, *settings} if before.get(name) != settings.get(name)}
            _check_same(before, settings, differing)
            return
        self._begin(settings, plan())

    def _begin(self, settings: Mapping[str, Any], memory: PlannedMemory) -> None:
        import optuna

        optuna.delete_study(study_name=STUDY, storage=self._storage)  # one that was killed as it began is not whole
        self._study = self._load_study()
        self._study.set_user_attr(DEVICE_BYTES, dict(memory.device_bytes))
        for point in self._space.points():
            if not memory.fits(point):
                self._rule_out(point, f"{RULED_OUT}: {memory.said_of(point)}")
            elif self._search.sampler == "grid":
                self._enqueue(point)
        self._study.set_user_attr(SETTINGS, dict(settings))  # the last: from here on the study is whole

    def _load_study(self) -> Study:
        import optuna
        from optuna.study import StudyDirection

        direction = StudyDirection.MAXIMIZE if higher_is_better(self._search.metric) else StudyDirection.MINIMIZE
        pruner: optuna.pruners.BasePruner = optuna.pruners.NopPruner()
        if self._search.prunes:
            pruner = optuna.pruners.MedianPruner(PRUNE_AFTER, n_warmup_steps=PRUNE_FROM_FOLD - 1)
        return optuna.create_study(
            study_name=STUDY, storage=self._storage, direction=direction, pruner=pruner, load_if_exists=True
        )

    def _rule_out(self, point: Point, reason: str) -> None:
        import optuna

        self._study.add_trial(
            optuna.create_trial(
                state=optuna.trial.TrialState.FAIL,
                params=dict(point),
                distributions=self._distributions(),
                user_attrs={POINT: dict(point), REASON: reason},
            )
        )

    def _enqueue(self, point: Point) -> None:
        self._study.enqueue_trial(dict(point), user_attrs={POINT: dict(point)})

    def _distributions(self) -> dict[str, BaseDistribution]:
        from optuna.distributions import CategoricalDistribution

        return {name: CategoricalDistribution(values) for name, values in self._space.values.items()}

    def folder_of(self, point: Point) -> Path:
        """Where the runs of `point` are."""
        return self.folder / RUNS / folder_name(point)

    # ------------------------------------------------------------------------------------------ working on trials

    def claim(self) -> Claim | None:
        """The next trial to work on: one whose process died, else one that waits; None if there is none."""
        with self.locked():
            return self._claim_orphan() or self._claim_waiting()

    def _claim_orphan(self) -> Claim | None:
        from optuna.trial import Trial, TrialState

        study_id = self._storage.get_study_id_from_name(STUDY)
        for found in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            lock = self._take(found.user_attrs[POINT])
            if lock is not None:
                trial_id = self._storage.get_trial_id_from_study_id_trial_number(study_id, found.number)
                return self._claimed(Trial(self._study, trial_id), lock)
        return None

    def _claim_waiting(self) -> Claim | None:
        from optuna.trial import TrialState

        if not self._study.get_trials(deepcopy=False, states=(TrialState.WAITING,)) and not self._enqueue_next():
            return None
        trial = self._study.ask()
        lock = self._take(trial.user_attrs[POINT])
        assert lock is not None, "nobody works on a trial that waits"
        return self._claimed(trial, lock)

    def _take(self, point: Point) -> Lock | None:
        return take(self.folder_of(point) / LOCK_FILE, wait=False)

    def _claimed(self, trial: Trial, lock: Lock) -> Claim:
        for name, values in self._space.values.items():
            trial.suggest_categorical(name, values)
        return Claim(trial.user_attrs[POINT], trial, lock)

    def _enqueue_next(self) -> bool:
        """Let TPE add a trial, unless there are enough, or every combination has one."""
        if self._search.sampler != "tpe":
            return False
        trials = self._study.get_trials(deepcopy=False)
        known = [trial.user_attrs[POINT] for trial in trials]
        untried = [point for point in self._space.points() if point not in known]
        if not untried or len(_asked(trials)) >= self._wanted:
            return False
        self._enqueue(self._suggested(trials, untried))
        return True

    @property
    def _wanted(self) -> int:
        """How many combinations TPE is to try."""
        return self._search.trials or DEFAULT_TRIALS

    def _suggested(self, trials: list[FrozenTrial], untried: list[Point]) -> Point:
        """One of `untried`, chosen by TPE from the finished trials; deterministic for the same history."""
        import optuna

        sampler = optuna.samplers.TPESampler(
            n_startup_trials=max(2, self._wanted // RANDOM_SHARE), seed=(self._space.config.seed + len(trials)) % 2**32
        )
        study = optuna.create_study(direction=self._study.direction, sampler=sampler)
        study.add_trials([trial for trial in trials if trial.state.is_finished() and trial.intermediate_values])
        distributions = self._distributions()
        for _ in range(DRAWS):
            drawn = study.ask(distributions)
            if drawn.params in untried:
                return drawn.params
        return untried[0]

    def record(self, claim: Claim, fold: int, results: Mapping[str, Any], trainable: int) -> None:
        """Store what the run of `fold` (from 1) reported, at once or not at all."""
        with self.locked():
            claim.trial.set_user_attr(TRAINABLE, trainable)
            claim.trial.set_user_attr(_fold_key(fold), dict(results))

    def report(self, claim: Claim, values: list[float]) -> bool:
        """Report the mean of `values`, one a fold, to Optuna; returns whether to stop here.

        When a trial goes on, only its last reported fold is judged: Optuna looks at no other.
        """
        with self.locked():
            step = len(values) - 1
            known = self._study.get_trials(deepcopy=False)[claim.trial.number].intermediate_values
            if step not in known:
                claim.trial.report(statistics.fmean(values), step)
            return step >= max(known, default=step) and claim.trial.should_prune()

    def finish(self, claim: Claim, values: list[float], reason: str | None = None) -> None:
        """End the trial: with the mean of all folds, or without a figure if there is a `reason`."""
        from optuna.trial import TrialState

        with self.locked():
            if reason is None:
                self._study.tell(claim.trial, statistics.fmean(values))
                return
            claim.trial.set_user_attr(REASON, reason)
            self._study.tell(claim.trial, state=TrialState.PRUNED if values else TrialState.FAIL)

    # ------------------------------------------------------------------------------------------- what was found

    def tried(self) -> list[Tried]:
        """Every combination that was enqueued or ruled out, in the order of the space; call it within `locked`."""
        trials = self._study.get_trials(deepcopy=False)
        bytes_of = self._study.user_attrs[DEVICE_BYTES]
        order = {folder_name(point): index for index, point in enumerate(self._space.points())}
        found = [self._tried(trial, bytes_of) for trial in trials]
        return sorted(found, key=lambda one: order[folder_name(one.point)])

    def _tried(self, trial: FrozenTrial, bytes_of: Mapping[str, int | None]) -> Tried:
        from optuna.trial import TrialState

        states = {TrialState.COMPLETE: FINISHED, TrialState.RUNNING: RUNNING, TrialState.WAITING: WAITING}
        point = trial.user_attrs[POINT]
        return Tried(
            point=point,
            rank=self._space.config_of(point).adapter.r,
            state=states.get(trial.state) or trial.user_attrs[REASON],
            values=self._values_of(trial),
            trainable=trial.user_attrs.get(TRAINABLE),
            device_bytes=bytes_of.get(folder_name(point)),
        )

    def _values_of(self, trial: FrozenTrial) -> tuple[float, ...]:
        """The metric of each fold that is recorded, as far as they follow each other."""
        values: list[float] = []
        while (results := trial.user_attrs.get(_fold_key(len(values) + 1))) is not None:
            value = metric_of(results, self._search.metric)
            assert value is not None, "the metric is checked before anything runs"
            values.append(value)
        return tuple(values)

    def n_open(self) -> int:
        """How many combinations are still to be tried, by whichever process; call it within `locked`."""
        trials = self._study.get_trials(deepcopy=False)
        n_ended = sum(trial.state.is_finished() for trial in trials)
        if self._search.sampler == "grid":
            return len(trials) - n_ended
        n_ruled_out = len(trials) - len(_asked(trials))
        n_to_try = min(self._wanted, len(self._space.points()) - n_ruled_out)
        return max(n_to_try - (n_ended - n_ruled_out), 0)  # fewer may be wanted than when it began

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from the study."""
        with locked(self.folder / LOCK_FILE):
            yield


def _asked(trials: Iterable[FrozenTrial]) -> list[FrozenTrial]:
    """Those of `trials` that were not ruled out before they began."""
    return [trial for trial in trials if not trial.user_attrs.get(REASON, "").startswith(RULED_OUT)]


def _fold_key(fold: int) -> str:
    return f"fold-{fold}"


@contextmanager
def opened(
    folder: Path,
    space: Space,
    search: SearchConfig,
    settings: Mapping[str, Any],
    plan: Callable[[], PlannedMemory],
) -> Iterator[Store]:
    """The store of the search in `folder`; a new one begins with what `plan` returns.

    Raises `UserError` if the search exists with other settings.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)  # the search reports its own progress
    is_new = not exists(folder)
    with locked(folder / LOCK_FILE):
        url = f"sqlite:///{folder.absolute() / DB_FILE}"
        storage = optuna.storages.RDBStorage(url, engine_kwargs={"connect_args": {"timeout": BUSY_S}})
    try:
        with _discarded(folder if is_new else None), locked(folder / LOCK_FILE):
            store = Store(folder, space, search, storage)
            store.begin_or_check(settings, plan)
        yield store
    finally:
        storage.remove_session()
        storage.engine.dispose()


@contextmanager
def _discarded(folder: Path | None) -> Iterator[None]:
    """Remove the new `folder` of a search that cannot begin."""
    try:
        yield
    except BaseException:
        if folder is not None:
            discard_if_empty(folder)
        raise


def _defaults() -> dict[str, Any]:
    """Every setting's default, in JSON's types: a search of an older version has no value for later settings."""
    fields = [*(f for _, f, _ in declared()), *(f for f, _ in fields_of(SearchConfig))]
    plain: dict[str, Any] = json.loads(json.dumps({f.name: default_of(f) for f in fields}))
    return plain


def _check_same(stored: Mapping[str, Any], now: Mapping[str, Any], differing: set[str]) -> None:
    remedy = f"Leave it as it was, give another {named('out')}, or start again with {named('overwrite', True)}."
    faults = [
        Fault(name, now.get(name), f"was {stored.get(name)!r} when this search began", remedy)
        for name in sorted(differing - {DATA, BASE})
    ]
    if DATA in differing and not faults:
        faults.append(Fault("data", now["data"], "has changed since this search began", remedy))
    if BASE in differing and not faults:
        faults.append(Fault("model", now["model"], "has changed since this search began", remedy))
    if faults:
        raise UserError(faults)
