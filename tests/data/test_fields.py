"""Every field of a record is read or named, whatever task reads it."""

from __future__ import annotations

import io
import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from classifiers import save_base as save_classifier
from rich.console import Console
from text_pairs import save_base as save_both

from qlora_kit import AdapterConfig, BaseConfig, DataConfig, OptimConfig, RunConfig, data, train
from qlora_kit.cli.main import main
from qlora_kit.cli.preview import preview
from qlora_kit.data import read
from qlora_kit.data.fields import Fields
from qlora_kit.runs.inputs import DATA, HELD_OUT, read_inputs
from qlora_kit.runs.messages import unread_lines
from qlora_kit.tasks import registry
from qlora_kit.tasks.task import Source


def save(file, rows):
    file.write_text("\n".join(map(json.dumps, rows)))
    return str(file)


def unread_of(source, model="demo", eval_data=None, columns=None):
    settings = DataConfig(data=str(source), eval_data=eval_data, columns=columns or {}, seq_len=64)
    return read_inputs(RunConfig(base=BaseConfig(model=str(model)), data=settings)).unread


def test_only_what_is_looked_up_is_read():
    reads = {}
    fields = Fields({"a": 1, "b": [{"c": 1, "d": 2}, {"c": 3, "e": None}], "f": {"g": {"h": 1}}, "i": ""}, reads)
    assert "a" in fields
    assert list(fields) == ["a", "b", "f", "i"]
    assert fields.unread() == {"a", "b", "f"}
    assert [one["c"] for one in fields["b"]] == [1, 3]
    assert fields["f"].get("none") is None
    assert fields.unread() == {"a", "b.d", "f.g"}
    assert fields.with_value("a", 2)["a"] == 2
    assert fields.unread() == Fields({"b": [{"d": 2}], "f": {"g": 1}}, reads).unread() == {"b.d", "f.g"}


@pytest.mark.parametrize("nothing", [None, "", " ", [], {}, "[]", {"a": None, "b": [None, ""]}, float("nan")])
def test_what_holds_nothing_is_not_missed(nothing):
    assert not Fields({"a": nothing}, {}).unread()
    assert Fields({"a": 0, "b": False, "c": [0], "d": {"e": "x"}}, {}).unread() == {"a", "b", "c", "d"}


CHAT = [{"role": "user", "content": "Hi", "name": "ann"}, {"role": "assistant", "content": "Ho", "at": 3}]
SHAREGPT = [{"from": "human", "value": "a", "id": 1}, {"from": "gpt", "value": "b"}]
TALK = {"messages": "talk", "system": "about"}
PARTS = [{"role": "user", "content": [{"type": "text", "text": "Hi", "cache": 1}]}, CHAT[1]]


@pytest.mark.parametrize(
    ("row", "columns", "unread"),
    [
        ({"text": "a", "meta": {"source": "x"}}, {}, ["meta"]),
        ({"prompt": "a", "completion": "b", "id": 0}, {}, ["id"]),
        ({"instruction": "a", "output": "b", "context": "c"}, {}, ["context"]),
        ({"instruction": "a", "response": "b", "input": "c", "context": "d"}, {}, ["input"]),
        ({"instruction": "a", "instances": [{"input": "b", "output": "c", "d": 1}]}, {}, ["instances.d"]),
        ({"messages": CHAT, "category": "c"}, {}, ["category", "messages.at", "messages.name"]),
        ({"messages": PARTS}, {}, ["messages.at", "messages.content.cache"]),
        ({"conversations": SHAREGPT}, {}, ["conversations.id"]),
        ({"a": "p", "b": "c", "prompt": "no", "text": "no"}, {"prompt": "a", "completion": "b"}, ["prompt", "text"]),
        ({"a": "p", "b": "c", "system": "s"}, {"prompt": "a", "completion": "b"}, []),
        ({"talk": CHAT[:1] + CHAT[1:], "about": "s", "system": "t"}, TALK, ["system", "talk.at", "talk.name"]),
    ],
)
def test_texts_to_go_on_with(tmp_path, row, columns, unread):
    assert unread_of(save(tmp_path / "a.jsonl", [row] * 2), columns=columns)[DATA] == dict.fromkeys(unread, 2)


@pytest.mark.parametrize(
    ("rows", "columns", "unread"),
    [
        ([{"text": f"t{i}", "label": i % 2, "idx": i, "text_label": "x"} for i in range(4)], {}, ["idx", "text_label"]),
        ([{"sentence1": "a", "sentence2": "b", "text": "c", "label": i} for i in range(4)], {}, ["text"]),
        ([{"t": "a", "l": i, "label": 3} for i in range(4)], {"text": "t", "label": "l"}, ["label"]),
        ([{"text": "abc", "label": i, "head": [0, 1]} for i in range(4)], {}, ["head"]),
        ([{"tokens": ["a"], "tags": [f"B-{i}"], "pos": ["N"]} for i in range(4)], {}, ["pos"]),
        (
            [
                {
                    "title": "a",
                    "paragraphs": [
                        {
                            "context": "b c",
                            "n": 1,
                            "qas": [
                                {
                                    "question": "q",
                                    "id": "1",
                                    "answers": [{"text": "b", "answer_start": 0, "by": 2}],
                                    "plausible_answers": [{"text": "c", "answer_start": 2}],
                                }
                            ],
                        }
                    ],
                }
            ]
            * 4,
            {},
            ["paragraphs.n", "paragraphs.qas.answers.by", "paragraphs.qas.plausible_answers", "title"],
        ),
    ],
)
def test_labels_tags_and_answers(tmp_path, rows, columns, unread):
    base = save_classifier(tmp_path / "base", "bert")
    assert unread_of(save(tmp_path / "a.jsonl", rows), base, columns=columns)[DATA] == dict.fromkeys(unread, 4)


@pytest.mark.parametrize(
    ("row", "columns", "unread"),
    [
        ({"source": "a", "target": "b", "prompt": "c"}, {}, ["prompt"]),
        ({"document": "a", "summary": "b", "translation": "c"}, {}, ["translation"]),
        ({"translation": {"en": "a", "de": "b"}, "id": 1}, {}, ["id"]),
        (
            {"translation": {"en": "a", "de": "b", "fr": "c"}},
            {"source": "translation.en", "target": "translation.de"},
            ["translation.fr"],
        ),
        ({"instruction": "a", "input": "b", "output": "c", "d": 1}, {}, ["d"]),
    ],
)
def test_sources_and_targets(tmp_path, row, columns, unread):
    base = save_both(tmp_path / "base", "t5-gated")
    assert unread_of(save(tmp_path / "a.jsonl", [row] * 2), base, columns=columns)[DATA] == dict.fromkeys(unread, 2)


def test_columns_of_a_conll_file_between_word_and_tag(tmp_path):
    (tmp_path / "a.conll").write_text("Ann NNP B-NP B-person\nsings VB B-VP O\n\nYes UH O O\n")
    base = save_classifier(tmp_path / "base", "bert")
    assert unread_of(tmp_path / "a.conll", base)[DATA] == {"column 2": 2, "column 3": 2}


def test_files_and_held_out_data_count_for_themselves(tmp_path):
    (tmp_path / "in").mkdir()
    save(tmp_path / "in" / "a.jsonl", [{"prompt": "a", "completion": "b", "text": "c"}])
    save(tmp_path / "in" / "b.jsonl", [{"text": "c", "id": 1}, {"text": "d", "id": None}])
    held_out = save(tmp_path / "held.jsonl", [{"text": "c", "n": 1}])
    assert unread_of(tmp_path / "in", eval_data=held_out) == {DATA: {"id": 1, "text": 1}, HELD_OUT: {"n": 1}}


def test_nulls_that_a_parquet_file_fills_in_are_not_missed(tmp_path):
    turns = [[{"role": "user", "content": "a", "tool_calls": [1]}, {"role": "assistant", "content": "b"}]]
    turns[0][0]["tool_calls"] = None
    schema = pyarrow.list_(
        pyarrow.struct(
            [
                ("role", pyarrow.string()),
                ("content", pyarrow.string()),
                ("tool_calls", pyarrow.list_(pyarrow.struct([("name", pyarrow.string())]))),
                ("meta", pyarrow.struct([("source", pyarrow.string())])),
            ]
        )
    )
    table = pyarrow.table({"messages": pyarrow.array(turns, schema), "id": [None], "lang": ["en"]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert unread_of(tmp_path / "a.parquet")[DATA] == {"lang": 1}


def test_a_data_set_of_the_hub_is_no_other(monkeypatch):
    rows = datasets.Dataset.from_list([{"text": "a", "id": 1, "tags": None}, {"text": "b", "id": 2, "tags": None}])
    monkeypatch.setattr(read, "_check_reachable", lambda *arguments: None)
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda repo, config: ["train"])
    monkeypatch.setattr(datasets, "load_dataset", lambda repo, config, split: rows)
    assert unread_of("owner/name")[DATA] == {"id": 2}


QUESTION = {"question": "q", "context": "b c", "answers": {"text": ["b"], "answer_start": [0]}}


@pytest.mark.parametrize(
    ("task", "row", "columns"),
    [
        ("text-classification", {"text": "a", "label": "x"}, {}),
        ("text-classification", {"text": "a", "l": "x"}, {"text": "text", "label": "l"}),
        ("token-classification", {"tokens": ["a"], "ner_tags": ["O"]}, {}),
        ("question-answering", {**QUESTION, "is_impossible": False}, {}),
        ("text2text-generation", {"source": "a", "target": "b"}, {}),
        ("text2text-generation", {"translation": {"en": "a", "de": "b"}}, {}),
        ("text2text-generation", {"x": {"a": "a", "b": "b"}}, {"source": "x.a", "target": "x.b"}),
        ("text2text-generation", {"prompt": "a", "completion": "b"}, {}),
    ],
)
def test_who_asks_is_not_told_that_answers_are_not_read(tmp_path, task, row, columns):
    rows = data.read_rows(save(tmp_path / "a.jsonl", [{**row, "note": 1}]), columns)
    assert registry.task_named(task).read_unanswered(Source(records=rows, name="a.jsonl", columns=columns))
    assert data.unread_fields(rows) == {"note": 1}


def test_a_prompt_is_asked_without_its_answer(tmp_path):
    for row in ({"prompt": "a", "completion": "b"}, {"question": "a", "answer": "b"}, {"prompt": "a"}):
        rows = data.read_rows(save(tmp_path / "a.jsonl", [{**row, "note": 1}]), {})
        assert data.prompts_from(rows, {}, "a.jsonl", "data")
        assert data.unread_fields(rows) == {"note": 1}


# ------------------------------------------------------------------------------------------------- what is said


@pytest.mark.parametrize("command", ["generate", "eval"])
def test_who_asks_and_who_scores_hears_of_it(tmp_path, capsys, command):
    rows = save(tmp_path / "a.jsonl", [{"prompt": "a", "completion": "b", "id": n} for n in range(3)])
    more = ["--max-new-tokens", "2"] if command == "generate" else ["--exact-match", "1"]
    main([command, "--model", "demo", "--device", "cpu", "--data", rows, *more])
    assert "\nnot read of the data: id (3 records)\n" in capsys.readouterr().err


def test_a_file_beside_one_named_train_is_named(tmp_path):
    for name in ("train", "extra", "test"):
        save(tmp_path / f"{name}.jsonl", [{"prompt": name, "completion": "b"}])
    assert unread_of(tmp_path)[f"the folder {tmp_path}"] == {"extra.jsonl": 0}
    assert unread_lines({"the folder x": {"extra.jsonl": 0}}) == ["not read of the folder x: extra.jsonl"]
    (tmp_path / "train.jsonl").rename(tmp_path / "one.jsonl")
    assert unread_of(tmp_path).keys() == {DATA, HELD_OUT}


def test_the_line_is_short():
    fields = {"id": 2000, "x" * 50: 1, **{f"f{n}": 1 for n in range(9)}}
    (line,) = unread_lines({DATA: fields, HELD_OUT: {}})
    assert line == (
        f"not read of the data: id (2,000 records), {'x' * 39}… (1 record), "
        + ", ".join(f"f{n} (1 record)" for n in range(6))
        + ", and 3 more"
    )


def test_a_run_and_a_preview_name_it_at_once(tmp_path, capsys):
    rows = save(tmp_path / "a.jsonl", [{"prompt": "a", "completion": "b", "id": n} for n in range(3)])
    said = "not read of the data: id (3 records)\nnot read of the held-out data: id (3 records)\n"
    console = Console(file=io.StringIO(), width=200)
    config = RunConfig(
        base=BaseConfig(model="demo", device="cpu"),
        adapter=AdapterConfig(r=4),
        data=DataConfig(data=rows, eval_data=rows),
        optim=OptimConfig(max_steps=1),
        out=str(tmp_path / "run"),
        preflight=False,
    )
    train(config, console)
    assert console.file.getvalue().splitlines(keepends=True)[1:3] == said.splitlines(keepends=True)
    preview(config, (1,))
    shown = capsys.readouterr().out
    assert all(line in shown for line in said.splitlines())
