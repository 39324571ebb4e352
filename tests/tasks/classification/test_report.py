"""The figures of classes against counts made by hand, and the picture."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import image
from rich.console import Console

from qlora_kit.tasks.classification.report import (
    PICTURE_FILE,
    class_metrics,
    class_report,
    draw_confusion,
    tables,
    write_report,
)
from qlora_kit.tasks.evaluation import Scores
from qlora_kit.tasks.report import REPORT_FILE

PAIRS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=40)
ROWS = st.lists(
    st.tuples(st.lists(st.integers(0, 1), min_size=3, max_size=3), st.lists(st.integers(0, 1), min_size=3, max_size=3)),
    min_size=2,
    max_size=20,
)


def f1(true, answered):
    hits = sum(a and b for a, b in zip(true, answered, strict=True))
    return 2 * hits / (sum(true) + sum(answered)) if hits else 0.0


def naive(true_columns, answered_columns):
    """Mean F1 over the columns that occur, plain and by support."""
    own = [(f1(t, a), sum(t)) for t, a in zip(true_columns, answered_columns, strict=True) if any(t) or any(a)] or [
        (0.0, 0)
    ]
    support = sum(n for _, n in own)
    weighted = sum(f * n for f, n in own) / support if support else 0.0
    return sum(f for f, _ in own) / len(own), weighted


@settings(deadline=None, max_examples=50, derandomize=True)
@given(PAIRS)
def test_figures_of_classes(pairs):
    labels, answers = np.array(pairs).T
    found = class_metrics(labels, answers)
    columns = [[[value == number for value in side] for number in range(4)] for side in (labels, answers)]
    plain, weighted = naive(*columns)
    assert found["accuracy"] == pytest.approx(float((labels == answers).mean()))
    assert (found["f1"], found["f1_weighted"]) == (pytest.approx(plain), pytest.approx(weighted))


def test_the_only_label_of_several_counts_where_it_is_there():
    """Not where it is absent: scikit-learn takes one column for numbers of classes."""
    labels, answers = np.array([[1], [1], [1], [0]]), np.array([[1], [1], [0], [0]])
    found = class_metrics(labels, answers)
    assert (found["accuracy"], found["f1"], found["f1_weighted"]) == (0.75, pytest.approx(0.8), pytest.approx(0.8))
    report = class_report(labels, answers, ["spam"])
    assert report["report"]["spam"]["support"] == 3
    assert report["report"]["spam"]["recall"] == pytest.approx(2 / 3)
    assert report["confusion"] == [[[1, 0], [1, 2]]]


@settings(deadline=None, max_examples=50, derandomize=True)
@given(ROWS)
def test_figures_of_several_labels(rows):
    labels, answers = (np.array(side) for side in zip(*rows, strict=True))
    found = class_metrics(labels, answers)
    plain, weighted = naive(labels.T.tolist(), answers.T.tolist())
    assert found["accuracy"] == pytest.approx(float((labels == answers).all(axis=1).mean()))
    assert (found["f1"], found["f1_weighted"]) == (pytest.approx(plain), pytest.approx(weighted))


def test_the_report_and_its_picture(tmp_path):
    labels, answers = np.array([0, 0, 1, 1, 1]), np.array([0, 1, 1, 1, 0])
    report = class_report(labels, answers, ["no", "yes", "never"])
    assert report["confusion"] == [[1, 1, 0], [1, 2, 0], [0, 0, 0]]
    assert report["report"]["yes"]["recall"] == pytest.approx(2 / 3)
    assert report["report"]["yes"]["support"] == 3
    assert "never" not in report["report"]
    scores = Scores(class_metrics(labels, answers), report)
    write_report(scores, tmp_path)
    (table,) = tables(scores)
    saved = json.loads((tmp_path / REPORT_FILE).read_text())
    assert saved["report"] == report["report"]
    assert saved["metrics"]["accuracy"] == pytest.approx(0.6)
    assert table.row_count >= 4
    picture = image.imread(tmp_path / PICTURE_FILE)
    assert picture.std() > 0.05


def test_the_picture_of_several_labels():
    labels, answers = np.array([[1, 0], [1, 1], [0, 0]]), np.array([[1, 1], [0, 1], [0, 0]])
    report = class_report(labels, answers, ["a", "b"])
    assert report["confusion"] == [[[1, 0], [1, 1]], [[1, 1], [0, 1]]]
    assert image.imread(io.BytesIO(draw_confusion(report["confusion"], ["a", "b"]))).std() > 0.05


@pytest.mark.parametrize("name", ["$a_$", "[/red]", "[red]", "中文", "a\nb", "x" * 300, r"$\frac{$"])
def test_labels_are_shown_as_they_are(name, tmp_path, recwarn):
    """Not as formulas, nor as marks of a terminal; a run would end with a failure after its last step."""
    labels, answers = np.array([0, 1, 1, 0]), np.array([0, 1, 0, 0])
    scores = Scores(class_metrics(labels, answers), class_report(labels, answers, [name, "b"]))
    write_report(scores, tmp_path)
    assert (tmp_path / PICTURE_FILE).stat().st_size > 1000
    console = Console(file=io.StringIO(), width=1000)
    for table in tables(scores):
        console.print(table)
    assert name.splitlines()[0] in console.file.getvalue()
    assert not recwarn.list
