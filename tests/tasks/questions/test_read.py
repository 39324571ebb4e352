"""Questions on contexts: SQuAD's flat and nested layouts, read, and what is wrong said with file and line."""

from __future__ import annotations

import json

import pytest

from qlora_kit.config.settings import BaseConfig
from qlora_kit.data import read_rows
from qlora_kit.errors import UserError
from qlora_kit.tasks.questions.read import AnswerSpan, fits, read, read_unlabelled
from qlora_kit.tasks.task import Source

CONTEXT = "The cat sat on the mat; the cat slept."


def row(answers, **others):
    return {"question": "Who sat?", "context": CONTEXT, "answers": answers, **others}


def source_of(tmp_path, rows, columns=None, name="a.jsonl"):
    file = tmp_path / name
    text = json.dumps(rows) if name.endswith(".json") else "".join(json.dumps(own) + "\n" for own in rows)
    file.write_text(text, encoding="utf-8")
    columns = columns or {}
    return Source(records=read_rows(str(file), columns), name=str(file), columns=columns)


def examples(tmp_path, rows, columns=None, name="a.jsonl"):
    return read(source_of(tmp_path, rows, columns, name), BaseConfig())


def test_answers_in_each_layout(tmp_path):
    lists = {"text": ["cat", "The cat"], "answer_start": [4, 0]}
    objects = [{"text": "cat", "answer_start": 4}, {"text": "The cat", "answer_start": 0}]
    one, other, single = examples(tmp_path, [row(lists), row(objects), row({"text": "cat", "answer_start": 4})])
    assert one.answers == other.answers == (AnswerSpan("cat", 4), AnswerSpan("The cat", 0))
    assert single.answers == (AnswerSpan("cat", 4),)
    assert one.origin.endswith("a.jsonl:1")
    assert (one.question, one.context, one.id) == ("Who sat?", CONTEXT, None)


def test_questions_without_an_answer(tmp_path):
    empty = {"text": [], "answer_start": []}
    rows = [row(empty), row([]), row(empty, is_impossible=True), row(None, is_impossible=True, id=7)]
    found = examples(tmp_path, rows)
    assert [example.answers for example in found] == [(), (), (), ()]
    assert found[3].id == "7"


def test_squads_own_json(tmp_path):
    qas = [
        {"id": "q1", "question": "Who sat?", "answers": [{"text": "cat", "answer_start": 4}], "is_impossible": False},
        {"id": "q2", "question": "Who ran?", "answers": [], "is_impossible": True, "plausible_answers": [1]},
    ]
    squad = {"version": "v2.0", "data": [{"title": "t", "paragraphs": [{"context": CONTEXT, "qas": qas}]}]}
    first, second = examples(tmp_path, squad, name="squad.json")
    assert (first.question, first.context, first.answers, first.id) == (
        "Who sat?",
        CONTEXT,
        (AnswerSpan("cat", 4),),
        "q1",
    )
    assert (second.id, second.answers) == ("q2", ())
    assert second.origin.endswith("squad.json: record 1 paragraph 1 question 2 (id q2)")
    qas[0]["answers"][0]["answer_start"] = 5
    with pytest.raises(UserError, match=r"question 1 \(id q1\).*is not at character 5"):
        examples(tmp_path, squad, name="squad.json")


def test_columns_by_hand(tmp_path):
    columns = {"question": "q", "context": "c", "answers": "a"}
    rows = [{"q": "Who?", "c": CONTEXT, "a": {"text": ["cat"], "answer_start": [4]}}]
    assert examples(tmp_path, rows, columns)[0].answers == (AnswerSpan("cat", 4),)
    with pytest.raises(UserError, match="names a column that"):
        examples(tmp_path, rows, {**columns, "answers": "b"})
    with pytest.raises(UserError, match="maps 'label', which is not one of question, context, answers, id"):
        examples(tmp_path, rows, {"label": "a"})
    with pytest.raises(UserError, match=r"has no column 'question' or 'context' or 'answers' among 'a', 'c', 'q'"):
        examples(tmp_path, rows)


def test_without_labels_answers_are_not_looked_at(tmp_path):
    rows = [{"question": "Who?", "context": CONTEXT, "answers": "whatever"}, {"question": "Who?", "context": "b"}]
    assert [example.answers for example in read_unlabelled(source_of(tmp_path, rows))] == [(), ()]


@pytest.mark.parametrize(
    ("answers", "others", "said"),
    [
        ({"text": ["cat"], "answer_start": [5]}, {}, "'cat' is not at character 5 of its context; it is at 4 and 28"),
        ({"text": ["cat"], "answer_start": [-34]}, {}, "is not at character -34"),  # it would be, from the end
        ({"text": ["dog"], "answer_start": [4]}, {}, "is not at character 4 of its context; nor anywhere else in it"),
        ({"text": ["slept.."], "answer_start": [32]}, {}, "nor anywhere"),
        ({"text": ["cat", "mat"], "answer_start": [4]}, {}, "has 2 texts and 1 of 'answer_start'"),
        ({"text": [" "], "answer_start": [3]}, {}, "has an answer without text"),
        ({"text": ["cat"], "answer_start": ["4"]}, {}, r"no whole number \('4'\)"),
        ({"text": ["cat"], "answer_start": [True]}, {}, "no whole number"),
        ("cat", {}, "must be "),
        (None, {}, "must be "),
        ({"text": ["cat"]}, {}, "must be "),
        ({"text": ["cat"], "answer_start": [4]}, {"is_impossible": True}, "is_impossible is true, and there is"),
        ([], {"is_impossible": False}, "is_impossible is false, and there is no answer"),
        ([], {"context": None}, "column 'context' must be text, not null"),
        ([], {"id": "\ud800"}, "column 'id' has half a surrogate pair"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(tmp_path, answers, others, said):
    right = row({"text": ["cat"], "answer_start": [4]})
    with pytest.raises(UserError, match=rf"a\.jsonl:2.*{said}"):
        examples(tmp_path, [right, row(answers, **others)])


def test_every_faulty_place_is_told_at_once(tmp_path):
    wrong = row({"text": ["dog"], "answer_start": [4]})
    with pytest.raises(UserError) as caught:
        examples(tmp_path, [wrong, wrong])
    assert len(caught.value.faults) == 2


def test_broken_paragraphs(tmp_path):
    articles = {"data": [{"paragraphs": [{"context": "a", "qas": 3}, 4]}, {"paragraphs": None}]}
    with pytest.raises(UserError) as caught:
        examples(tmp_path, articles, name="squad.json")
    text = str(caught.value)
    assert "record 1 paragraph 1" in text
    assert "must have a list 'qas'" in text
    assert "entry 2 of 'paragraphs' must be an object, not int" in text
    assert "record 2" in text
    with pytest.raises(UserError, match="holds no questions"):
        examples(tmp_path, {"data": [{"paragraphs": []}]}, name="squad.json")


def test_columns_that_fit():
    assert fits({"question", "context", "answers", "id"})
    assert fits({"title", "paragraphs"})
    assert not fits({"question", "answers"})
