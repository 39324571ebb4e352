"""What a merge knows of the base that an adapter was trained on, wherever the adapter lies."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from families import save_tiny
from releases import asked, make_adapter, merged, train_tiny

from qlora_kit import UserError
from qlora_kit.adapters.base_record import RECORD_FILE
from qlora_kit.release import report


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Two bases of one shape, runs on the first in 4 and in 16 bits, and an adapter made elsewhere."""
    folder = tmp_path_factory.mktemp("made")
    save_tiny(folder / "base", "llama")
    save_tiny(folder / "other", "llama", seed=1)
    train_tiny(folder / "base", folder / "run", quant_type="fp4", double_quant=False)
    train_tiny(folder / "base", folder / "run16", bits=16)
    make_adapter(folder / "base", folder / "foreign", 16)
    return folder


def held(request) -> tuple[int, str, bool, str]:
    return request.base.bits, request.base.quant_type, request.base.double_quant, request.into


def test_an_adapter_says_how_it_saw_its_base(made, tmp_path):
    """Copied away from its run too, and in the folder one is in."""
    copied = shutil.copytree(made / "run" / "adapter", tmp_path / "mine")
    words = ["--base", made / "base", "--out", tmp_path / "out"]
    assert held(asked("--adapter", copied, *words)) == (4, "fp4", False, "trained")
    assert held(asked("--adapter", made / "run16" / "adapter", *words)) == (16, "nf4", True, "trained")
    assert held(asked("--run", made / "run", "--out", tmp_path / "out")) == (4, "fp4", False, "trained")


def test_an_older_run_says_it_in_its_record(made, tmp_path, monkeypatch):
    run = shutil.copytree(made / "run", tmp_path / "run")
    (run / "adapter" / RECORD_FILE).unlink()
    monkeypatch.chdir(run / "adapter")
    assert held(asked("--adapter", ".", "--base", made / "base", "--out", tmp_path / "out")) == (
        4,
        "fp4",
        False,
        "trained",
    )
    with pytest.raises(UserError, match="is not the base that"):
        merged("--adapter", ".", "--base", made / "other", "--out", tmp_path / "out")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], (16, "nf4", True, "original")),
        (["--bits", "16"], (16, "nf4", True, "trained")),
        (["--bits", "4", "--no-double-quant"], (4, "nf4", False, "trained")),
        (["--into", "nf4"], (4, "nf4", True, "nf4")),
        (["--into", "fp4"], (4, "fp4", True, "fp4")),
        (["--into", "int8"], (8, "nf4", True, "int8")),
        (["--quant-type", "fp4"], (4, "fp4", True, "trained")),
        (["--into", "original"], (16, "nf4", True, "original")),
    ],
)
def test_an_adapter_that_says_nothing_is_not_rounded_unasked(made, words, expected):
    assert held(asked("--adapter", made / "foreign", "--base", made / "base", "--out", "x", *words)) == expected


def test_adapters_that_saw_their_bases_differently_are_not_mixed(made):
    adapters = ["--adapter", made / "run" / "adapter", "--adapter", made / "run16" / "adapter"]
    with pytest.raises(UserError, match="were trained on bases held in different ways"):
        asked(*adapters, "--base", made / "base", "--out", "x")


def test_another_base_is_refused_wherever_the_adapter_lies(made, tmp_path, monkeypatch):
    copied = shutil.copytree(made / "run" / "adapter", tmp_path / "mine")
    (tmp_path / "link").symlink_to(made / "run" / "adapter")
    for adapter in (copied, tmp_path / "link"):
        with pytest.raises(UserError, match="is not the base that"):
            merged("--adapter", adapter, "--base", made / "other", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_base_that_is_allowed_is_said_on_the_card(made, tmp_path):
    words = ["--run", made / "run", "--base", made / "other", "--allow-other-base"]
    found = merged(*words, "--out", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "not the base that the adapter was trained on" in card
    assert json.loads((made / "run" / "run.json").read_text())["base_hash"] in card
    assert "the weights that the adapter saw" not in card
    assert "is not the one that the adapter was trained on" in "\n".join(report.closing(found.report, "out"))


def test_what_nobody_wrote_down_is_called_assumed(capsys, made, tmp_path):
    moved = shutil.copytree(made / "base", tmp_path / "moved")
    found = merged("--adapter", made / "foreign", "--base", moved, "--out", tmp_path / "out")
    assert found.report["base"]["is_that_of_the_run"] is None
    card = (tmp_path / "out" / "README.md").read_text()
    assert "assumed to be the adapter's" in card
    assert "(assumed: the adapter saw them as 16 bits)" in card
    assert any(line.startswith("assumed:") for line in report.closing(found.report, "out"))
    own = merged("--run", made / "run", "--out", tmp_path / "own")
    assert "assumed" not in (tmp_path / "own" / "README.md").read_text()
    assert not any("assumed" in line for line in report.closing(own.report, "own"))


def test_another_base_than_the_adapter_names_is_warned_of(made, tmp_path):
    import io

    from rich.console import Console

    from qlora_kit.release.merge import read_inputs

    moved = shutil.copytree(made / "base", tmp_path / "moved")
    for base, warned in ((moved, True), (made / "base", False)):
        said = io.StringIO()
        request = asked("--adapter", made / "foreign", "--base", base, "--out", tmp_path / "out")
        read_inputs(request, Console(file=said, width=1000))
        assert (f"names {made / 'base'} as its base" in said.getvalue()) is warned


def test_a_run_is_merged_with_its_own_adapter_alone(made):
    with pytest.raises(UserError, match=r"cannot be combined with run\b"):
        asked("--run", made / "run", "--adapter", made / "foreign", "--out", "x")


@pytest.mark.parametrize("content", ["[", "[]", "{}", '{"bits": 4}', "[" * 100_000])
def test_a_record_that_is_none_is_one_message(made, tmp_path, content):
    copied = shutil.copytree(made / "run" / "adapter", tmp_path / "mine")
    (copied / RECORD_FILE).write_text(content)
    with pytest.raises(UserError, match=RECORD_FILE):
        asked("--adapter", copied, "--base", made / "base", "--out", "x")


@pytest.mark.parametrize(
    ("name", "value"), [("bits", 5), ("bits", True), ("quant_type", "x"), ("double_quant", 1), ("dtype", "int8")]
)
def test_a_record_with_impossible_values_is_one_message(made, tmp_path, name, value):
    copied = shutil.copytree(made / "run" / "adapter", tmp_path / "mine")
    record = json.loads((copied / RECORD_FILE).read_text())
    (copied / RECORD_FILE).write_text(json.dumps({**record, name: value}))
    with pytest.raises(UserError, match="not as a run writes it"):
        asked("--adapter", copied, "--base", made / "base", "--out", "x")
