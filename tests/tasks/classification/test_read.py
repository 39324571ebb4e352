"""Texts with labels from records: columns, pairs, several labels, marked entities."""

from __future__ import annotations

import math

import pytest

from qlora_kit.config.settings import BaseConfig
from qlora_kit.data.read import Record
from qlora_kit.errors import UserError
from qlora_kit.tasks.classification.read import fits, marked, read, read_unlabelled
from qlora_kit.tasks.task import Source


def source(rows, columns=None):
    records = [Record("a.jsonl", f"a.jsonl:{n}", row) for n, row in enumerate(rows, 1)]
    return Source(records=records, name="a.jsonl", columns=columns or {})


def one(row, columns=None):
    (example,) = read(source([row], columns), BaseConfig())
    return example


@pytest.mark.parametrize(
    "columns",
    [
        {"text", "label"},
        {"sentence", "labels"},
        {"sentence1", "sentence2", "label", "idx"},
        {"premise", "hypothesis", "label"},
        {"question", "sentence", "label"},
        {"text", "relation", "head", "tail"},
    ],
)
def test_columns_that_are_recognised(columns):
    assert fits(columns)


@pytest.mark.parametrize("columns", [{"text"}, {"label"}, {"prompt", "completion", "label"}, {"messages", "label"}])
def test_columns_of_something_else(columns):
    assert not fits(columns)


def test_texts_pairs_and_columns_mapped_by_hand():
    assert (one({"text": "t", "label": 1}).text, one({"text": "t", "label": 1}).labels) == ("t", ("1",))
    pair = one({"premise": "p", "hypothesis": "h", "label": "x"})
    assert (pair.text, pair.pair) == ("p", "h")
    by_hand = one(
        {"body": "b", "other": "o", "class": "c", "text": "no"}, {"text": "body", "pair": "other", "label": "class"}
    )
    assert (by_hand.text, by_hand.pair, by_hand.labels) == ("b", "o", ("c",))


@pytest.mark.parametrize(
    ("rows", "columns", "words"),
    [
        ([{"text": "a", "label": "x"}, {"text": None, "label": "x"}], None, "a.jsonl:2.*must be text, not null"),
        ([{"text": math.nan, "label": "x"}], None, "column 'text' must be text, not NaN"),  # pandas' missing text
        ([{"premise": "a", "hypothesis": math.nan, "label": 1}], None, "column 'hypothesis' must be text, not NaN"),
        ([{"text": "a", "label": None}], None, "column 'label' must be a name or a number, not null"),
        ([{"text": "a", "label": ""}], None, "column 'label' is empty.*multi_label=true"),
        ([{"text": "a", "labl": "x"}], None, "has no column of labels among 'labl', 'text'"),
        ([{"txt": "a", "label": "x"}], None, "has no column of texts"),
        ([{"txt": "a", "label": "x"}], {"text": "body"}, "names a column that a.jsonl does not have"),
        ([{"txt": "a", "label": "x"}], {"prompt": "txt"}, "maps 'prompt', which is not one of text, pair"),
        ([{"text": "\ud800", "label": "x"}], None, "half a surrogate pair"),
        ([{"text": "a", "label": "\ud800"}], None, "a.jsonl:1.*column 'label' has half a surrogate pair"),
    ],
)
def test_what_is_no_labelled_text(rows, columns, words):
    with pytest.raises(UserError, match=words):
        read(source(rows, columns), BaseConfig())


def test_questions_need_no_labels():
    (example,) = read_unlabelled(source([{"text": "a", "label": None}]))
    assert (example.text, example.labels) == ("a", ())
    assert read_unlabelled(source([{"text": "a"}]))[0].text == "a"


def test_entities_are_marked():
    text = "Ann was born in Oslo."
    spans = {"head": [0, 3], "tail": [16, 20]}
    expected = "<e1>Ann</e1> was born in <e2>Oslo</e2>."
    assert marked(text, spans) == expected
    assert marked(text, {"head": "0:3", "tail": {"start": 16, "end": 20}}) == expected
    assert marked(text, {"head": [16, 20], "tail": [0, 3]}) == "<e2>Ann</e2> was born in <e1>Oslo</e1>."
    assert one({"text": text, "relation": "born", **spans}).text == expected
    already = "<e1>Ann</e1> met <e2>Bob</e2>"
    assert one({"text": already, "relation": "met"}).text == already


@pytest.mark.parametrize(
    ("spans", "words"),
    [
        ({"head": [0, 3], "tail": [2, 4]}, "overlap"),
        ({"head": [0, 30], "tail": [2, 5]}, "the text has 4 characters"),
        ({"head": [2, 2], "tail": [3, 4]}, "at 2 to 2"),
        ({"head": "x", "tail": [3, 4]}, "from which character to which"),
        ({"head": None, "tail": [3, 4]}, "from which character to which"),
    ],
)
def test_spans_that_are_none(spans, words):
    with pytest.raises(UserError, match=words):
        read(source([{"text": "abcd", "label": "x", **spans}]), BaseConfig())
