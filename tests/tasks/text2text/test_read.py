"""Pairs of a source and a target: recognised by their columns, mapped by hand, refused with file and line."""

from __future__ import annotations

import pytest

from qlora_kit.config.settings import BaseConfig
from qlora_kit.data.read import Record
from qlora_kit.errors import UserError
from qlora_kit.tasks.task import Source
from qlora_kit.tasks.text2text.read import columns_of, fits, read, read_unanswered


def source(rows, columns=None):
    records = [Record("a.jsonl", f"a.jsonl:{number}", row) for number, row in enumerate(rows, 1)]
    return Source(records=records, name="a.jsonl", columns=columns or {})


def pairs(rows, columns=None):
    return [(example.source, example.target) for example in read(source(rows, columns), BaseConfig())]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"source": "a", "target": "b", "text": "c"}, ("a", "b")),
        ({"document": "a", "summary": "b", "id": 1}, ("a", "b")),
        ({"article": "a", "highlights": "b"}, ("a", "b")),
        ({"dialogue": "a", "summary": "b"}, ("a", "b")),
        ({"text": "a", "summary": "b"}, ("a", "b")),
        ({"translation": {"en": "a", "de": "b"}}, ("a", "b")),
        ({"prompt": "a", "completion": "b"}, ("a", "b")),
        ({"prompt": "a", "completion": "b", "system": "s"}, ("s\n\na", "b")),
        ({"instruction": "a", "input": "i", "output": "b"}, ("a\n\ni", "b")),
        ({"question": "a", "answer": 4}, ("a", "4")),
    ],
)
def test_columns_that_are_recognised(row, expected):
    assert fits(set(row))
    assert pairs([row]) == [expected]
    (asked,) = read_unanswered(source([row]))
    assert (asked.source, asked.target) == (expected[0], None)


@pytest.mark.parametrize(
    "columns", [{"text"}, {"messages"}, {"source"}, {"text", "label"}, {"instruction", "instances"}]
)
def test_columns_of_something_else(columns):
    assert not fits(columns)


def test_columns_mapped_by_hand():
    row = {"a": "s", "b": "t", "source": "no"}
    assert pairs([row], {"source": "a", "target": "b"}) == [("s", "t")]
    assert pairs([row], {"prompt": "a", "completion": "b"}) == [("s", "t")]
    languages = {"translation": {"en": "a", "de": "b", "fr": "c"}}
    assert pairs([languages], {"source": "translation.fr", "target": "translation.en"}) == [("c", "a")]
    assert read_unanswered(source([row], {"source": "a"}))[0].source == "s"
    assert read_unanswered(source([row], {"source": "a", "target": "gone"}))[0].source == "s"


@pytest.mark.parametrize(
    ("rows", "decided"),
    [
        ([{"translation": {"en": "a", "de": "b"}}, {"translation": {"de": "b", "en": "a"}}], True),
        ([{"translation": {"en": "a", "de": "b"}}, {"translation": {"en": "a", "fr": "b"}}], False),
        ([{"translation": {"en": "a", "de": "b", "fr": "c"}}], False),
        ([{"translation": {"en": "a", "de": "b"}}, {"translation": "a"}], False),
        ([{"translation": {"en": "a", "de": "b"}}, {"source": "a", "target": "b"}], False),
        ([{"source": "a", "target": "b"}], False),
        ([], False),
    ],
)
def test_the_first_record_decides_which_language_is_translated(rows, decided):
    found = columns_of(source(rows).records, {})
    assert found == ({"source": "translation.en", "target": "translation.de"} if decided else {})
    assert columns_of(source(rows).records, {"source": "a"}) == {"source": "a"}


def test_languages_are_not_looked_for_in_data_of_another_shape():
    languages = {"source": "translation.en", "target": "translation.de"}
    assert pairs([{"source": "s", "target": "t"}], languages) == [("s", "t")]
    with pytest.raises(UserError, match=r"'translation.de' must be text"):
        pairs([{"translation": {"en": "a", "fr": "b"}}, {"translation": {"en": "a", "de": "b"}}], languages)
    with pytest.raises(UserError, match="has no pair of a source and a target"):
        pairs([{"a": "s", "b": "t"}], languages)


@pytest.mark.parametrize("row", [{"source": "a"}, {"document": "a"}, {"text": "a"}, {"prompt": "a"}, {"question": "a"}])
def test_questions_need_no_targets(row):
    assert [example.source for example in read_unanswered(source([row]))] == ["a"]


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        ({"prompt": "a", "completion": "b", "system": "s"}, "completion"),
        ({"instruction": "a", "input": "i", "output": "b"}, "output"),
        ({"instruction": "a", "input": "i", "system": "s", "output": "b"}, "output"),
        ({"instruction": "a", "context": "i", "response": "b"}, "response"),
        ({"instruction": "a", "input": "i", "output": "b", "text": "all of it"}, "output"),
        ({"question": "a", "answer": "b"}, "answer"),
    ],
)
def test_without_its_answer_a_source_is_the_same(row, answer):
    ((whole, _),) = pairs([row])
    (asked,) = read_unanswered(source([{name: text for name, text in row.items() if name != answer}]))
    assert asked.source == whole


def test_a_translation_without_languages_is_refused_with_its_place():
    with pytest.raises(UserError, match=r"a\.jsonl:1.*has 0 languages"):
        read_unanswered(source([{"translation": {}}]))


def test_an_empty_source_may_be_asked():
    assert read_unanswered(source([{"source": ""}]))[0].source == ""


def test_each_file_has_its_own_columns():
    records = [Record("a.jsonl", "a.jsonl:1", {"source": "a", "target": "b"})]
    records += [Record("b.jsonl", "b.jsonl:1", {"document": "c", "summary": "d"})]
    found = read(Source(records=records, name="folder", columns={}), BaseConfig())
    assert [(example.source, example.target, example.origin) for example in found] == [
        ("a", "b", "a.jsonl:1"),
        ("c", "d", "b.jsonl:1"),
    ]


@pytest.mark.parametrize(
    ("rows", "columns", "words"),
    [
        ([{"source": "a", "target": "b"}, {"source": "a", "target": ""}], None, "a.jsonl:2.*has an empty target"),
        ([{"source": " ", "target": "b"}], None, "a.jsonl:1.*has an empty source"),
        ([{"source": "a", "target": None}], None, "column 'target' must be text, not null"),
        ([{"source": "a", "target": "\ud800"}], None, "half a surrogate pair"),
        ([{"source": "a", "tgt": "b"}], None, "has no pair of a source and a target among 'source', 'tgt'"),
        ([{"source": "a", "tgt": "b"}], {"source": "source", "target": "t"}, "names a column that a.jsonl does not"),
        ([{"source": "a", "tgt": "b"}], {"source": "source"}, "maps no target"),
        ([{"source": "a", "tgt": "b"}], {"label": "tgt"}, "none of source, target"),
        ([{"translation": {"en": "a", "de": "b"}}, {"translation": "a"}], None, "a.jsonl:2.*must be an object"),
        (
            [{"translation": {"en": "a", "de": "b"}}, {"translation": {"en": "a"}}],
            None,
            "'translation.de' must be text",
        ),
        ([{"translation": {"en": "a", "de": "b", "fr": "c"}}], None, "has 3 languages"),
    ],
)
def test_what_is_no_pair(rows, columns, words):
    with pytest.raises(UserError, match=words):
        read(source(rows, columns), BaseConfig())
