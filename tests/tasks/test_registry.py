"""The table of tasks: which one data and model are for, and what each promises the rest of the toolkit."""

from __future__ import annotations

import pytest
from classifiers import architecture

from qlora_kit.config.settings import BaseConfig
from qlora_kit.data.read import Record
from qlora_kit.errors import UserError
from qlora_kit.tasks.registry import all_tasks, check_can_do, choose, metric_of, names, task_named, task_of


def chosen(row, kind="gpt2", columns=None, task=None):
    config = BaseConfig(task=task)
    return choose(config, [Record("a.jsonl", "a.jsonl:1", row)], columns or {}, architecture(kind)).name


def test_every_task_has_a_name_of_its_own():
    assert len(set(names())) == len(all_tasks())
    assert all(task_named(task.name) is task for task in all_tasks())
    assert task_named(None).name == "text-generation"
    with pytest.raises(UserError, match="task = 'nonesuch': is not a task; the tasks are text-generation, "):
        task_named("nonesuch")


@pytest.mark.parametrize("task", all_tasks(), ids=lambda task: task.name)
def test_a_task_follows_one_of_its_metrics(task):
    assert task.metric in task.metrics
    assert "loss" in task.metrics
    assert metric_of(task, None) == (task.metric, task.metrics[task.metric])
    with pytest.raises(UserError, match="metric = 'nonesuch'"):
        metric_of(task, "nonesuch")


@pytest.mark.parametrize(
    ("row", "kind", "columns", "expected"),
    [
        ({"text": "a", "label": 1}, "gpt2", None, "text-classification"),
        ({"text": "a"}, "gpt2", None, "text-generation"),
        ({"prompt": "a", "completion": "b", "label": 1}, "gpt2", None, "text-generation"),
        ({"premise": "a", "hypothesis": "b", "label": 1}, "bert", None, "text-classification"),
        ({"text": "a", "label": 1}, "gpt2", {"text": "text"}, "text-generation"),
        ({"x": "a", "y": 1}, "gpt2", {"text": "x", "label": "y"}, "text-classification"),
        ({"x": "a"}, "bert", None, "text-classification"),  # by its kind; the message then names these columns
        ({"x": "a"}, "gpt2", None, "text-generation"),
        ({"x": "a"}, "t5", None, "text2text-generation"),
        ({"document": "a", "summary": "b"}, "t5", None, "text2text-generation"),
        ({"prompt": "a", "completion": "b"}, "t5", None, "text2text-generation"),
        ({"prompt": "a", "completion": "b"}, "bart", None, "text2text-generation"),
        ({"text": "a"}, "bart", None, "text-generation"),
        ({"text": "a", "label": 1}, "t5", None, "text-classification"),
        ({"text": "a", "summary": "b"}, "gpt2", None, "text-generation"),
        ({"x": "a", "y": "b"}, "t5", {"source": "x", "target": "y"}, "text2text-generation"),
        ({"question": "a", "context": "b", "answers": {}}, "gpt2", None, "question-answering"),
        ({"title": "a", "paragraphs": []}, "bert", None, "question-answering"),
        (
            {"q": "a", "c": "b", "a": {}},
            "bert",
            {"question": "q", "context": "c", "answers": "a"},
            "question-answering",
        ),
        ({"question": "a", "context": "b"}, "bert", None, "text-classification"),  # as a model of its kind
    ],
)
def test_the_task_is_taken_from_columns_and_kind(row, kind, columns, expected):
    assert chosen(row, kind, columns) == expected


def test_what_is_said_by_hand_wins():
    assert chosen({"text": "a", "label": 1}, task="text-generation") == "text-generation"


def test_a_model_is_for_what_it_was_saved_for():
    saved = architecture("gpt2")
    assert task_of(BaseConfig(), saved).name == "text-generation"
    saved.architectures = ["GPT2ForSequenceClassification"]
    assert task_of(BaseConfig(), saved).name == "text-classification"
    assert task_of(BaseConfig(task="text-generation"), saved).name == "text-generation"
    saved.architectures = ["GPT2ForQuestionAnswering"]
    assert task_of(BaseConfig(), saved).name == "question-answering"
    assert task_of(BaseConfig(), architecture("electra")).name == "text-classification"
    assert task_of(BaseConfig(), architecture("t5")).name == "text2text-generation"
    saved = architecture("bart")
    assert task_of(BaseConfig(), saved).name == "text2text-generation"
    saved.architectures = ["BartForSequenceClassification"]
    assert task_of(BaseConfig(), saved).name == "text-classification"


@pytest.mark.parametrize(
    ("row", "expected"),
    [({"prompt": "a", "completion": "b"}, "text-generation"), ({"source": "a", "target": "b"}, "text2text-generation")],
)
def test_where_the_model_is_not_known_the_columns_say_it(row, expected):
    assert choose(BaseConfig(), [Record("a.jsonl", "a.jsonl:1", row)], {}, None).name == expected


@pytest.mark.parametrize(
    ("kind", "generates", "classifies", "decodes"),
    [
        ("gpt2", True, True, False),
        ("bert", False, True, False),
        ("t5", False, True, True),
        ("bart", False, True, True),
        ("roberta", False, True, False),
    ],
)
def test_what_kinds_of_models_can_do(kind, generates, classifies, decodes):
    found = architecture(kind)
    able = [
        task_named(task).model.has_class_for(found)
        for task in ("text-generation", "text-classification", "text2text-generation")
    ]
    assert able == [generates, classifies, decodes]


def test_a_bert_that_was_made_a_decoder_may_write():
    found = architecture("bert")
    found.is_decoder = True
    assert task_named("text-generation").model.has_class_for(found)


def test_a_bart_that_was_saved_as_a_decoder_may_write_and_no_other():
    found = architecture("bart")
    with pytest.raises(UserError, match=r"answers a text, and does not go on with it.*\n.*task=.*text-classification"):
        check_can_do(
            task_named("text-generation"), found, "bart"
        )  # transformers has a class, which lacks weights in its files
    found.is_encoder_decoder = False
    assert task_named("text-generation").model.has_class_for(found)
