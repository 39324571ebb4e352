"""Every shape is recognised by its columns, or mapped by hand."""

import pytest

from qlora_kit.data import Example, Message, split_examples
from qlora_kit.data.columns import examples_from
from qlora_kit.data.read import Record
from qlora_kit.errors import UserError


def records(*rows, file="f"):
    return [Record(file, f"{file}:{line}", row) for line, row in enumerate(rows, start=1)]


def examples(*rows, columns=None):
    return examples_from(records(*rows), columns or {}, "f", "data")


def faults_of(*rows, columns=None):
    with pytest.raises(UserError) as caught:
        examples(*rows, columns=columns)
    return caught.value.faults


@pytest.mark.parametrize(
    ("row", "prompt", "completion"),
    [
        ({"text": "t"}, None, "t"),
        ({"prompt": "p", "completion": "c"}, "p", "c"),
        ({"prompt": "p", "response": "c"}, "p", "c"),
        ({"instruction": "i", "input": "x", "output": "o"}, "i\n\nx", "o"),
        ({"instruction": "i", "input": "", "output": "o", "text": "all of it"}, "i", "o"),
        ({"instruction": "i", "input": None, "output": "o"}, "i", "o"),
        ({"instruction": "i", "output": "o"}, "i", "o"),
        ({"instruction": "i", "context": "x", "response": "o"}, "i\n\nx", "o"),
        ({"instruction": "i", "instances": [{"input": "x", "output": "o"}]}, "i\n\nx", "o"),
        ({"question": "q", "answer": 42}, "q", "42"),
    ],
)
def test_shape_is_recognised(row, prompt, completion):
    assert examples(row) == [Example(prompt=prompt, completion=completion, messages=None, origin="f:1")]


TURNS = [("system", "s"), ("user", "u"), ("assistant", "a"), ("user", "v"), ("assistant", "b")]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": role, "content": content} for role, content in TURNS]},
        {"messages": [{"role": r, "content": [{"type": "text", "text": c}]} for r, c in TURNS]},
        {"messages": [{"role": role, "content": content} for role, content in TURNS[1:]], "system": "s"},
        {
            "conversations": [
                {"from": {"user": "human", "assistant": "gpt"}.get(role, role), "value": content}
                for role, content in TURNS
            ]
        },
    ],
)
def test_conversation_is_recognised(row):
    messages = tuple(Message(role, content) for role, content in TURNS)
    assert examples(row) == [Example(prompt="s\nu", completion="a", messages=messages, origin="f:1")]


def test_several_instances_are_several_examples():
    row = {"instruction": "i", "instances": [{"input": "", "output": "o"}, {"output": "p"}]}
    assert [(e.prompt, e.completion, e.origin) for e in examples(row)] == [
        ("i", "o", "f:1 instance 1"),
        ("i", "p", "f:1 instance 2"),
    ]


def test_system_text_makes_a_conversation():
    (example,) = examples({"system": "s", "prompt": "p", "completion": "c"})
    assert example.messages == (Message("system", "s"), Message("user", "p"), Message("assistant", "c"))
    assert (example.prompt, example.completion) == ("p", "c")


def test_columns_are_mapped_by_hand():
    row = {"a": "p", "b": "c", "prompt": "no", "text": "no"}
    assert examples(row, columns={"prompt": "a", "completion": "b"}) == [
        Example(prompt="p", completion="c", messages=None, origin="f:1")
    ]
    assert examples(row, columns={"completion": "b"}) == [
        Example(prompt="no", completion="c", messages=None, origin="f:1")
    ]
    assert examples(row, columns={"text": "a"}) == [Example(prompt=None, completion="p", messages=None, origin="f:1")]
    chat = {"talk": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}], "about": "s"}
    (example,) = examples(chat, columns={"messages": "talk", "system": "about"})
    assert [message.content for message in example.messages] == ["s", "u", "a"]


def test_mapped_column_missing_in_a_record_is_not_taken_from_elsewhere():
    (fault,) = faults_of({"a": "p", "completion": "c"}, {"prompt": "no", "completion": "c"}, columns={"prompt": "a"})
    assert fault.value == "f:2"


def test_unknown_columns_are_listed_with_the_known_shapes():
    (fault,) = faults_of({"foo": "x", "bar": "y"})
    assert "'foo', 'bar'" in fault.rule
    assert "question/answer" in fault.remedy
    assert "columns" in fault.remedy


@pytest.mark.parametrize(
    ("columns", "values"),
    [
        ({"prompt": "nope", "completion": "gone"}, ["prompt=nope", "completion=gone"]),
        ({"prompt": "a"}, ["completion=completion"]),
        ({"question": "a", "answer": "a"}, ["question=a", "answer=a"]),
        ({"text": "a", "prompt": "a"}, ["text=a,prompt=a"]),
        ({"system": "a"}, ["system=a"]),
    ],
)
def test_wrong_mapping(columns, values):
    faults = faults_of({"a": "x"}, columns=columns)
    assert [(fault.setting, fault.value) for fault in faults] == [("columns", value) for value in values]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": []},
        {"messages": "hello"},
        {"messages": ["hello"]},
        {"messages": [{"role": "wizard", "content": "x"}]},
        {"messages": [{"role": ["user"], "content": "x", "weight": 0}]},
        {"messages": [{"role": "user", "content": None}]},
        {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
        {"messages": [{"role": "assistant", "content": "x"}]},
        {"instruction": "i", "instances": []},
        {"instruction": "i", "instances": ["x"]},
        {"instruction": "i", "instances": [{"input": "x"}]},
        {"prompt": "p", "completion": ["c"]},
        {"prompt": "p", "completion": True},
    ],
)
def test_record_that_does_not_fit_is_named(row):
    (fault,) = faults_of(row)
    assert fault.value == "f:1"


# ------------------------------------------------------------------------------------------------------ splits


def numbered(count):
    return [
        Example(prompt=None, completion=str(number), messages=None, origin=f"f:{number}") for number in range(count)
    ]


def test_split_is_a_partition_that_the_seed_decides():
    whole = numbered(50)
    kept, held_out = split_examples(whole, 0.1, seed=1)
    assert len(held_out) == 5
    assert sorted(kept + held_out, key=whole.index) == whole
    assert split_examples(whole, 0.1, seed=1) == (kept, held_out)
    assert split_examples(whole, 0.1, seed=2)[1] != held_out


def test_split_edges():
    assert split_examples(numbered(3), 0.0, seed=0) == (numbered(3), [])
    assert len(split_examples(numbered(3), 0.01, seed=0)[1]) == 1
    with pytest.raises(UserError, match="eval_fraction = "):
        split_examples(numbered(1), 0.5, seed=0)
