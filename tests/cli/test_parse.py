"""The words of a command line: what they mean, and that every mistake in them is in one message."""

from __future__ import annotations

import pytest
from refusals import fails

from qlora_kit.cli.main import command_of, read
from qlora_kit.cli.parse import parse


def given(name: str, *args: str) -> dict:
    values, faults = parse(args, command_of(name).all_flags(), name)
    assert not faults
    return values


def test_values_follow_their_flag_or_an_equals_sign():
    assert given("train", "--r", "4", "--lr=1e-3", "--batch_size", "2", "--eval-data=a=b") == {
        "r": "4",
        "lr": "1e-3",
        "batch_size": "2",
        "eval_data": "a=b",
    }


def test_a_value_may_begin_with_a_dash_and_with_two_after_an_equals_sign():
    assert given("generate", "--prompt", "- a list", "--prompt", "-5", "--prompt=--raw") == {
        "prompt": ["- a list", "-5", "--raw"]
    }


def test_switches_have_an_opposite_and_are_unset_otherwise():
    assert given("train", "--pack", "--no-double-quant", "--no_preflight") == {
        "pack": True,
        "double_quant": False,
        "preflight": False,
    }
    assert given("generate", "--no-raw") == {"raw": False}
    assert given("train", "--multi-label", "true") == {"multi_label": "true"}


@pytest.mark.parametrize("asked", ["-h", "--help", "--help-all"])
def test_help_may_stand_anywhere(asked):
    assert read("train", command_of("train"), ["--r", "4", asked]) is None


def test_unknown_flags_are_in_the_one_message(capsys):
    err = fails(capsys, "train", "--bit", "5", "--r", "0", "--lr", "x")
    assert err.count("error:") == 1
    assert [line for line in err.splitlines() if not line.startswith("    ")] == [
        "error: --bit = '5': is not a flag of `qlora-kit train`.",
        "--lr = 'x': must be a number.",
        "--r = 0: must be at least 1.",
    ]
    assert "Did you mean --bits?" in err
    assert "╭" not in err


def test_all_kinds_of_mistakes_come_together(capsys):
    args = ["preview", "stray", "--lr", "--pack", "yes", "--data", "a", "--data", "b", "--bits", "5", "--rows", "x"]
    err = fails(capsys, *args)
    for said in (
        "argument = 'stray': follows no flag",
        "--lr: needs a value.\n    Write --lr X.",
        "--pack = 'yes': takes no value.\n    Write --pack or --no-pack.",
        "--data = ['a', 'b']: is given more than once",
        "--bits = 5: must be one of 4, 8, 16, 32",
        "--rows = 'x': must be whole numbers, separated by commas",
    ):
        assert said in err


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["train", "--batch", "3"], "Did you mean --batch-size?"),  # never taken for it
        (["train", "--grad", "3"], "--grad = '3': is not a flag"),
        (["train", "--no-dobule-quant"], "Did you mean --no-double-quant?"),
        (["train", "--no-lr"], "--no-lr: is not a flag"),
        (["train", "--zzz"], "See `qlora-kit train --help-all`."),
        (["train", "-r", "4"], "argument = '-r': follows no flag"),
        (["train", "--"], "--: is not a flag"),
        (["train", "--lr", "--r", "4"], "--lr: needs a value"),
        (["plan", "--exact=true"], "--exact = 'true': takes no value"),
        (["merge", "--lr", "1"], "--lr = '1': is not a flag of `qlora-kit merge`"),
        (["generate", "--run", "x", "--seed", "-1"], "--seed = -1: must be from 0"),
        (["predict", "--run", "x", "--seq-len", "1", "--bits", "5"], "--seq-len = 1: must be at least 2"),
        (["generate", "--run", "x", "--top-p", "2"], "--top-p = 2.0: must be greater than 0 and at most 1"),
        (["profile", "--steps", "0"], "--steps = 0: must be at least 1"),
        (["search", "--folds", "1", "--r", "4,0"], "--folds = 1: must be at least 2"),
        (["completion"], "--shell: is needed"),
    ],
)
def test_a_mistake_says_what_to_do(capsys, args, said):
    assert said in fails(capsys, *args)


def test_a_mistake_in_a_search_comes_with_those_in_its_space(capsys):
    err = fails(capsys, "search", "--fold", "3", "--trials", "5", "--r", "4,0")
    for said in ("Did you mean --folds?", "--trials = 5", "--r = 0: must be at least 1"):
        assert said in err


def test_a_command_that_is_none_suggests_the_nearest(capsys):
    assert "trian is not a command.\n    Did you mean train?" in fails(capsys, "trian")


def test_a_setting_that_has_another_flag_here_is_said_as_that(capsys, tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    err = fails(capsys, "merge", "--adapter", str(folder), "--base", "no/such", "--bits", "5", "--out", "x")
    assert "--bits = 5" in err
    assert "--model" not in err
