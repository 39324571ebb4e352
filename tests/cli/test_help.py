"""What `--help` prints of each command, how it fits a terminal, and what it costs to print."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from refusals import fails

from qlora_kit.cli.main import COMMANDS, command_of, main
from qlora_kit.config.settings import settings

ROOT = Path(__file__).resolve().parents[2]
HEAVY = {"torch", "transformers", "peft", "datasets", "numpy", "pyarrow", "matplotlib", "argparse", "yaml"}
ALL_SETTINGS = ("train", "plan", "profile", "preview", "search")
HEADINGS = ["model", "adapter", "data", "optimizer", "memory", "evaluation", "run"]


@pytest.fixture(autouse=True)
def a_terminal_of_100_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")


def prints(capsys, *args: str) -> str:
    main(args)
    return capsys.readouterr().out


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_at_most_100_lines_of_100_columns(name, capsys):
    for asked in ("--help", "--help-all"):
        lines = prints(capsys, name, asked).splitlines()
        assert max(map(len, lines)) <= 100
        assert asked == "--help-all" or len(lines) <= 100


@pytest.mark.parametrize("name", COMMANDS)
def test_help_all_shows_every_flag_once_and_help_says_how_many_it_leaves_out(name, capsys):
    short, whole = prints(capsys, name, "--help"), prints(capsys, name, "--help-all")
    shown, every = (re.findall(r"^  (--[a-z0-9-]+)", text, re.MULTILINE) for text in (short, whole))
    assert every == list(dict.fromkeys(every))
    assert set(every) == {flag.written for flag in command_of(name).all_flags().values()}
    hidden = len(every) - len(shown)
    last = short.splitlines()[-1]
    assert (f"`qlora-kit {name} --help-all` shows {hidden} more flags." == last) == (hidden > 0)


@pytest.mark.parametrize("name", ALL_SETTINGS)
def test_a_command_that_trains_takes_every_setting(name):
    assert {field.name for _, field, _ in settings()} <= command_of(name).all_flags().keys()


def test_train_is_grouped_and_shows_choices_and_defaults_once(capsys):
    text = prints(capsys, "train", "--help")
    assert re.findall(r"^([a-z]+)$", text, re.MULTILINE) == HEADINGS
    assert "--quant-type {nf4,fp4}" in text
    assert "--multi-label {true,false}" in text
    assert "nf4 | fp4" not in text
    assert text.count("(default: nf4)") == 1
    assert re.search(r"--lr X +peak learning rate \(default: 0\.0002\)", text)
    assert "--preflight, --no-preflight" in text
    assert "--no-pack" not in text
    assert "--tiled-mlp" not in text
    assert "--tiled-mlp, --no-tiled-mlp" in prints(capsys, "train", "--help-all")


def test_a_search_shows_which_flags_take_several_values(capsys):
    from qlora_kit.search import space

    text = prints(capsys, "search", "--help-all")
    assert "--r N,…" in text
    assert "--lr X,…" in text
    assert re.search(r"--seq-len N +", text)
    assert command_of("search").lists == space.GROUPS


def test_help_is_as_narrow_as_the_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    lines = prints(capsys, "train", "--help").splitlines()
    assert 70 < max(len(line) for line in lines if "{" not in line and "For example" not in line) <= 80


def test_help_comes_before_mistakes(capsys):
    assert "--bits" in prints(capsys, "train", "--bogus", "-h")


@pytest.mark.parametrize("attribute", ["NAMES", "names"])
def test_choices_that_a_table_elsewhere_knows_are_shown_and_checked(monkeypatch, tmp_path, capsys, attribute):
    (tmp_path / "a_table.py").write_text("NAMES = {'first': 1, 'second': 2}\n\ndef names():\n    return tuple(NAMES)\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "a_table", raising=False)
    field = next(field for _, field, _ in settings() if field.name == "revision")
    monkeypatch.setattr(field, "metadata", {"help": "a name", "choices": f"a_table:{attribute}"})
    assert "a_table" not in sys.modules
    assert "--revision {first,second}" in prints(capsys, "train", "--help")
    for name, more in (("train", []), ("search", ["--r", "4,8"]), ("predict", ["--run", "x"])):
        err = fails(capsys, name, "--revision", "third", "--bits", "5", *more)
        assert "--revision = 'third': must be one of first, second.\n    For example --revision first." in err
        assert "--bits = 5" in err


@pytest.mark.parametrize("args", [["--help"], *([name, "--help"] for name in COMMANDS)])
def test_help_imports_nothing_heavy_and_is_quick(args):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-X", "importtime", "-m", "qlora_kit", *args]
    times_s = []
    for _ in range(3):  # of the processor: those on the clock depend on what else is running
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(command, capture_output=True, text=True, env=env, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times_s.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    loaded = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert not loaded & HEAVY
    assert min(times_s) < 0.5


def test_the_choices_of_a_merge_are_those_that_it_takes():
    from qlora_kit.release import request

    flags = command_of("merge").all_flags()
    assert flags["into"].choices == request.INTO
    assert flags["dtype"].choices == tuple(request.DTYPES)
    assert flags["format"].choices == request.FORMATS
