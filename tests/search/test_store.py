"""The trials of a search in SQLite, without any training."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from qlora_kit import SearchConfig
from qlora_kit.memory.fit import Budget
from qlora_kit.search.folder import discard_if_empty, is_idle, remove
from qlora_kit.search.planning import PlannedMemory
from qlora_kit.search.space import Space
from qlora_kit.search.store import PRUNE_AFTER, opened

NOTHING_PLANNED = PlannedMemory({}, None)


def open_store(folder: Path, plan=lambda: NOTHING_PLANNED, ranks="1,2,4,8,16,32", **search):
    search = SearchConfig(**{"folds": 3, "metric": "f1", **search})
    return opened(folder, Space.from_flat({"r": ranks}), search, {"a": 1}, plan)


def run_trial(store, claim, values) -> bool:
    """Record `values` as the folds of a trial, as the workflow does; returns whether it was stopped."""
    for fold, value in enumerate(values, start=1):
        store.record(claim, fold, {"f1": value}, 100)
        if store.report(claim, values[:fold]) and fold < len(values):
            store.finish(claim, values[:fold], "stopped")
            claim.lock.release()
            return True
    store.finish(claim, values)
    claim.lock.release()
    return False


def tried(store):
    with store.locked():
        return store.tried()


def test_a_grid_is_claimed_in_order_each_combination_once(tmp_path):
    with open_store(tmp_path) as store:
        claims = [store.claim() for _ in range(7)]
        assert [claim and claim.point["r"] for claim in claims] == [1, 2, 4, 8, 16, 32, None]


def test_two_users_never_hold_the_same_trial(tmp_path):
    with open_store(tmp_path) as one, open_store(tmp_path) as other:
        claims = [store.claim() for _, store in zip(range(6), itertools.cycle([one, other]), strict=False)]
        assert sorted(claim.point["r"] for claim in claims) == [1, 2, 4, 8, 16, 32]
        assert one.claim() is None


def test_a_trial_whose_process_died_goes_on_with_its_folds(tmp_path):
    with open_store(tmp_path) as store:
        claim = store.claim()
        store.record(claim, 1, {"f1": 0.5}, 100)
        claim.lock.release()  # as the kernel does for a killed process
    with open_store(tmp_path) as store:
        again = store.claim()
        assert again.point == claim.point
        assert again.results(1) == {"f1": 0.5}
        assert again.results(2) is None
        assert not run_trial(store, again, [0.5, 0.6, 0.7])
        first = tried(store)[0]
        assert first.is_finished
        assert first.values == (0.5, 0.6, 0.7)
        assert first.trainable == 100


def test_a_setting_is_stopped_when_its_mean_is_worse_than_the_median(tmp_path):
    with open_store(tmp_path, prune="on") as store:
        for value in (0.8, 0.7, 0.9)[:PRUNE_AFTER]:
            assert not run_trial(store, store.claim(), [value] * 3)
        assert run_trial(store, store.claim(), [0.75, 0.75, 0.75])  # after two folds: one says too little
        assert not run_trial(store, store.claim(), [0.1, 1.9, 0.9])
        stopped = tried(store)[3]
        assert stopped.state == "stopped"
        assert stopped.values == (0.75, 0.75)


def test_folds_that_are_recorded_are_not_judged_again(tmp_path):
    with open_store(tmp_path, prune="on") as store:
        slow = store.claim()
        for fold in (1, 2, 3):
            store.record(slow, fold, {"f1": 0.1}, 100)
            assert not store.report(slow, [0.1] * fold)  # nothing to compare with
        for value in (0.8, 0.7, 0.9)[:PRUNE_AFTER]:
            run_trial(store, store.claim(), [value] * 3)
        slow.lock.release()  # as the kernel does for a process that was killed before it could finish
    with open_store(tmp_path, prune="on") as store:
        again = store.claim()
        assert again.point == slow.point
        assert not run_trial(store, again, [0.1] * 3)
        assert tried(store)[0].values == (0.1, 0.1, 0.1)


def test_fewer_trials_than_were_made_leave_none_open(tmp_path):
    with open_store(tmp_path, sampler="tpe", trials=3) as store:
        for _ in range(3):
            run_trial(store, store.claim(), [0.5] * 3)
    with open_store(tmp_path, sampler="tpe", trials=2) as store, store.locked():
        assert store.n_open() == 0


def test_a_grid_stops_nothing_unless_asked(tmp_path):
    with open_store(tmp_path) as store:
        stopped = [run_trial(store, store.claim(), [value] * 3) for value in (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)]
        assert not any(stopped)


def test_a_search_that_was_killed_as_it_began_begins_anew(tmp_path):
    class KilledError(Exception):
        pass

    def killed() -> PlannedMemory:
        raise KilledError

    (tmp_path / "search.lock").touch()  # there already, so that what fails does not remove it
    with pytest.raises(KilledError), open_store(tmp_path, killed):
        pass
    with open_store(tmp_path) as store:
        assert len(tried(store)) == 6


def test_combinations_beyond_the_budget_are_never_asked_for(tmp_path):
    planned = PlannedMemory({f"r={r}": r * 2**30 for r in (1, 2, 4, 8, 16, 32)}, Budget(4 * 2**30, "given"))
    for sampler in ("grid", "tpe"):
        with open_store(tmp_path / sampler, lambda: planned, sampler=sampler) as store:
            asked = []
            while (claim := store.claim()) is not None:
                asked.append(claim.point["r"])
                run_trial(store, claim, [0.5, 0.6, 0.7])
            assert sorted(asked) == [1, 2, 4]
            assert [one.state for one in tried(store)[3:]] == [
                f"ruled out: needs {r:.2f} GiB, and 4.00 GiB are given" for r in (8, 16, 32)
            ]


def test_tpe_never_repeats_a_combination_and_is_the_same_after_a_stop(tmp_path):
    def all_asked(folder: Path, stops: bool) -> list[int]:
        asked = []
        for _ in range(4):
            with open_store(folder, ranks="1,2,4,8", sampler="tpe") as store:
                while (claim := store.claim()) is not None:
                    asked.append(claim.point["r"])
                    run_trial(store, claim, [1 / claim.point["r"]] * 3)
                    if stops:
                        break
        return asked

    through = all_asked(tmp_path / "a", stops=False)
    assert sorted(through) == [1, 2, 4, 8]
    assert all_asked(tmp_path / "b", stops=True) == through


def test_a_search_that_someone_works_on_is_not_removed(tmp_path):
    folder = tmp_path / "x"
    with open_store(folder) as store:
        claim = store.claim()
        assert not is_idle(folder)
        assert not discard_if_empty(folder)
        with pytest.raises(Exception, match="another process"):
            remove(folder)
        claim.lock.release()
        assert discard_if_empty(folder)
    assert not folder.exists()
