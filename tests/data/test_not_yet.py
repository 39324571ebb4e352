"""What a conversation may say that is not supported yet is refused: trained without it would be something else."""

import json

import pytest

from qlora_kit import BaseConfig, DataConfig, RunConfig
from qlora_kit.errors import UserError
from qlora_kit.runs.inputs import read_inputs

ASK, ANSWER = {"role": "user", "content": "Where is parcel 7?"}, {"role": "assistant", "content": "In Oslo."}
CALL = [{"id": "c1", "type": "function", "function": {"name": "track", "arguments": '{"parcel": 7}'}}]
TOOLS = [{"type": "function", "function": {"name": "track", "parameters": {"type": "object", "properties": {}}}}]


def read(tmp_path, *rows, columns=None, train_on="answer"):
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    settings = DataConfig(data=str(file), columns=columns or {}, train_on=train_on)
    return read_inputs(RunConfig(base=BaseConfig(model="demo"), data=settings))


def chat(*turns, **others):
    return {"messages": list(turns), **others}


def as_sharegpt(row):
    roles = {"user": "human", "assistant": "gpt"}
    turns = []
    for turn in row["messages"]:
        others = {key: value for key, value in turn.items() if key not in ("role", "content")}
        turns.append({"from": roles.get(turn["role"], turn["role"]), "value": turn["content"], **others})
    return {"conversations": turns, **{key: value for key, value in row.items() if key != "messages"}}


REFUSED = [
    (chat(ASK, {**ANSWER, "content": "", "tool_calls": CALL}, ANSWER), "a message with 'tool_calls', which would be"),
    (chat(ASK, {**ANSWER, "content": None, "tool_calls": CALL}, ANSWER), "a message with 'tool_calls', which would be"),
    (chat(ASK, {**ANSWER, "content": "", "function_call": CALL[0]}), "a message with 'function_call', which would be"),
    (chat(ASK, ANSWER, tools=TOOLS), "'tools' beside its messages, which would not reach the prompt"),
    (chat(ASK, ANSWER, tools=json.dumps(TOOLS)), "'tools' beside its messages, which would not reach the prompt"),
    (chat(ASK, {**ANSWER, "weight": 0}, ASK, ANSWER), "an answer whose 'weight' is not 1, and it would be learned"),
    (chat(ASK, {**ANSWER, "weight": 0.5}), "an answer whose 'weight' is not 1, and it would be learned"),
    (chat(ASK, {**ANSWER, "train": False}), "an answer whose 'train' is not true, and it would be learned"),
    (chat(ASK, {**ANSWER, "weight": "0.5"}), "an answer whose 'weight' is not 1, and it would be learned"),
    (chat({**ASK, "train": "true"}, ANSWER), "a message whose 'train' is true and that is no answer"),
    (chat({**ASK, "train": True}, ANSWER), "a message whose 'train' is true and that is no answer"),
    (chat(ASK, {**ANSWER, "training": False}), "an answer whose 'training' is not true, and it would be learned"),
    (chat(ASK, {**ANSWER, "reasoning_content": "look it up"}), "a message with 'reasoning_content', which would be"),
    (chat(ASK, {**ANSWER, "reasoning": "look it up"}), "a message with 'reasoning', which would be left out"),
    (chat(ASK, {**ANSWER, "thinking": "look it up"}), "a message with 'thinking', which would be left out"),
]


@pytest.mark.parametrize("layout", [dict, as_sharegpt])
@pytest.mark.parametrize(("row", "said"), REFUSED)
def test_what_would_train_something_else_is_refused(tmp_path, row, said, layout):
    with pytest.raises(UserError, match=f"has {said}") as caught:
        read(tmp_path, layout(row))
    (fault,) = caught.value.faults
    assert (fault.setting, fault.value) == ("data", f"{tmp_path / 'a.jsonl'}:1")
    assert "emove" in fault.remedy or "leave these conversations out" in fault.remedy


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "And its colour?", "input": "", "output": "Grey.", "history": [["Name a fish.", "Cod."]]},
        {"prompt": "And its colour?", "response": "Grey.", "history": '[["Name a fish.", "Cod."]]'},
    ],
)
def test_what_was_said_before_is_refused(tmp_path, row):
    with pytest.raises(UserError, match="a 'history', which would not reach the prompt") as caught:
        read(tmp_path, row)
    assert "Give the whole as a conversation" in caught.value.faults[0].remedy


def test_a_history_that_is_the_prompt_is_read(tmp_path):
    columns = {"prompt": "history", "completion": "output"}
    assert len(read(tmp_path, {"history": "What was said.", "output": "b"}, columns=columns).train) == 1


@pytest.mark.parametrize("weight", [{"weight": 0}, {"train": False}])
def test_where_everything_is_learned_a_question_that_is_not_to_be_is_refused(tmp_path, weight):
    with pytest.raises(UserError, match=f"a message whose '{next(iter(weight))}' is not .*, and it would be learned"):
        read(tmp_path, chat({**ASK, **weight}, ANSWER), train_on="all")
    assert len(read(tmp_path, chat({**ASK, "train": True}, ANSWER), train_on="all").train) == 1


def test_a_text_called_history_is_a_field_like_others(tmp_path):
    inputs = read(tmp_path, {"question": "When?", "answer": "Then.", "history": "US history 101"})
    assert inputs.unread["the data"] == {"history": 1}


def test_a_part_that_is_no_text_is_refused_by_its_type(tmp_path):
    parts = [{"type": "reasoning", "text": "secret"}, {"type": "text", "text": "Hello."}]
    with pytest.raises(UserError, match="parts of the type reasoning, and only text is read"):
        read(tmp_path, chat(ASK, {**ANSWER, "content": parts}))
    assert len(read(tmp_path, chat(ASK, {**ANSWER, "content": [{"text": "a"}, *parts[1:]]})).train) == 1


HARMLESS = {"tool_calls": None, "function_call": {}, "reasoning_content": "", "weight": 1, "train": True}


@pytest.mark.parametrize(
    "row",
    [
        chat({**ASK, "weight": 0, "train": False}, {**ANSWER, **HARMLESS}, tools=[], functions="[]"),
        as_sharegpt(chat({**ASK, "train": False}, {**ANSWER, **HARMLESS}, tools="[]")),
        chat({**ASK, "weight": 1}, {**ANSWER, "weight": "1.0", "train": "true", "thinking": False}, tools="None"),
        {"instruction": "a", "input": "", "output": "b", "history": []},
        {"instruction": "a", "output": "b", "history": None},
    ],
)
def test_what_changes_nothing_is_trained_and_not_named(tmp_path, row):
    inputs = read(tmp_path, row)
    assert len(inputs.train) == 1
    assert not any(inputs.unread.values())


def test_a_reason_is_told_once_with_the_first_place_and_how_many_there_are(tmp_path):
    weighed, called = REFUSED[5][0], chat(ASK, {**ANSWER, "tool_calls": CALL}, tools=TOOLS)
    with pytest.raises(UserError) as caught:
        read(tmp_path, chat(ASK, ANSWER), *[weighed] * 1200, called)
    weight, tools, calls = caught.value.faults
    assert weight.value.endswith("a.jsonl:2")
    assert weight.rule.endswith("not supported yet (the first of 1,200 such places)")
    assert tools.value.endswith("a.jsonl:1202")
    assert "'tools'" in tools.rule
    assert "'tool_calls'" in calls.rule


def test_two_system_texts_are_refused(tmp_path):
    row = chat({"role": "system", "content": "Be brief."}, ASK, ANSWER, system="Be long.")
    with pytest.raises(UserError, match="has a system text in column 'system', and another one in its first message"):
        read(tmp_path, row)
    assert not any(read(tmp_path, {**row, "system": "Be brief."}).unread.values())
