"""Every form of data is read, and every unreadable one names its file and line."""

import json

import pyarrow
import pyarrow.parquet
import pytest
from data_tokenizers import SHARED_DATA

from qlora_kit import demo
from qlora_kit.data import read as read_module
from qlora_kit.data import read_examples
from qlora_kit.errors import UserError

ROWS = [{"prompt": "a,b", "completion": 'say "c"\nd'}, {"prompt": "é", "completion": "2"}]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write(path, text):
    path.write_text(text, encoding="utf-8", newline="")
    return path


def pairs(examples):
    return [(example.prompt, example.completion) for example in examples]


def faults_of(source, columns=None, setting="data"):
    with pytest.raises(UserError) as caught:
        read_examples(str(source), columns or {}, setting)
    return caught.value.faults


EXPECTED = [("a,b", 'say "c"\nd'), ("é", "2")]


def test_jsonl(tmp_path):
    examples = read_examples(str(write_jsonl(tmp_path / "a.jsonl", ROWS)), {})
    assert pairs(examples) == EXPECTED
    assert [example.origin for example in examples] == [f"{tmp_path}/a.jsonl:1", f"{tmp_path}/a.jsonl:2"]


@pytest.mark.parametrize("content", [json.dumps(ROWS), json.dumps({"data": ROWS, "version": 1}, indent=2)])
def test_json(tmp_path, content):
    assert pairs(read_examples(str(write(tmp_path / "a.json", content)), {})) == EXPECTED


def test_json_file_with_one_object_a_line(tmp_path):
    path = write_jsonl(tmp_path / "a.json", ROWS)
    assert pairs(read_examples(str(path), {})) == EXPECTED


@pytest.mark.parametrize(("name", "mark"), [("a.csv", ","), ("a.tsv", "\t")])
def test_separated(tmp_path, name, mark):
    text = f'prompt{mark}completion\r\n"a,b"{mark}"say ""c""\nd"\r\n\r\né{mark}2\r\n'
    examples = read_examples(str(write(tmp_path / name, text)), {})
    assert pairs(examples) == EXPECTED
    assert [example.origin.rsplit(":")[-1] for example in examples] == ["2", "5"]


@pytest.mark.parametrize(
    ("name", "content", "place"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": "b", "text": "c"}\n', "a.jsonl:2"),
        ("a.json", '[{"messages": [{"role": "user", "role": "tool"}]}]', "a.json"),
    ],
)
def test_a_name_that_stands_twice_in_an_object_is_refused(tmp_path, name, content, place):
    """Python's json takes the last one and says nothing."""
    with pytest.raises(UserError, match=r"names '(text|role)' more than once in one object") as caught:
        read_examples(str(write(tmp_path / name, content)), {})
    assert caught.value.faults[0].value == str(tmp_path / place)


def test_long_csv_field(tmp_path):
    long = "x" * 200_000
    assert read_examples(str(write(tmp_path / "a.csv", f"text\n{long}\n")), {})[0].completion == long


def test_parquet(tmp_path):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    examples = read_examples(str(tmp_path / "a.parquet"), {})
    assert pairs(examples) == EXPECTED
    assert examples[1].origin == f"{tmp_path}/a.parquet: row 2"


def test_txt_is_a_line_an_example_and_splits_at_newlines_only(tmp_path):
    examples = read_examples(str(write(tmp_path / "a.txt", "one\u2028still one\r\n\n three \n")), {})
    assert [example.completion for example in examples] == ["one\u2028still one", " three "]
    assert [example.origin.rsplit(":")[-1] for example in examples] == ["1", "3"]


def test_byte_order_mark_is_no_part_of_the_first_column(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b"\xef\xbb\xbftext\nhello\n")
    assert read_examples(str(path), {})[0].completion == "hello"


def test_an_edited_file_is_read_anew(tmp_path):
    path = write(tmp_path / "a.txt", "old\n")
    read_examples(str(path), {})
    write(path, "new\n")
    assert read_examples(str(path), {})[0].completion == "new"


def test_folder_reads_each_file_in_its_own_shape(tmp_path):
    write_jsonl(tmp_path / "b.jsonl", ROWS)
    write(tmp_path / "a.txt", "plain\n")
    write(tmp_path / "README.md", "no data")
    write(tmp_path / ".hidden.txt", "no data")
    assert pairs(read_examples(str(tmp_path), {})) == [(None, "plain"), *EXPECTED]


def test_folder_with_splits_never_trains_on_what_is_held_out(tmp_path):
    (tmp_path / "data").mkdir()
    for split in ("train", "test", "validation"):
        write(tmp_path / "data" / f"{split}-00000-of-00001.txt", split)
    assert [e.completion for e in read_examples(str(tmp_path), {})] == ["train"]
    assert [e.completion for e in read_examples(str(tmp_path), {}, "eval_data")] == ["validation"]


def test_folder_without_train_in_a_name_leaves_the_test_file_out(tmp_path):
    write(tmp_path / "examples.txt", "some")
    write(tmp_path / "test.txt", "test")
    assert [e.completion for e in read_examples(str(tmp_path), {})] == ["some"]


def test_demo(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "train_file", lambda: write_jsonl(tmp_path / "train.jsonl", ROWS[:1]))
    monkeypatch.setattr(demo, "eval_file", lambda: write_jsonl(tmp_path / "eval.jsonl", ROWS[1:]))
    assert pairs(read_examples("demo", {})) == EXPECTED[:1]
    assert pairs(read_examples("demo", {}, "eval_data")) == EXPECTED[1:]


@pytest.mark.data
@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason=f"needs the data sets in {SHARED_DATA}")
def test_real_data_sets():
    assert len(read_examples(str(SHARED_DATA / "gsm8k"), {})) == 7473
    assert len(read_examples(str(SHARED_DATA / "gsm8k"), {}, "eval_data")) == 1319
    assert len(read_examples(str(SHARED_DATA / "seed-tasks"), {})) == 175
    assert len(read_examples(str(SHARED_DATA / "sst2" / "dev.tsv"), {})) == 872  # it has no header


# ---------------------------------------------------------------------------------------- what cannot be read


def test_malformed_lines_are_named_all_at_once_and_counted(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "fine"}\n' + "{broken\n" * 7 + '["list"]\n')
    faults = faults_of(path, setting="eval_data")
    assert [fault.value for fault in faults] == [*(f"{path}:{line}" for line in range(2, 7)), str(path)]
    assert all(fault.setting == "eval_data" for fault in faults)
    assert "8 faulty places" in faults[-1].rule


@pytest.mark.parametrize(
    ("name", "content", "place"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', ":2"),
        ("a.jsonl", b'{"text": "a"}\n[1]\n', ":2"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\\ud800"}\n', ":2"),
        ("a.jsonl", b'{"text": "a"}\n{"text": null}\n', ":2"),
        ("a.jsonl", b'{"text": "a"}\n{"other": "b"}\n', ":2"),
        ("a.jsonl", b'{"text": "a"}\n' + b"[" * 100_000 + b"\n", ":2"),
        ("a.json", b'[{"text": "a"},\n{"text": ]', ":2"),
        ("a.json", b'{"text": "a"}', ""),
        ("a.json", b'[{"text": "a"}, 3]', ": record 2"),
        ("a.csv", b"text,label\na,1\nb\n", ":3"),
        ("a.csv", b'text\n"a\nb"\n"open\n\n', ":4"),
        ("a.csv", b'text\na\n"b"c\nd\n', ":3"),
        ("a.csv", b"text,text\na,b\n", ":1"),
        ("a.txt", b"a\n\nb\n\xc3\n", ":4"),
        ("a.parquet", b"not parquet", ""),
    ],
)
def test_unreadable_place_is_named(tmp_path, name, content, place):
    path = tmp_path / name
    path.write_bytes(content)
    assert [fault.value for fault in faults_of(path)] == [f"{path}{place}"]


@pytest.mark.parametrize(
    ("name", "content"), [("a.jsonl", "\n\n"), ("a.json", "[]"), ("a.csv", "text\n"), ("a.txt", "")]
)
def test_empty_data(tmp_path, name, content):
    (fault,) = faults_of(write(tmp_path / name, content))
    assert fault.rule == "has no examples"


def test_missing_file_suggests_the_near_one(tmp_path):
    write(tmp_path / "train.jsonl", "{}")
    (fault,) = faults_of(tmp_path / "trian.jsonl")
    assert fault.rule == "is no such file or folder"
    assert fault.remedy == f"Did you mean {tmp_path}/train.jsonl?"


def test_unknown_kind_of_file(tmp_path):
    (fault,) = faults_of(write(tmp_path / "a.xlsx", "x"))
    assert "jsonl" in fault.rule


def test_folder_without_data(tmp_path):
    (fault,) = faults_of(tmp_path)
    assert "folder without data files" in fault.rule


# -------------------------------------------------------------------------------------------------------- hub


def test_unreachable_hub_is_said_at_once(monkeypatch):
    import huggingface_hub

    def no_network(self, repo, timeout):
        assert timeout <= 5
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", no_network)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    (fault,) = faults_of("owner/name")
    assert "the hub cannot be reached" in fault.rule


def test_offline_without_a_cached_copy(monkeypatch):
    import datasets
    import huggingface_hub

    def not_cached(repo, config):
        raise ConnectionError("offline")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets, "get_dataset_split_names", not_cached)
    (fault,) = faults_of("owner/name:main")
    assert "cannot be loaded from the hub" in fault.rule


def test_hub_data_set_is_read_by_split(monkeypatch):
    import datasets

    splits = {split: datasets.Dataset.from_list([{"text": split}]) for split in ("test", "train")}
    monkeypatch.setattr(read_module, "_check_reachable", lambda *arguments: None)
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda repo, config: list(splits))
    monkeypatch.setattr(datasets, "load_dataset", lambda repo, config, split: splits[split])
    (example,) = read_examples("owner/name:main", {})
    assert (example.completion, example.origin) == ("train", "owner/name:main: train row 1")
    assert read_examples("owner/name", {}, "eval_data")[0].completion == "test"
    del splits["test"]
    (fault,) = faults_of("owner/name", setting="eval_data")
    assert "eval_fraction" in fault.remedy
