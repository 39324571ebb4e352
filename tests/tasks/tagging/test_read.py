"""Words with tags from records: columns, numbers, texts, the order of the labels, and what is refused."""

from __future__ import annotations

import pytest

from qlora_kit.config.settings import BaseConfig
from qlora_kit.data.read import Record
from qlora_kit.errors import UserError
from qlora_kit.tasks.tagging.read import (
    TaggedWords,
    check_tags,
    fits,
    kind_of,
    read,
    read_untagged,
    resolve_tags,
    tags_in_order,
)
from qlora_kit.tasks.task import Source


def source(rows, columns=None):
    records = [Record("a.jsonl", f"a.jsonl:{n}", row) for n, row in enumerate(rows, 1)]
    return Source(records=records, name="a.jsonl", columns=columns or {})


def one(row, columns=None, labels=None):
    (example,) = read(source([row], columns), BaseConfig(labels=labels))
    return example


def sentence(*tags, origin="a.conll:1"):
    return TaggedWords(tuple("w" for _ in tags), tags, origin)


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"tokens", "tags"}, True),
        ({"id", "tokens", "ner_tags"}, True),
        ({"words", "labels"}, True),
        ({"tokens"}, False),
        ({"text", "labels"}, False),
        ({"text", "label", "tokens"}, False),
    ],
)
def test_columns_that_are_recognised(columns, expected):
    assert fits(columns) is expected


def test_names_numbers_and_columns_mapped_by_hand():
    assert one({"tokens": ["a", "b"], "tags": ["O", "B-x"]}).tags == ("O", "B-x")
    assert one({"tokens": ["a", "b"], "ner_tags": [1, 0]}, labels=("O", "B-x")).tags == ("B-x", "O")
    by_hand = one({"w": ["a"], "t": ["O"], "tokens": ["no"]}, {"tokens": "w", "tags": "t"})
    assert (by_hand.words, by_hand.tags, by_hand.origin) == (("a",), ("O",), "a.jsonl:1")
    assert one({"tokens": [], "tags": []}).words == ()
    assert one({"tokens": [7], "tags": ["O"]}).words == ("7",)


@pytest.mark.parametrize(
    ("rows", "columns", "words"),
    [
        (
            [{"tokens": ["a"], "tags": ["O"]}, {"tokens": ["a", "b"], "tags": ["O"]}],
            None,
            r"a.jsonl:2.*2 words and 1 tags",
        ),
        ([{"tokens": "a b", "tags": ["O"]}], None, "column 'tokens' must be a list, not str"),
        ([{"tokens": ["a"], "tags": None}], None, "column 'tags' must be a list, not null"),
        ([{"tokens": [None], "tags": ["O"]}], None, "a word in column 'tokens' must be text, not null"),
        ([{"tokens": ["a"], "tags": [None]}], None, "a tag in column 'tags' must be a name or a number, not null"),
        ([{"tokens": ["a"], "tags": [""]}], None, "not an empty one"),
        (
            [{"tokens": ["a"], "tags": ["B-\ud800"]}],
            None,
            "a.jsonl:1.*a tag in column 'tags' has half a surrogate pair",
        ),
        ([{"tokens": ["a"], "ner_tags": [3]}], None, "has numbers: name them in their order with labels"),
        ([{"tokens": ["a"], "tag": ["O"]}], None, "has no column of tags among 'tag', 'tokens'"),
        ([{"text": "a"}], None, "has no column of words among 'text'"),
        ([{"w": ["a"], "tags": ["O"]}], {"tokens": "x"}, "names a column that a.jsonl does not have"),
        ([{"w": ["a"], "tags": ["O"]}], {"prompt": "w"}, "maps 'prompt', which is not one of tokens, tags, text"),
    ],
)
def test_what_is_no_tagged_sentence(rows, columns, words):
    with pytest.raises(UserError, match=words):
        read(source(rows, columns), BaseConfig())


def test_a_number_beyond_the_labels():
    with pytest.raises(UserError, match="has the number 2, and there are 2 labels, from 0"):
        one({"tokens": ["a"], "tags": [2]}, labels=("O", "B-x"))


def test_questions_need_no_tags():
    rows = [{"tokens": ["a", "b"], "tags": None}, {"tokens": ["c"]}]
    assert [example.words for example in read_untagged(source(rows))] == [("a", "b"), ("c",)]
    (example,) = read_untagged(source([{"text": " Ann  sings "}]))
    assert (example.words, example.tags) == (("Ann", "sings"), None)
    (example,) = read_untagged(source([{"body": "a b"}], {"text": "body"}))
    assert example.words == ("a", "b")
    with pytest.raises(UserError, match="has no column of words"):
        read_untagged(source([{"body": "a b"}]))


@pytest.mark.parametrize(
    ("tag", "expected"),
    [
        ("O", ("", "O")),
        ("B-creative-work", ("B", "creative-work")),
        ("NOUN", ("", "NOUN")),
        ("I-", ("", "I-")),
        ("X-a", ("", "X-a")),
        ("BI-a", ("", "BI-a")),
    ],
)
def test_prefix_and_type(tag, expected):
    assert kind_of(tag) == expected


def test_labels_begin_with_o_and_go_type_by_type():
    assert tags_in_order(["I-b", "B-b", "O", "I-a", "B-a", "O"]) == ("O", "B-a", "I-a", "B-b", "I-b")
    assert tags_in_order(["S-a", "E-a", "I-a", "B-a"]) == ("B-a", "I-a", "E-a", "S-a")
    assert tags_in_order(["VERB", "NOUN"]) == ("NOUN", "VERB")


def test_labels_come_from_the_data_or_are_given():
    config = resolve_tags(BaseConfig(), [sentence("B-a", "O"), sentence("I-a")], "data", "token-classification")
    assert (config.task, config.labels, config.multi_label) == ("token-classification", ("O", "B-a", "I-a"), False)
    assert resolve_tags(
        BaseConfig(labels=("B-a", "O")), [sentence("O", "B-a")], "data", "token-classification"
    ).labels == ("B-a", "O")


@pytest.mark.parametrize(
    ("examples", "settings", "words"),
    [
        ([sentence("O", "O")], {}, "has only the tag 'O'"),
        ([sentence()], {}, "has no tag"),
        ([sentence("O", "B-a")], {"labels": ("O", "B-b")}, "has the tag 'B-a'"),
        ([sentence("O", "B-a")], {"multi_label": True}, "multi_label.*each word has one tag"),
    ],
)
def test_what_cannot_be_learned(examples, settings, words):
    with pytest.raises(UserError, match=words):
        resolve_tags(BaseConfig(**settings), examples, "data", "token-classification")


def test_each_sentence_with_a_strange_tag_is_named_once():
    strange = [sentence("O", "X", "Y", origin="b.conll:1"), sentence("O"), sentence("Y", origin="b.conll:9")]
    with pytest.raises(UserError) as caught:
        check_tags(BaseConfig(labels=("O", "B-x")), strange, "eval_data")
    assert [(fault.setting, fault.value) for fault in caught.value.faults] == [
        ("eval_data", "b.conll:1"),
        ("eval_data", "b.conll:9"),
    ]
