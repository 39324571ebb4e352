"""Separated files without a header keep their first line."""

from __future__ import annotations

import pytest

from qlora_kit.data import read_rows
from qlora_kit.errors import UserError


def written(tmp_path, text, name="a.tsv"):
    (tmp_path / name).write_text(text, encoding="utf-8")
    return str(tmp_path / name)


def test_two_columns_whose_first_line_is_an_example(tmp_path):
    rows = read_rows(written(tmp_path, "good\t1\nbad\t0\nfine\t1\n"), {})
    assert [r.values for r in rows] == [
        {"text": t, "label": v} for t, v in (("good", "1"), ("bad", "0"), ("fine", "1"))
    ]
    assert [r.origin.rsplit(":", 1)[1] for r in rows] == ["1", "2", "3"]


@pytest.mark.parametrize(
    "text",
    [
        "text\tlabel\ngood\t1\nbad\t0\n",  # a header
        "question\tanswer\na\tanswer\n" + "".join(f"{i}\t{i}\n" for i in range(9)),  # too many values for labels
        "good\t1\tx\nbad\t1\tx\n",  # three columns
    ],
)
def test_a_header_stays_one(text, tmp_path):
    rows = read_rows(written(tmp_path, text), {})
    assert len(rows) == text.count("\n") - 1


def test_columns_by_position(tmp_path):
    path = written(tmp_path, "1,good\n0,bad\n", "a.csv")
    rows = read_rows(path, {"label": "1", "text": "2"})
    assert [r.values for r in rows] == [{"1": "1", "2": "good"}, {"1": "0", "2": "bad"}]


def test_columns_that_are_called_like_positions_are_no_positions(tmp_path):
    rows = read_rows(written(tmp_path, "1\t2\na\tb\n"), {"text": "1", "label": "2"})
    assert [r.values for r in rows] == [{"1": "a", "2": "b"}]


def test_a_label_in_the_first_line_is_no_name_of_a_column(tmp_path):
    """To predict, the text alone is named: `text=1` is the first column, and not the one that begins with label 1."""
    rows = read_rows(written(tmp_path, "good\t1\nbad\t0\nfine\t1\n"), {"text": "1"})
    assert [r.values["1"] for r in rows] == ["good", "bad", "fine"]


def test_other_files_are_left_alone(tmp_path):
    path = written(tmp_path, '{"good": "a", "1": "1"}\n{"good": "b", "1": "1"}\n', "a.jsonl")
    assert len(read_rows(path, {})) == 2


def test_a_missing_file_is_still_the_users(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_rows(str(tmp_path / "none.tsv"), {})
