"""The parts of the data in cross-validation."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_kit.data import Example
from qlora_kit.errors import UserError
from qlora_kit.search.folds import make_folds


@dataclass(frozen=True, kw_only=True)
class Labelled(Example):
    """An example with a class, as a task gives it one."""

    labels: tuple[str, ...] = ()


def plain(count: int) -> list[Example]:
    return [
        Example(prompt=None, completion=str(number), messages=None, origin=f"data:{number}") for number in range(count)
    ]


def labelled(labels) -> list[Labelled]:
    """Examples with a label each, or with several."""
    several = [(label,) if isinstance(label, str) else label for label in labels]
    return [
        Labelled(prompt=None, completion=str(number), messages=None, origin=f"data:{number}", labels=names)
        for number, names in enumerate(several)
    ]


def check_division(examples, folds, n_folds) -> None:
    """Every example is held out once and trains otherwise; both parts keep the order."""
    assert len(folds) == n_folds
    held_out = [example for fold in folds for example in fold.held_out]
    assert sorted(held_out, key=examples.index) == list(examples)
    for fold in folds:
        assert fold.train == [example for example in examples if example not in fold.held_out]
        assert fold.held_out == [example for example in examples if example in fold.held_out]


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.integers(2, 40), st.integers(2, 10), st.integers(0, 2**32 - 1))
def test_examples_without_classes_are_divided_evenly(count, n_folds, seed):
    examples = plain(count)
    if count < n_folds:
        with pytest.raises(UserError, match="folds = "):
            make_folds(examples, n_folds, seed, "data")
        return
    folds = make_folds(examples, n_folds, seed, "data")
    check_division(examples, folds, n_folds)
    sizes = [len(fold.held_out) for fold in folds]
    assert max(sizes) - min(sizes) <= 1
    assert make_folds(examples, n_folds, seed, "data") == folds


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from("abc"), min_size=2, max_size=40), st.integers(2, 6), st.integers(0, 1000))
def test_every_part_holds_the_classes_in_proportion(labels, n_folds, seed):
    examples, counts = labelled(labels), Counter(labels)
    impossible = len(labels) < n_folds or len(counts) == 1 or max(counts.values()) < n_folds
    try:
        folds = make_folds(examples, n_folds, seed, "data")
    except UserError:
        assert impossible or min(counts.values()) < n_folds  # a class is missing from some part
        return
    assert not impossible
    check_division(examples, folds, n_folds)
    for fold in folds:
        assert len({example.labels for example in fold.held_out}) > 1
        assert len({example.labels for example in fold.train}) > 1
        for label, count in counts.items():
            held_out = sum(example.labels == (label,) for example in fold.held_out)
            assert abs(held_out - count / n_folds) < 1


def test_the_seed_draws_the_folds():
    examples = plain(20)
    assert make_folds(examples, 4, 1, "data") != make_folds(examples, 4, 2, "data")


def test_several_labels_at_once_make_no_classes():
    examples = labelled([("a",), ("a", "b"), ("b",), ()])
    check_division(examples, make_folds(examples, 2, 0, "data"), 2)


@pytest.mark.parametrize(
    ("labels", "n_folds", "messages"),
    [
        (["x"] * 6, 3, ["data = 'data'", "only one class, 'x'"]),
        (["x"] * 8 + ["y"], 3, ["folds = 3", "fold", "only one class, 'x'", "'y' (it has 1)"]),
        (["x", "x", "y", "y"], 3, ["folds = 3", "at most 2"]),
        (["x", "y"], 3, ["folds = 3", "2 examples in data"]),
    ],
)
def test_folds_that_tell_nothing_are_refused(labels, n_folds, messages):
    with pytest.raises(UserError) as caught:
        make_folds(labelled(labels), n_folds, 0, "data")
    for message in messages:
        assert message in str(caught.value)
