"""The label map of a data set, and weights that make rare labels count."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.utils.class_weight import compute_class_weight

from qlora_kit.config.settings import BaseConfig
from qlora_kit.errors import UserError
from qlora_kit.tasks.classification.labels import LabelError, read_labels, resolve_labels
from qlora_kit.tasks.labels import balanced_weights, in_order


@dataclass(frozen=True)
class Labels:
    labels: tuple[str, ...]
    listed: bool = False
    origin: str = "a.jsonl:1"


def resolved(*labels, **settings):
    examples = [Labels(tuple(own) if isinstance(own, list) else (own,), isinstance(own, list)) for own in labels]
    config = resolve_labels(BaseConfig(**settings), examples, "--data")
    return config.labels, config.multi_label


@pytest.mark.parametrize(
    ("value", "several", "names", "listed"),
    [
        ("yes", None, ("yes",), False),
        (" yes ", None, ("yes",), False),
        (1, None, ("1",), False),
        (1.0, None, ("1",), False),
        (True, None, ("true",), False),
        (["a", 2], None, ("a", "2"), True),
        (["a", "a"], None, ("a",), True),
        ([], None, (), True),
        ("a|b", None, ("a", "b"), True),
        ("a|b", False, ("a|b",), False),
        ("a", True, ("a",), True),
        ("", True, (), True),
    ],
)
def test_values_of_a_column(value, several, names, listed):
    found = read_labels(value, several)
    assert (found.names, found.listed) == (names, listed)


@pytest.mark.parametrize(
    "value", [None, "", "  ", {"a": 1}, ["a", None], [""], "\ud800", ["a\udc00"], 0.5, math.nan, math.inf]
)
def test_what_is_no_label(value):
    with pytest.raises(LabelError):
        read_labels(value, None)


def test_order_of_numbers_or_of_the_alphabet():
    assert in_order(["10", "9", "-1"]) == ("-1", "9", "10")
    assert in_order(["b", "10", "9"]) == ("10", "9", "b")
    orders = {in_order(own) for own in itertools.permutations(["2", "nan", "1", "0"])}
    assert orders == {("0", "1", "2", "nan")}  # NaN compares with no number


def test_labels_come_from_the_data_or_are_given():
    assert resolved("b", "a", "b") == (("a", "b"), False)
    assert resolved("1", "0", "10") == (("0", "1", "10"), False)
    assert resolved(["a", "b"], ["c"], []) == (("a", "b", "c"), True)
    assert resolved("b", "a", labels=("b", "a", "z")) == (("b", "a", "z"), False)
    assert resolved("b", "a", multi_label=True) == (("a", "b"), True)


@pytest.mark.parametrize(
    ("labels", "settings", "words"),
    [
        (("a", "a"), {}, "has only the label 'a'"),
        (("a", "c"), {"labels": ("a", "b")}, "has the label 'c', which is not among a, b"),
        (
            (["a", "b"], "a", "b"),
            {"multi_label": False},
            r"has 2 labels, and multi_label is off.*\n.*multi_label=true",
        ),
        (([], []), {}, "has no label in any of its 2 examples"),
    ],
)
def test_what_cannot_be_learned(labels, settings, words):
    with pytest.raises(UserError, match=words):
        resolved(*labels, **settings)


@settings(deadline=None, max_examples=50, derandomize=True)
@given(st.lists(st.integers(0, 5), min_size=2, max_size=60).filter(lambda found: len(set(found)) > 1))
def test_balanced_weights_are_those_of_scikit_learn(found):
    classes = sorted(set(found))
    counts = [found.count(number) for number in range(6)]
    weights = balanced_weights(counts, len(found), several=False)
    expected = compute_class_weight("balanced", classes=np.array(classes), y=np.array(found))
    assert [weights[number] for number in classes] == pytest.approx(list(expected), rel=1e-12)
    assert sum(weights[number] for number in found) / len(found) == pytest.approx(1.0)


def test_weights_of_several_labels_are_absences_over_presences():
    assert balanced_weights([1, 3, 0, 4], 4, several=True) == [3.0, 1 / 3, 1.0, 1.0]
