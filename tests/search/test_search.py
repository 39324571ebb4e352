"""A search end to end, on tiny models."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import sqlite3
from pathlib import Path

import pytest
import yaml
from classifiers import save_base
from refusals import fails, with_flags
from rich.console import Console
from safetensors.torch import load_file, save_file
from search_cases import (
    FOUR,
    N_EXAMPLES,
    ROWS,
    light_collections,
    note_trainings,
    results_of,
    search_of,
    settings_of,
    trainings,
)

from qlora_kit import RunConfig, SearchConfig, UserError, train
from qlora_kit.cli.main import main
from qlora_kit.config.files import read_settings_file
from qlora_kit.runs.inputs import read_material
from qlora_kit.search.folder import DB_FILE
from qlora_kit.search.folds import make_folds
from qlora_kit.search.run import search
from qlora_kit.search.space import Space

__all__ = ["light_collections"]  # a fixture of every test here


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture(scope="module")
def whole(tiny_runs, tmp_path_factory) -> Path:
    """A search of two ranks and two folds that went through; tests leave it as it is."""
    folder = tmp_path_factory.mktemp("search") / "whole"
    search_of(settings_of(tiny_runs, folder))
    return folder


def test_a_search_leaves_figures_a_picture_and_a_file_to_train_with(tiny_runs, whole):
    assert names(whole) == {"search.db", "search.lock", "runs", "results.json", "results.png", "best.yaml"}
    for point in ("r=2", "r=4"):
        assert names(whole / "runs" / point) == {"search.lock", "fold-1", "fold-1.log", "fold-2", "fold-2.log"}
        for fold in ("fold-1", "fold-2"):
            left = names(whole / "runs" / point / fold)
            assert {"run.json", "metrics.jsonl"} <= left
            assert not left & {"adapter", "checkpoints"}
            assert "training loss" in (whole / "runs" / point / f"{fold}.log").read_text()
    content = json.loads((whole / "results.json").read_text())
    assert [one["rank"] for one in content["tried"]] == [2, 4]
    assert content["tried"][1]["trainable"] == 2 * content["tried"][0]["trainable"] > 0
    assert (whole / "results.png").read_bytes().startswith(b"\x89PNG")


def test_a_fold_gives_what_training_on_it_gives(tiny_runs, whole, tmp_path):
    """The naive way: the fold's examples in files of their own."""
    space = Space.from_flat(settings_of(tiny_runs, whole))
    fold = make_folds(read_material(space.config).train, 2, space.config.seed, "data")[1]
    assert len(fold.train) + len(fold.held_out) == N_EXAMPLES
    files = {"data": fold.train, "eval_data": fold.held_out}
    for name, examples in files.items():
        lines = [json.dumps({"text": example.completion}) for example in examples]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    flat = settings_of(tiny_runs, tmp_path / "run", r=4, **{name: str(tmp_path / f"{name}.jsonl") for name in files})
    result = train(RunConfig.from_flat(flat), Console(file=io.StringIO()))
    assert results_of(whole)['{"r": 4}'][1] == result.eval_loss


def test_the_chosen_settings_train(tiny_runs, whole, tmp_path):
    given = yaml.safe_load((whole / "best.yaml").read_text())
    assert given["r"] in (2, 4)
    assert given["model"] == str(tiny_runs.base("gpt2"))
    assert not {"out", "folds", "metric"} & set(given)
    config = RunConfig.from_flat({**read_settings_file(whole / "best.yaml"), "out": str(tmp_path / "x")})
    searched = json.loads((whole / "results.json").read_text())["settings"]
    now = config.to_dict()
    assert searched["evaluation"].pop("metric") == "loss"  # nothing is held out when all of the data trains
    assert now["evaluation"].pop("metric") is None
    assert {k: v for k, v in now.items() if k != "out"} == {k: v for k, v in searched.items() if k != "out"}
    assert train(config, Console(file=io.StringIO())).steps == 1


def test_the_same_command_again_trains_nothing(tiny_runs, tmp_path, monkeypatch):
    flat = settings_of(tiny_runs, tmp_path / "x")
    note_trainings(monkeypatch, tmp_path / "notes")
    first = search_of(flat)
    again = search_of(flat)
    assert trainings(tmp_path / "notes") == FOUR
    assert again == first
    assert again.n_open == 0


@pytest.mark.parametrize(
    ("changes", "settings", "messages"),
    [
        ({"r": "2,8"}, {}, ["r = ", "[2, 4]"]),
        ({"lr": 2e-2, "batch_size": 2}, {}, ["lr = ", "batch_size = ", "was 4"]),
        ({}, {"folds": 3}, ["folds = 3", "was 2"]),
        ({}, {"metric": "eval_loss"}, ["metric = ", "was 'loss'"]),
        ({"seed": 1}, {}, ["seed = 1", "was 42"]),
    ],
)
def test_other_settings_than_the_stored_ones_are_refused(tiny_runs, whole, changes, settings, messages):
    before = {file: file.read_bytes() for file in whole.rglob("*") if file.is_file() and file.suffix != ".db"}
    with pytest.raises(UserError) as caught:
        search_of(settings_of(tiny_runs, whole, **changes), **settings)
    for message in [*messages, "overwrite=True"]:
        assert message in str(caught.value)
    assert before == {file: file.read_bytes() for file in before}


def test_other_examples_than_at_the_beginning_are_refused(tiny_runs, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in ROWS))
    flat = settings_of(tiny_runs, tmp_path / "x", data=str(data))
    search_of(flat)
    data.write_text("\n".join(json.dumps(row) for row in [*ROWS[1:], ROWS[0]]))
    with pytest.raises(UserError, match="has changed since"):
        search_of(flat)


def test_a_setting_that_an_older_version_did_not_have_was_at_its_default(tiny_runs, tmp_path):
    flat = settings_of(tiny_runs, tmp_path / "x")
    search_of(flat)
    with contextlib.closing(sqlite3.connect(tmp_path / "x" / DB_FILE)) as db, db:
        (stored,) = db.execute("SELECT value_json FROM study_user_attributes WHERE key = 'settings'").fetchone()
        older = json.dumps({name: value for name, value in json.loads(stored).items() if name != "neftune"})
        db.execute("UPDATE study_user_attributes SET value_json = ? WHERE key = 'settings'", (older,))
    finished = results_of(tmp_path / "x")
    search_of(flat)
    assert results_of(tmp_path / "x") == finished
    with pytest.raises(UserError, match=r"neftune = 5\.0: was None when this search began"):
        search_of({**flat, "neftune": 5.0})


def test_another_base_than_at_the_beginning_is_refused(tiny_runs, tmp_path):
    model = shutil.copytree(tiny_runs.base("gpt2"), tmp_path / "model")
    flat = settings_of(tiny_runs, tmp_path / "x", model=str(model))
    search_of(flat)
    tensors = load_file(model / "model.safetensors")
    save_file({name: 2 * tensor for name, tensor in tensors.items()}, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"model = .*model': has changed since this search began"):
        search_of(flat)


def test_a_run_of_a_fold_is_scored_as_it_ends_for_nothing_may_choose_by_the_fold(tiny_runs, tmp_path):
    search_of(settings_of(tiny_runs, tmp_path / "x", max_steps=2, eval_steps=1))
    fold = tmp_path / "x" / "runs" / "r=2" / "fold-1"
    notes = map(json.loads, (fold / "metrics.jsonl").read_text().splitlines())
    losses = [line["eval_loss"] for line in notes if "eval_loss" in line]
    assert len(losses) == 2
    assert results_of(tmp_path / "x")['{"r": 2}'][0] == losses[-1]
    assert json.loads((fold / "run.json").read_text())["settings"]["evaluation"]["keep_best"] is False


def test_a_value_that_the_model_cannot_have_ends_its_combination_alone(tiny_runs, tmp_path):
    say = io.StringIO()
    flat = settings_of(tiny_runs, tmp_path / "x", r="2,128", init="pissa")
    result = search_of(flat, say)
    assert result.chosen.point == {"r": 2}
    assert "r is too large for" in next(one.state for one in result.tried if one.rank == 128)
    assert "r = 128: r is too large for" in say.getvalue()
    assert (tmp_path / "x" / "best.yaml").is_file()


def test_overwrite_begins_anew_and_nothing_else_is_ever_replaced(tiny_runs, tmp_path, monkeypatch):
    flat = settings_of(tiny_runs, tmp_path / "x")
    search_of(flat)
    note_trainings(monkeypatch, tmp_path / "notes")
    search_of({**flat, "overwrite": True, "r": "2,8"})
    assert trainings(tmp_path / "notes") == [name.replace("r=4", "r=8") for name in FOUR]
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("dear")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="is not a search"):
            search_of({**flat, "out": str(mine), "overwrite": overwrite})
    assert names(mine) == {"thesis.txt"}


def test_a_search_behind_a_link_is_not_replaced(tiny_runs, tmp_path):
    flat = settings_of(tiny_runs, tmp_path / "x")
    search_of(flat)
    (tmp_path / "link").symlink_to(tmp_path / "x")
    with pytest.raises(UserError, match="is a symbolic link, which is never replaced"):
        search_of({**flat, "out": str(tmp_path / "link"), "overwrite": True})
    assert results_of(tmp_path / "x")


@pytest.mark.parametrize("name", ["fold-1", "fold-1.partial"])
def test_what_no_fold_has_made_stays_where_a_fold_would_be(tiny_runs, tmp_path, name):
    flat = settings_of(tiny_runs, tmp_path / "x")
    theirs = tmp_path / "x" / "runs" / "r=2" / name
    theirs.mkdir(parents=True)
    (theirs / "thesis.txt").write_text("dear")
    (tmp_path / "x" / "search.lock").touch()
    with pytest.raises(UserError, match="never replaced"):
        search_of(flat)
    assert (theirs / "thesis.txt").read_text() == "dear"


def test_weights_are_kept_when_asked_for(tiny_runs, tmp_path):
    search_of(settings_of(tiny_runs, tmp_path / "x"), keep_runs=True)
    for fold in (tmp_path / "x" / "runs").glob("*/fold-[0-9]"):
        assert (fold / "adapter" / "adapter_model.safetensors").is_file()


def test_what_is_held_out_for_the_end_is_in_no_fold(tiny_runs, tmp_path):
    flat = settings_of(tiny_runs, tmp_path / "x", eval_fraction=0.34)
    search_of(flat)
    record = json.loads((tmp_path / "x" / "runs" / "r=2" / "fold-1" / "run.json").read_text())
    assert sum(record["examples"].values()) == N_EXAMPLES - 2
    assert yaml.safe_load((tmp_path / "x" / "best.yaml").read_text())["eval_fraction"] == 0.34


def test_settings_that_diverge_do_not_stop_the_others(tiny_runs, tmp_path):
    said = io.StringIO()
    result = search_of(settings_of(tiny_runs, tmp_path / "x", r=2, lr="1e-2,1e30", max_steps=3), said)
    assert [one.state for one in result.tried] == ["finished", "diverged in fold 1"]
    assert result.chosen.point == {"lr": 1e-2}
    assert "lr = 1e+30: diverged in fold 1" in said.getvalue()


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ({"r": 2, "lr": "1e30,2e30", "max_steps": 3}, "Lower lr"),
        ({"r": "128,256", "init": "pissa"}, "Search other values"),
    ],
)
def test_a_search_without_any_figure_says_why_and_what_helps(tiny_runs, tmp_path, changes, remedy):
    with pytest.raises(UserError) as caught:
        search_of(settings_of(tiny_runs, tmp_path / "x", **changes))
    assert [f"\n    {remedy}" in str(fault) for fault in caught.value.faults] == [True, True]


def test_exact_match_decides_higher_and_is_left_out_of_what_has_nothing_held_out(tiny_runs, tmp_path):
    rows = [{"prompt": f"{i}", "completion": "1"} for i in range(N_EXAMPLES)]
    flat = settings_of(tiny_runs, tmp_path / "x", data=str(tiny_runs.data(rows, "exact")), exact_match=2)
    result = search_of(flat, metric="exact_match")
    assert all(0 <= value <= 1 for one in result.tried for value in one.values)
    assert "exact_match" not in yaml.safe_load((tmp_path / "x" / "best.yaml").read_text())
    assert result.best.mean == max(one.mean for one in result.tried)


def test_the_planner_rules_out_what_does_not_fit_before_it_runs(tiny_runs, tmp_path, monkeypatch):
    from qlora_kit.memory.plan import plan
    from qlora_kit.memory.preflight import with_rows

    flat = settings_of(tiny_runs, tmp_path / "x", r="2,64", seq_len=16)
    space = Space.from_flat(flat)
    needed = {r: plan(with_rows(space.config_of({"r": r}), 16)).device_bytes for r in (2, 64)}
    budget = (needed[2] + needed[64]) // 2
    note_trainings(monkeypatch, tmp_path / "notes")
    said = io.StringIO()
    result = search_of(flat, said, budget=f"{budget}B")
    assert trainings(tmp_path / "notes") == FOUR[:2]
    assert [one.device_bytes for one in result.tried] == [needed[2], needed[64]]
    assert result.tried[1].is_ruled_out
    assert "r = 64: ruled out: needs" in said.getvalue()
    with pytest.raises(UserError, match="is too small for every combination; the smallest, r = 2"):
        search_of({**flat, "out": str(tmp_path / "y")}, budget=f"{needed[2] - 1}B")
    assert not (tmp_path / "y").exists()


def test_tpe_tries_so_many_different_combinations_and_may_go_on(tiny_runs, tmp_path, monkeypatch):
    flat = settings_of(tiny_runs, tmp_path / "x", r="2,4,8", lr="1e-3,1e-2")
    note_trainings(monkeypatch, tmp_path / "notes")
    first = search_of(flat, sampler="tpe", trials=1)
    assert len(first.tried) == 1
    more = search_of(flat, sampler="tpe", trials=3)
    assert len(more.tried) == 3
    assert len(set(trainings(tmp_path / "notes"))) == len(trainings(tmp_path / "notes")) == 6
    assert {json.dumps(one.point) for one in first.tried} <= {json.dumps(one.point) for one in more.tried}


def test_the_command_prints_a_table_and_the_choice(tiny_runs, whole, tmp_path, capsys):
    file = tmp_path / "search.yaml"
    file.write_text(yaml.safe_dump({**settings_of(tiny_runs, whole, r=[2, 4]), "folds": 3}))
    main(["search", "--config", str(file), "--folds", "2"])
    out, err = capsys.readouterr()
    for said in ("loss over 2 folds", "mean ± standard error", "chosen: r = ", "best.yaml", "results.png"):
        assert said in out
    assert "0 combinations to try" in err


def test_a_terminal_shows_how_many_folds_are_done(tiny_runs, tmp_path):
    out = io.StringIO()
    space = Space.from_flat(settings_of(tiny_runs, tmp_path / "x"))
    search(space, SearchConfig(folds=2), Console(file=out, force_terminal=True, width=100))
    assert "4/4" in out.getvalue()
    assert "r = 4: fold 2 of 2" in out.getvalue()


@pytest.mark.parametrize(
    ("flags", "messages"),
    [
        (["--r", "8"], ["--r = 8", "nothing to choose from"]),
        (["--r", "0,4", "--folds", "1"], ["--r = 0", "--folds = 1", "at least 2"]),
        (["--r", "2,4", "--folds", "99"], ["--folds = 99", "6 examples"]),
        (["--r", "2,4", "--budget", "lots"], ["--budget = 'lots'", "GiB", "--budget 8GiB"]),
        (["--r", "2,4", "--budget", "8Gib", "--metric", "exact_match"], ["--metric", "--exact-match"]),
        (["--r", "2,4", "--metric", "f1"], ["--metric = 'f1'", "is not a metric of text-generation"]),
        (["--r", "2,4", "--trials", "3"], ["--trials = 3", "--sampler tpe"]),
        (["--r", "2,4", "--sampler", "best"], ["--sampler = 'best'", "grid, tpe"]),
        (["--r", "2,4", "--data", "none.jsonl"], ["--data", "none.jsonl"]),
        (["--r", "2,4", "--targets", "q_porj"], ["q_porj", "c_attn"]),
    ],
)
def test_a_mistake_is_one_message_and_leaves_nothing(tiny_runs, tmp_path, capsys, flags, messages):
    out = tmp_path / "x"
    flat = settings_of(tiny_runs, out)
    given = [
        (f"--{name.replace('_', '-')}", str(value)) for name, value in flat.items() if name not in ("r", "preflight")
    ]
    args = ["search", *(part for pair in given for part in pair), "--no-preflight"]
    err = fails(capsys, *with_flags(args, flags))
    for message in messages:
        assert message in err
    assert not list(tmp_path.iterdir())


def test_classes_are_kept_in_proportion_and_decide_by_the_metric_of_their_task(tiny_runs, tmp_path):
    rows = [{"text": f"{i} is {kind}", "label": kind} for i in range(6) for kind in ("even", "odd")]
    data = tiny_runs.data(rows, "labelled")
    flat = settings_of(tiny_runs, tmp_path / "x", model=str(save_base(tmp_path / "base", "bert")), data=str(data))
    result = search_of(flat, metric="f1")
    assert all(0 <= value <= 1 for one in result.tried for value in one.values)
    record = json.loads((tmp_path / "x" / "runs" / "r=2" / "fold-1" / "run.json").read_text())
    assert record["settings"]["base"]["labels"] == ["even", "odd"]
    report = json.loads((tmp_path / "x" / "runs" / "r=2" / "fold-1" / "evaluation.json").read_text())
    assert [sum(row) for row in report["confusion"]] == [3, 3]
    assert record["settings"]["evaluation"]["metric"] == "f1"
    one_class = tiny_runs.data(rows[::2], "one-class")
    with pytest.raises(UserError, match="has only the label 'even'"):
        search_of({**flat, "data": str(one_class), "out": str(tmp_path / "y"), "labels": "even,odd"})
    assert not (tmp_path / "y").exists()


def test_exact_match_is_a_metric_of_its_own_where_answers_are_found_in_contexts(tiny_runs, tmp_path):
    answers = [{"text": ["b"], "answer_start": [2]}, {"text": [], "answer_start": []}]
    rows = [{"question": "?", "context": f"a b {i}", "answers": answers[i % 2]} for i in range(N_EXAMPLES)]
    flat = settings_of(tiny_runs, tmp_path / "x", data=str(tiny_runs.data(rows, "asked")))
    result = search_of(flat, metric="exact_match")
    assert all(0 <= value <= 1 for one in result.tried for value in one.values)
    record = json.loads((tmp_path / "x" / "runs" / "r=2" / "fold-1" / "run.json").read_text())
    assert record["settings"]["evaluation"]["metric"] == "exact_match"
    assert result.tried[0].values[0] == record["results"]["metrics"]["exact_match"]
