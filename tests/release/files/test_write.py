"""Safetensors files: written as a stream, and read without the library; each side against the library."""

from __future__ import annotations

import json
import string
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from qlora_kit.release.files.read import (
    DTYPES,
    INDEX_FILE,
    BadFileError,
    Checkpoint,
    check_index,
    read_header,
    weight_files,
)
from qlora_kit.release.files.write import ITEM_BYTES, ShardWriter, TensorPlan, index_of, plan_shards, writing

SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)
NAMES = st.text(string.ascii_letters + "._é", min_size=1, max_size=12).filter(lambda name: name != "__metadata__")
PLANS = st.lists(
    st.builds(TensorPlan, NAMES, st.sampled_from(sorted(DTYPES)), SHAPES),
    min_size=1,
    max_size=12,
    unique_by=lambda plan: plan.name,
)


def content_of(plan: TensorPlan) -> torch.Tensor:
    dtype = getattr(torch, DTYPES[plan.dtype])
    draw = torch.Generator().manual_seed(len(plan.name))
    noise = torch.randint(0, 2 if plan.dtype == "BOOL" else 100, plan.shape, generator=draw)
    return noise.to(dtype)


@settings(max_examples=60, deadline=None)
@given(PLANS, st.integers(1, 300))
def test_any_tensors_are_shared_out_written_and_read_again(tmp_path_factory, plans, limit_bytes):
    shards = plan_shards(plans, limit_bytes)
    assert sorted(name for shard in shards for name in shard.tensors) == sorted(plan.name for plan in plans)
    for shard in shards:
        held = sum(plan.n_bytes for plan, _ in shard.tensors.values())
        assert held <= limit_bytes or len([p for p, _ in shard.tensors.values() if p.n_bytes]) == 1
        assert all(place % ITEM_BYTES[plan.dtype] == 0 for plan, place in shard.tensors.values())  # aligned
    folder = tmp_path_factory.mktemp("shards")
    with writing(folder, shards) as writer:
        for plan in reversed(plans):  # in any order
            values = content_of(plan).reshape(-1)
            half = len(values) // 2
            writer.write(plan.name, values[:half])
            writer.write(plan.name, values[half:], half)
    whole = {plan.name: content_of(plan).reshape(-1).view(torch.uint8).numpy() for plan in plans}
    assert writer.checksums == {name: zlib.crc32(values) for name, values in whole.items()}
    found = {name: value for shard in shards for name, value in load_file(folder / shard.name).items()}
    ours = Checkpoint.open([folder / shard.name for shard in shards])
    for plan in plans:
        assert torch.equal(found[plan.name], content_of(plan))
        assert torch.equal(ours.read(plan.name), content_of(plan))
    assert (folder / INDEX_FILE).exists() == (len(shards) > 1)
    if len(shards) > 1:
        assert json.loads((folder / INDEX_FILE).read_text()) == index_of(shards)
        assert weight_files(folder) == sorted(folder / shard.name for shard in shards)


def test_what_the_library_writes_is_read_as_it_is(tmp_path):
    tensors = {"a": torch.randn(3, 4), "b": torch.arange(5), "c": torch.randn(2, 2).bfloat16(), "d": torch.tensor(3.0)}
    save_file(tensors, tmp_path / "x.safetensors", {"format": "pt"})
    ours = Checkpoint.open([tmp_path / "x.safetensors"])
    assert all(torch.equal(ours.read(name), value) for name, value in tensors.items())
    assert torch.equal(ours.read_elements("a", 5, 4), tensors["a"].reshape(-1)[5:9])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_damaged_file_is_refused_or_the_same(tmp_path_factory, data):
    """Cut off anywhere, or with a byte of its header changed: an error of ours, or nothing that matters."""
    file = tmp_path_factory.mktemp("damaged") / "x.safetensors"
    save_file({"a": torch.zeros(3, 4), "b": torch.ones(5)}, file)
    content = file.read_bytes()
    header_end = 8 + int.from_bytes(content[:8], "little")
    if data.draw(st.booleans()):
        file.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
        with pytest.raises(BadFileError):
            read_header(file)
        return
    place = data.draw(st.integers(0, header_end - 1))
    file.write_bytes(content[:place] + bytes([data.draw(st.integers(0, 255))]) + content[place + 1 :])
    try:
        found = read_header(file)
    except BadFileError:
        return
    assert sum(entry.n_bytes for entry in found.values()) == len(content) - header_end


@pytest.mark.parametrize(
    "header",
    [
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},  # too short for its shape
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}},  # a gap before it
        {"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}},
        {"a": {"dtype": "F8_E4M3", "shape": [8], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [1 << 62, 1 << 62], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [2]}},
        {"a": [1]},
        {  # one over the other
            "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
            "b": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
        },
        [],
    ],
)
def test_headers_that_lie_are_refused(tmp_path, header):
    text = json.dumps(header).encode()
    (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(BadFileError):
        read_header(tmp_path / "x.safetensors")


TRICKS = [
    "../x.safetensors",
    "/etc/x.safetensors",
    "a/b.safetensors",
    "..",
    "",
    ".x.safetensors",
    "x.bin",
    "a\\b.safetensors",
    None,
    3,
]


@pytest.mark.parametrize("name", TRICKS)
def test_an_index_that_leads_out_of_its_folder_is_refused(tmp_path, name):
    save_file({"a": torch.zeros(2)}, tmp_path.parent / "x.safetensors")
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(BadFileError, match="not a safetensors file in its folder"):
        weight_files(tmp_path)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=20))
def test_a_name_that_an_index_may_use_is_never_a_path(name):
    try:
        check_index({"a": name})
    except BadFileError:
        return
    assert Path(name).name == name
    assert (Path("/folder") / name).resolve().parent == Path("/folder")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": []}', '{"weight_map": 3}'])
def test_an_index_that_is_none_is_refused(tmp_path, content):
    (tmp_path / INDEX_FILE).write_text(content)
    with pytest.raises(BadFileError, match="is not an index"):
        weight_files(tmp_path)


def test_an_index_must_agree_with_its_files(tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "1.safetensors")
    index = tmp_path / INDEX_FILE
    index.write_text(json.dumps({"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}))
    with pytest.raises(BadFileError, match=r"files that are missing: 2\.safetensors"):
        weight_files(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "1.safetensors", "b": "1.safetensors"}}))
    with pytest.raises(BadFileError, match=r"not in the files that the index names: b \(1\.safetensors\)"):
        weight_files(tmp_path)
    save_file({"a": torch.zeros(2), "c": torch.zeros(1)}, tmp_path / "2.safetensors")
    with pytest.raises(BadFileError, match=r"a is in both 1\.safetensors and 2\.safetensors"):
        Checkpoint.open([tmp_path / "1.safetensors", tmp_path / "2.safetensors"])


def test_no_tensor_is_written_beyond_its_place(tmp_path):
    with writing(tmp_path, plan_shards([TensorPlan("a", "F32", (3,)), TensorPlan("b", "F32", (3,))])) as writer:
        writer.write("a", torch.zeros(1))
        with pytest.raises(AssertionError, match="longer than planned"):
            writer.write("a", torch.zeros(3), 1)
        with pytest.raises(AssertionError, match="a: element 2 after 1"):
            writer.write("a", torch.zeros(1), 2)
        with pytest.raises(AssertionError, match="float64"):
            writer.write("a", torch.zeros(3, dtype=torch.float64), 1)
        writer.write("a", torch.zeros(2), 1)
        writer.write("b", torch.zeros(3))


def test_a_tensor_that_is_not_all_written_is_missed(tmp_path):
    plans = [TensorPlan("a", "F32", (3,)), TensorPlan("b", "F32", (3,))]
    writer = ShardWriter(tmp_path, plan_shards(plans))
    writer.begin()
    writer.write("a", torch.zeros(3))
    writer.write("b", torch.zeros(2))
    with pytest.raises(AssertionError, match="b is not all written"):
        writer.finish()
    writer.close()
