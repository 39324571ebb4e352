"""Later code takes what an earlier commit wrote: runs go on, adapters merge, models answer, searches go on.

Each folder in `fixtures/` was made by the commit that its MADE.json names (see `make_fixtures.py`); a new one is found
by itself. Every test works in a copy of one, by the command line.

What must be equal: every bit, on the kind of machine and with the libraries that a folder was made with. There the
runs are trained anew as well, and must be the recorded ones, so that no change of our arithmetic passes unseen.
Elsewhere the machine or the libraries may compute otherwise, and how much so is measured: a resumed run may be twice as
far from the recorded one as the run that is trained anew (so not at all where that one is the recorded one), and never
farther than a twentieth of the way that the recorded run went since the checkpoint. (With the vector units cut down to
AVX2 it ends 0.5 % of that way off, to SSE 1.2 %; with the optimizer's moments lost 46 % and more, with another order of
the data 17 %, with another step count of the optimizer 20 %, with learning rates of three steps before 61 %.)
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from refusals import fails
from safetensors.torch import load_file, save_file
from search_cases import light_collections
from upgrades.make_fixtures import digests, logits_of, machine, parsed, versions

from qlora_kit.cli.main import main

__all__ = ["light_collections"]  # a fixture of every test here

FIXTURES = Path(__file__).resolve().parent / "fixtures"
MADE = {file.parent.name: json.loads(file.read_text(encoding="utf-8")) for file in sorted(FIXTURES.glob("*/MADE.json"))}
SHARE_OF_THE_WAY = 0.05
BF16_STEP = 2**-7  # between two neighbours, relative to the smaller one
CLOSE = 0.05  # figures and probabilities of models whose arithmetic is bf16, on another machine


def of_each(key: str | None = None) -> Any:
    """Parameters `name` and `case`: each folder with each of the cases under `key` in its MADE.json."""
    if key is None:
        return pytest.mark.parametrize("name", MADE)
    found = [
        pytest.param(name, case, id=f"{name}-{number if isinstance(case, dict) else case}")
        for name, made in MADE.items()
        for number, case in enumerate(made[key])
    ]
    return pytest.mark.parametrize(("name", "case"), found)


def is_where_it_was_made(name: str) -> bool:
    return MADE[name]["machine"] == machine() and MADE[name]["versions"] == versions()


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@pytest.fixture
def work(name, tmp_path) -> Iterator[Path]:
    """A copy of the working folder of the fixtures `name`, in which the commands of a test run."""
    folder = shutil.copytree(FIXTURES / name / "work", tmp_path / "work")
    with inside(folder):
        yield folder


@pytest.fixture(scope="module")
def anew(tmp_path_factory) -> Any:
    """The folder of a run that is trained again from its own record, in its own place, once for all tests."""
    found: dict[tuple[str, str], Path] = {}

    def trained(name: str, run: str) -> Path:
        if (name, run) not in found:
            folder = shutil.copytree(FIXTURES / name / "work", tmp_path_factory.mktemp("anew") / "work")
            with inside(folder):
                call("train", "--config", f"{run}/run.json", "--out", run, "--overwrite")
            found[name, run] = folder / run
        return found[name, run]

    return trained


def call(*words: str) -> str:
    """Run a command in this process; returns its standard output."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        main(words)
    return output.getvalue()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor in the safetensors files of a folder."""
    return {f"{file.name}: {key}": t for file in folder.glob("*.safetensors") for key, t in load_file(file).items()}


def distance(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> float:
    """Of all tensors as one vector; zero only where they are equal in every bit."""
    assert one.keys() == other.keys()
    assert [(t.dtype, t.shape) for t in one.values()] == [(other[key].dtype, other[key].shape) for key in one]
    squares = [float((one[key].double() - other[key].double()).square().sum()) for key in one]
    return float(sum(squares)) ** 0.5


def check_same(found: Any, recorded: Any, exactly: bool) -> None:
    """All that is recorded is found, in words and whole numbers the same."""
    if isinstance(recorded, dict):
        for key, value in recorded.items():
            check_same(found[key], value, exactly)
    elif isinstance(recorded, list):
        assert len(found) == len(recorded)
        for own, value in zip(found, recorded, strict=True):
            check_same(own, value, exactly)
    elif isinstance(recorded, float) and not exactly:
        assert found == pytest.approx(recorded, rel=CLOSE, abs=CLOSE)
    else:
        assert found == recorded


def check_release(name: str, found: Path, release: str) -> None:
    """The release in `found` is the recorded one: elsewhere than there to a step of bf16, in which it is written."""
    own, recorded = weights(found), weights(FIXTURES / name / "work" / release)
    if is_where_it_was_made(name):
        assert distance(own, recorded) == 0
    assert own.keys() == recorded.keys()
    for key, tensor in recorded.items():
        torch.testing.assert_close(own[key], tensor, rtol=BF16_STEP, atol=0, msg=lambda text, key=key: f"{key}: {text}")
    report, before = (
        json.loads((folder / "merge_report.json").read_text(encoding="utf-8"))
        for folder in (found, FIXTURES / name / "work" / release)
    )
    assert report["base"]["hash"] == before["base"]["hash"]
    assert report["base"]["is_that_of_the_run"] is True
    assert report["proof"]["tensors"]["changed"] == before["proof"]["tensors"]["changed"] > 0
    assert [one["hash"] for one in report["adapters"]] == [one["hash"] for one in before["adapters"]]
    assert report["release"] == {**report["release"], **before["release"], "asked_for": report["release"]["asked_for"]}


def read_json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


@of_each()
def test_nobody_has_changed_the_files(name):
    assert digests(FIXTURES / name / "work") == MADE[name]["files"]


# ---------------------------------------------------------------------------------------------------------- runs


@of_each("repeated")
def test_a_run_repeats_from_its_record(name, case, anew):
    new, recorded = anew(name, case), FIXTURES / name / "work" / case
    if is_where_it_was_made(name):
        for part in ("adapter", newest_checkpoint(recorded)):
            assert distance(weights(new / part), weights(recorded / part)) == 0
    before, after = (read_json(run / "run.json") for run in (recorded, new))
    for group in ("base", "adapter", "data", "optim", "lean", "evaluation"):
        assert after["settings"][group] == {**after["settings"][group], **before["settings"][group]}
    for fact in ("base_hash", "held_out_hash", "examples", "steps", "plain_text"):
        assert after[fact] == before[fact]
    assert not list(new.parent.glob(f"{new.name}.*"))


@of_each("resumed")
def test_a_checkpoint_goes_on_to_the_same_weights(name, case, work, anew):
    start, recorded, again = weights(work / case["checkpoint"]), work / case["like"], anew(name, case["like"])
    in_place = work / f"{case['resume']}.partial"
    new = case["resume"] if in_place.exists() else "runs/resumed"
    call("train", "--resume", case["resume"], *([] if in_place.exists() else ["--out", new]))
    assert not in_place.exists()
    for part in ("adapter", newest_checkpoint(recorded)):  # an earlier checkpoint may have been the best
        known = weights(recorded / part)
        arithmetic, way = distance(weights(again / part), known), distance(start, known)
        allowed = 0.0 if is_where_it_was_made(name) else min(2 * arithmetic, SHARE_OF_THE_WAY * way)
        assert distance(weights(work / new / part), known) <= allowed
    assert way > 0
    steps, before = ([line["step"] for line in metrics(run) if "loss" in line] for run in (work / new, recorded))
    assert steps == before


def newest_checkpoint(run: Path) -> str:
    steps = [int(folder.name.removeprefix("checkpoint-")) for folder in run.glob("checkpoints/checkpoint-*")]
    return f"checkpoints/checkpoint-{max(steps)}"


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


@of_each("answers")
def test_a_command_that_only_reads_answers_as_before(name, case, work):
    found = parsed(case["words"], call(*case["words"]))
    check_same(found, case["answer"], is_where_it_was_made(name))


# ------------------------------------------------------------------------------------------------------- releases


@of_each("releases")
@pytest.mark.usefixtures("in_this_process")
def test_a_run_is_released_as_before(name, case, work):
    """In the place of the old release, which is still known as one."""
    run = MADE[name]["releases"][case]
    call("merge", "--run", run, "--out", case, "--overwrite")
    check_release(name, work / case, case)


@of_each("releases")
@pytest.mark.usefixtures("in_this_process")
def test_an_adapter_is_released_without_its_run(name, case, work):
    run = work / MADE[name]["releases"][case]
    base = read_json(run / "run.json")["settings"]["base"]["model"]
    shutil.move(run / "adapter", work / "copied")
    shutil.rmtree(work / "runs")
    call("merge", "--adapter", "copied", "--base", base, "--out", "made")
    check_release(name, work / "made", case)


@of_each("releases")
def test_stock_transformers_loads_a_release(name, case, work):
    recorded = load_file(FIXTURES / name / "logits.safetensors")[case]
    torch.testing.assert_close(logits_of(work / case), recorded, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------------- searches


def search(name: str, which: str, *words: str) -> Path:
    made = MADE[name]["search"]
    call("search", "--config", made["settings"], "--out", made[which], *words)
    return Path.cwd() / made[which]


def finished_folds(folder: Path) -> dict[str, bytes]:
    """What each finished fold reported, with when it began."""
    files = folder.glob("runs/*/fold-*/run.json")
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def check_results(found: Path, recorded: Path, exactly: bool) -> None:
    """The figures, and the settings to train with."""
    own, before = (read_json(folder / "results.json") for folder in (found, recorded))
    for key in ("metric", "folds", "best", "chosen"):
        assert own[key] == before[key]
    figures, figures_before = (
        [{key: one[key] for key in ("point", "state", "values", "mean", "standard_error")} for one in content["tried"]]
        for content in (own, before)
    )
    check_same(figures, figures_before, exactly)
    best, best_before = (
        yaml.safe_load((folder / "best.yaml").read_text(encoding="utf-8")) for folder in (found, recorded)
    )
    assert best == best_before


@of_each()
def test_a_finished_search_opens_and_trains_nothing(name, work):
    recorded = FIXTURES / name / "work" / MADE[name]["search"]["finished"]
    folder = search(name, "finished")
    assert finished_folds(folder) == finished_folds(recorded)
    check_results(folder, recorded, exactly=True)


@of_each()
def test_a_stopped_search_goes_on_and_repeats_no_finished_fold(name, work):
    stopped, whole = (FIXTURES / name / "work" / MADE[name]["search"][which] for which in ("stopped", "finished"))
    done, every = finished_folds(stopped), finished_folds(whole)
    assert 0 < len(done) < len(every)
    folder = search(name, "stopped")
    now = finished_folds(folder)
    assert now.keys() == every.keys()
    assert {fold: now[fold] for fold in done} == done
    check_results(folder, whole, is_where_it_was_made(name))


# ------------------------------------------------------------------------------------------------------- refusals


@of_each("resumed")
def test_a_checkpoint_does_not_go_on_with_another_setting(name, case, work, capsys):
    before = digests(work)
    said = fails(capsys, "train", "--resume", case["resume"], "--lr", "1e-3", "--batch-size", "3", "--out", "runs/new")
    assert "--lr" in said
    assert "--batch-size" in said
    assert digests(work) == before


@of_each()
def test_a_search_does_not_go_on_with_other_settings(name, work, capsys):
    made = MADE[name]["search"]
    said = fails(capsys, "search", "--config", made["settings"], "--out", made["stopped"], "--batch-size", "3")
    assert "--batch-size" in said
    search(name, "finished")
    file = work / yaml.safe_load((work / made["settings"]).read_text(encoding="utf-8"))["data"]
    file.write_text(file.read_text(encoding="utf-8").replace("3", "4"), encoding="utf-8")
    assert "--data" in fails(capsys, "search", "--config", made["settings"], "--out", made["stopped"])


@of_each("releases")
def test_an_adapter_is_not_merged_into_another_base(name, case, work, capsys):
    run = MADE[name]["releases"][case]
    base = work / read_json(work / run / "run.json")["settings"]["base"]["model"]
    tensors = load_file(base / "model.safetensors")
    save_file({key: 2 * tensor for key, tensor in tensors.items()}, base / "model.safetensors", {"format": "pt"})
    said = fails(capsys, "merge", "--run", run, "--out", "made")
    assert "--allow-other-base" in said
    said = fails(capsys, "merge", "--adapter", f"{run}/adapter", "--base", str(base), "--out", "made")
    assert "--allow-other-base" in said
    assert not (work / "made").exists()


@of_each()
def test_other_labels_beside_the_weights_than_in_the_record_are_refused(name, work, capsys):
    file = next(file for run in MADE[name]["repeated"] for file in work.glob(f"{run}/adapter/labels.json"))
    content = read_json(file)
    file.write_text(json.dumps({**content, "labels": content["labels"][::-1]}), encoding="utf-8")
    said = fails(capsys, "predict", "--run", str(file.parents[1]), "--data", "data/asked-labels.jsonl")
    assert "different labels" in said
