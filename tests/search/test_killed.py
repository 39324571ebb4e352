"""Searches that are killed, stopped, and shared by several processes."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
from children import in_a_child
from search_cases import FOUR, light_collections, note_trainings, results_of, search_of, settings_of, trainings

from qlora_kit import SearchConfig
from qlora_kit.runs.folder import RunFolder
from qlora_kit.search import run
from qlora_kit.search.space import Space
from qlora_kit.search.store import Store, opened
from qlora_kit.training import callback

__all__ = ["light_collections"]  # a fixture of every test here
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),  # Python 3.12
]
MOMENTS = [  # what a search does, and the how manyth time of it
    pytest.param(callback, "append_metrics", 1, id="in the first fold"),
    pytest.param(RunFolder, "finish", 2, id="before a fold's run is in its place"),
    pytest.param(Store, "record", 3, id="before a finished fold is recorded"),
    pytest.param(Store, "report", 2, id="before Optuna hears of it"),
    pytest.param(Store, "finish", 1, id="before a trial ends"),
    pytest.param(run, "_result", 1, id="at the end"),
]


@pytest.fixture(scope="module")
def undisturbed(tiny_runs, tmp_path_factory) -> dict[str, list[float]]:
    """The figures of a search that went through."""
    folder = tmp_path_factory.mktemp("undisturbed") / "x"
    search_of(settings_of(tiny_runs, folder))
    return results_of(folder)


def kill_before(owner, name: str, number: int, monkeypatch, how: int = signal.SIGKILL) -> None:
    """Let this process die just before it does `name` for the `number`-th time."""
    original, left = getattr(owner, name), [number]

    def counted(*args, **kwargs):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), how)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, counted)


def finished_folds(folder: Path) -> set[str]:
    return {f"{run.parent.parent.name}/{run.parent.name}" for run in folder.glob("runs/*/fold-[0-9]/run.json")}


@pytest.mark.parametrize(("owner", "name", "number"), MOMENTS)
def test_a_killed_search_goes_on_and_repeats_no_finished_fold(
    tiny_runs, tmp_path, monkeypatch, undisturbed, owner, name, number
):
    folder, notes = tmp_path / "x", tmp_path / "notes"
    flat = settings_of(tiny_runs, folder)

    def killed() -> None:
        kill_before(owner, name, number, monkeypatch)
        search_of(flat)

    _, status = os.waitpid(in_a_child(killed), 0)
    assert os.WIFSIGNALED(status)
    done = finished_folds(folder)
    note_trainings(monkeypatch, notes)
    result = search_of(flat)
    assert trainings(notes) == [fold for fold in FOUR if fold not in done]
    assert results_of(folder) == undisturbed
    assert [one.state for one in result.tried] == ["finished", "finished"]
    assert not list(folder.rglob("*.partial"))


@pytest.fixture
def interruptible():
    """Ctrl-C as in a terminal: a worker of pytest-xdist ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_keeps_what_is_finished_and_leaves_nothing_half_written(tiny_runs, tmp_path, monkeypatch, undisturbed):
    folder = tmp_path / "x"
    flat = settings_of(tiny_runs, folder)
    with monkeypatch.context() as patched:
        kill_before(callback, "append_metrics", 1, patched, signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            search_of(flat)
    assert not list(tmp_path.iterdir())  # nothing was finished
    with monkeypatch.context() as patched:
        kill_before(RunFolder, "finish", 2, patched, signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            search_of(flat)
    assert finished_folds(folder) == {"r=2/fold-1"}
    assert not list(folder.rglob("*.partial"))
    search_of(flat)
    assert results_of(folder) == undisturbed


def test_several_processes_share_a_search(tiny_runs, tmp_path, monkeypatch, undisturbed):
    folder, notes = tmp_path / "x", tmp_path / "notes"
    flat = settings_of(tiny_runs, folder)
    note_trainings(monkeypatch, notes)
    children = [in_a_child(lambda: search_of(flat)) for _ in range(2)]
    for child in children:
        assert os.waitpid(child, 0)[1] == 0
    assert sorted(trainings(notes)) == FOUR
    assert results_of(folder) == undisturbed  # of both, though each of them trained a part


def test_what_another_process_works_on_is_left_to_it_and_taken_over_when_it_dies(
    tiny_runs, tmp_path, monkeypatch, undisturbed
):
    folder, notes = tmp_path / "x", tmp_path / "notes"
    flat = settings_of(tiny_runs, folder)
    note_trainings(monkeypatch, notes)

    def works_and_sleeps() -> None:
        monkeypatch.setattr(run, "_try", lambda *_: time.sleep(600))
        search_of(flat)

    sleeper = in_a_child(works_and_sleeps)
    try:
        while not list(folder.glob("runs/r=2/search.lock")):
            time.sleep(0.01)
        result = search_of(flat)
        assert trainings(notes) == FOUR[2:]
        assert result.n_open == 1
        assert json.loads((folder / "results.json").read_text())["tried"][0]["state"] == "running"
    finally:
        os.kill(sleeper, signal.SIGKILL)
        os.waitpid(sleeper, 0)
    assert search_of(flat).n_open == 0
    assert sorted(trainings(notes)) == FOUR
    assert results_of(folder) == undisturbed


def test_a_process_that_is_asked_for_trials_by_many_gives_each_once(tmp_path):
    """The claims of four processes at once, without training: SQLite alone lets two take the same."""
    import optuna  # noqa: F401  # or each child would import it, and they would hardly meet

    folder, notes = tmp_path / "x", tmp_path / "notes"
    space = Space.from_flat({"r": ",".join(map(str, range(1, 13)))})

    def claims_all() -> None:
        from qlora_kit.search.planning import PlannedMemory

        search = SearchConfig(folds=2, metric="loss")
        with opened(folder, space, search, {}, lambda: PlannedMemory({}, None)) as store:
            while (claim := store.claim()) is not None:
                with notes.open("a") as file:
                    file.write(f"{claim.point['r']}\n")
                store.record(claim, 1, {"eval_loss": 1.0}, 1)
                store.record(claim, 2, {"eval_loss": 2.0}, 1)
                store.report(claim, [1.0])
                store.report(claim, [1.0, 2.0])
                store.finish(claim, [1.0, 2.0])
                claim.lock.release()

    children = [in_a_child(claims_all) for _ in range(4)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    assert sorted(map(int, notes.read_text().split())) == list(range(1, 13))
