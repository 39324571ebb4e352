"""Entities and their figures, against plain counts."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_kit.tasks.evaluation import Scores
from qlora_kit.tasks.report import REPORT_FILE
from qlora_kit.tasks.tagging.report import Entity, entities, tag_metrics, tag_report
from qlora_kit.tasks.tagging.task import TASK

TAGS = st.lists(st.sampled_from(["O", "B-a", "I-a", "B-b", "I-b"]), max_size=8)


def naive_entities(tags):
    """An I- goes on with what the word before it is part of, if of its type; else it begins an entity."""
    found, last = [], ("O", None)
    for place, tag in enumerate(tags):
        prefix, kind = tag.split("-") if tag != "O" else ("O", None)
        if prefix == "I" and last[1] == kind:
            found[-1] = (kind, found[-1][1], place + 1)
        elif prefix != "O":
            found.append((kind, place, place + 1))
        last = (prefix, kind)
    return found


@settings(deadline=None, max_examples=200, derandomize=True)
@given(TAGS)
def test_entities_are_those_of_a_plain_reading(tags):
    assert [(own.kind, own.start, own.end) for own in entities(tags)] == naive_entities(tags)


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        (["B-x", "I-x", "E-x", "S-x", "S-x"], [("x", 0, 3), ("x", 3, 4), ("x", 4, 5)]),  # BIOES
        (["B-x", "L-x", "U-x", "U-x", "O"], [("x", 0, 2), ("x", 2, 3), ("x", 3, 4)]),  # BILOU
        (["B-creative-work", "I-creative-work"], [("creative-work", 0, 2)]),
        (["NOUN", "NOUN", "VERB"], [("NOUN", 0, 1), ("NOUN", 1, 2), ("VERB", 2, 3)]),  # no scheme: word by word
        ([], []),
    ],
)
def test_other_schemes(tags, expected):
    assert entities(tags) == [Entity(*own) for own in expected]


@settings(deadline=None, max_examples=100, derandomize=True)
@given(st.lists(st.tuples(TAGS, st.randoms(use_true_random=False)), min_size=1, max_size=5))
def test_figures_are_plain_counts(drawn):
    truth = [tags for tags, _ in drawn]
    answers = [
        [tag if draw.random() < 0.7 else draw.choice(["O", "B-a", "I-b"]) for tag in tags] for tags, draw in drawn
    ]
    true = {(number, *own) for number, tags in enumerate(truth) for own in naive_entities(tags)}
    said = {(number, *own) for number, tags in enumerate(answers) for own in naive_entities(tags)}
    found, metrics = len(true & said), tag_metrics(truth, answers)
    assert metrics["precision"] == pytest.approx(found / len(said) if said else 0.0)
    assert metrics["recall"] == pytest.approx(found / len(true) if true else 0.0)
    assert metrics["f1"] == pytest.approx(2 * found / (len(true) + len(said)) if true or said else 0.0)
    pairs = [pair for both in zip(truth, answers, strict=True) for pair in zip(*both, strict=True)]
    assert metrics["accuracy"] == pytest.approx(sum(a == b for a, b in pairs) / len(pairs) if pairs else 0.0)
    by_kind = tag_report(truth, answers)
    for kind in {own[1] for own in true}:
        mine = [own for own in true if own[1] == kind]
        assert by_kind[kind]["recall"] == pytest.approx(sum(own in said for own in mine) / len(mine))
        assert by_kind[kind]["support"] == len(mine)


def test_the_report_is_written_and_shown(tmp_path):
    truth, answers = [["B-a", "O"], ["B-b"]], [["B-a", "O"], ["O"]]
    scores = Scores(tag_metrics(truth, answers), {"report": tag_report(truth, answers)})
    TASK.write_report(scores, tmp_path)
    (table,) = TASK.tables(scores)
    saved = json.loads((tmp_path / REPORT_FILE).read_text())
    assert saved["report"]["a"]["f1-score"] == 1.0
    assert saved["metrics"]["recall"] == 0.5
    assert table.row_count == 5


def test_no_entities_at_all():
    assert tag_report([["O"]], [["O"]]) == {}
    assert tag_metrics([["O"]], [["O"]]) == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "accuracy": 1.0}
