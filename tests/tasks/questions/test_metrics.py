"""SQuAD's figures on cases worked out by hand."""

from __future__ import annotations

import pytest

from qlora_kit.tasks.questions.metrics import exact_match, f1, normalized, squad_metrics


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Eiffel  Tower.", "eiffel tower"),
        ("an apple, a day", "apple day"),
        ("theatre", "theatre"),  # an article is a word of its own
        ("U.S.A.", "usa"),
        ("$1,000", "1000"),
        ("a-b", "ab"),
        ("the a an", ""),
        ("\n Été\t", "été"),
    ],
)
def test_normalization(text, expected):
    assert normalized(text) == expected


@pytest.mark.parametrize(
    ("found", "right", "exact", "share"),
    [
        ("the cat", ["Cat!"], 1, 1),
        ("black cat", ["cat"], 0, 2 / 3),  # precision 1/2, recall 1
        ("cat", ["big black cat"], 0, 1 / 2),  # precision 1, recall 1/3
        ("cat cat dog", ["cat dog dog"], 0, 2 / 3),  # as bags: one cat and one dog of three on each side
        ("dog", ["cat", "a dog", "dog house"], 1, 1),  # the best of several
        ("dog", ["cat"], 0, 0),
        ("", [], 1, 1),
        ("cat", [], 0, 0),
        ("", ["cat"], 0, 0),
        ("the", ["a"], 1, 1),  # nothing is left of both
        ("cat", ["the"], 0, 0),
        ("", ["the", "cat"], 0, 0),  # a right answer of which nothing is left counts only where there is no other
        ("an", ["!", "cat"], 0, 0),
        ("cat", ["the", "cat"], 1, 1),
    ],
)
def test_exact_match_and_f1(found, right, exact, share):
    assert exact_match(found, right) == exact
    assert f1(found, right) == pytest.approx(share)


def test_the_parts_with_and_without_an_answer():
    found = ["cat", "black dog", "", "cow"]
    right = [["cat"], ["dog"], [], []]
    assert squad_metrics(found, right) == pytest.approx(
        {
            "exact_match": 2 / 4,
            "f1": (1 + 2 / 3 + 1 + 0) / 4,
            "exact_match_answerable": 1 / 2,
            "f1_answerable": (1 + 2 / 3) / 2,
            "exact_match_unanswerable": 1 / 2,
        }
    )
    assert squad_metrics(["a"], [["b"]]).keys() == {
        "exact_match",
        "f1",
        "exact_match_answerable",
        "f1_answerable",
    }
    assert squad_metrics([""], [[]]) == {"exact_match": 1, "f1": 1, "exact_match_unanswerable": 1}
