"""The proof on the whole model: what it finds, what it refuses, and how it chooses."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch
from families import save_tiny
from releases import QUIET, make_adapter
from safetensors.torch import load_file, save_file

from qlora_kit import AdapterConfig, BaseConfig, DataConfig, OptimConfig, RunConfig, UserError, train
from qlora_kit.release import delta, merge, stream
from qlora_kit.release.files.write import ShardWriter
from qlora_kit.release.proof import verify
from qlora_kit.release.proof.compare import compare
from qlora_kit.release.request import Request


@pytest.fixture(scope="module")
def data_file(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("data") / "train.jsonl"
    lines = [json.dumps({"prompt": f"add {i} and {i + 1}", "completion": f"{2 * i + 1}"}) for i in range(12)]
    file.write_text("\n".join(lines))
    return file


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data_file) -> Path:
    """A run of a few steps on a tiny GPT-2, in a folder with its base beside it."""
    folder = tmp_path_factory.mktemp("work")
    save_tiny(folder / "base", "gpt2")
    config = RunConfig(
        base=BaseConfig(model=str(folder / "base"), device="cpu"),
        adapter=AdapterConfig(r=4),
        data=DataConfig(data=str(data_file), eval_fraction=0.25, seq_len=64),
        optim=OptimConfig(lr=2e-2, max_steps=4),
        out=str(folder / "run"),
        preflight=False,
    )
    train(config, QUIET)
    return folder


def request_of(folder: Path, out: Path, **settings) -> Request:
    record = json.loads((folder / "run" / "run.json").read_text())["settings"]
    request = Request(
        base=BaseConfig(**record["base"]),
        adapters=((str(folder / "run" / "adapter"), 1.0),),
        run=str(folder / "run"),
        out=str(out),
        data=DataConfig(**record["data"]),
    )
    return dataclasses.replace(request, **settings)


@pytest.mark.parametrize(
    ("family", "into", "bits"),
    [("gpt2", "trained", 4), ("llama", "trained", 8), ("gpt2", "trained", 16), ("gpt2", "original", 4)],
)
def test_an_fp32_release_is_the_live_model_to_the_last_digits(tmp_path, in_this_process, family, into, bits):
    base = save_tiny(tmp_path / "base", family)
    adapter = make_adapter(base, tmp_path / "adapter", bits)
    request = Request(
        base=BaseConfig(model=str(base), bits=bits),
        adapters=((str(adapter), 1.0),),
        out=str(tmp_path / "out"),
        into=into,
        dtype="fp32",
    )
    found = merge.merge(request, QUIET).report["proof"]["model"]
    assert found["exact"]["relative_max"] < 1e-4
    assert found["exact"]["agreement"] == 1.0
    assert found["answer"]["same"]
    assert found["source"] == "a built-in text"
    assert found["blocks"] == "all"
    if into == "original" and bits < 16:
        assert found["from_live"]["kl"] > 1e-4  # another base


def test_several_adapters_and_tensors_trained_whole_are_proven_too(tmp_path, in_this_process):
    base = save_tiny(tmp_path / "base", "llama")
    first = make_adapter(base, tmp_path / "a", modules_to_save=["lm_head"], use_rslora=True)
    second = make_adapter(base, tmp_path / "b", seed=1, target_modules=["q_proj"])
    chosen = ((str(first), 0.6), (str(second), 0.5))
    request = Request(base=BaseConfig(model=str(base)), adapters=chosen, out=str(tmp_path / "out"), dtype="fp32")
    found = merge.merge(request, QUIET).report["proof"]["model"]
    assert found["exact"]["relative_max"] < 1e-4


@pytest.mark.parametrize(("family", "targets"), [("llama", ["q_proj", "embed_tokens"]), ("gpt2", ["c_attn"])])
def test_adapters_that_hold_copies_of_the_embeddings(tmp_path, in_this_process, family, targets):
    """PEFT saves them along when asked to; they replace the base's, which here changes nothing and unties nothing."""
    base = save_tiny(tmp_path / "base", family)
    adapter = make_adapter(base, tmp_path / "a", target_modules=targets, save_embedding_layers=True)
    assert any("lora_" not in name for name in load_file(adapter / "adapter_model.safetensors"))
    request = Request(
        base=BaseConfig(model=str(base)), adapters=((str(adapter), 1.0),), out=str(tmp_path / "out"), dtype="fp32"
    )
    report = merge.merge(request, QUIET).report
    assert report["proof"]["model"]["exact"]["relative_max"] < 1e-4
    assert report["release"]["untied"] is False


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_16_bit_release_differs_by_the_rounding_of_its_dtype(finished, tmp_path, in_this_process, dtype):
    request = request_of(finished, tmp_path / "out", dtype=dtype)
    result = merge.merge(request, QUIET)
    found = result.report["proof"]["model"]
    assert found["limit"]["relative_max"] == pytest.approx(1e-4 + 0.05 * found["rounding"]["relative_max"])
    assert found["rounded"]["relative_max"] <= found["limit"]["relative_max"] < found["exact"]["relative_max"]
    assert f"rounded to {dtype}" in found["limit"]["why"]
    assert "held-out share" in found["source"]
    report = result.report
    assert report["base"]["is_that_of_the_run"] is True
    assert report["runs"][0]["steps"] == 4
    assert (result.folder / "merge_report.json").is_file()
    card = (result.folder / "README.md").read_text()
    assert report["base"]["hash"] in card
    assert report["command"] in card


def test_packing_into_nf4_says_what_it_costs(finished, tmp_path, in_this_process):
    found = merge.merge(request_of(finished, tmp_path / "out", format="nf4"), QUIET).report["proof"]["model"]
    assert found["exact"]["kl"] > 1e-4
    assert "quantized to nf4" in found["limit"]["why"]
    assert found["rounded"]["relative_max"] <= found["limit"]["relative_max"] < found["exact"]["relative_max"]


def misread(change):
    """`delta.read_change`, with another change for some of the adapter's layers."""
    original = delta.read_change

    def read(adapter, factor):
        found = original(adapter, factor)
        return dataclasses.replace(found, scale=found.scale * change(factor.a))

    return read


@pytest.mark.parametrize("format_", ["nf4", "dense"])
@pytest.mark.parametrize(
    "change",
    [
        lambda name: 2.0 if "h.1.attn.c_attn" in name else 1.0,
        lambda name: -1.0 if "h.1.attn.c_attn" in name else 1.0,
        lambda name: 0.5,
        lambda name: 1.05,
        lambda name: 1e-3,
    ],
    ids=["one doubled", "one the other way", "all halved", "all a little more", "next to nothing"],
)
def test_a_merge_that_adds_something_else_is_refused(finished, tmp_path, in_this_process, monkeypatch, change, format_):
    monkeypatch.setattr("qlora_kit.release.stream.delta.read_change", misread(change))
    with pytest.raises(UserError, match="failed its proof: its logits differ"):
        merge.merge(request_of(finished, tmp_path / "out", format=format_, dtype="bf16"), QUIET)


def test_rows_that_are_left_out_are_missed(finished, tmp_path, in_this_process, monkeypatch):
    original = stream.merged_pieces
    monkeypatch.setattr(stream, "merged_pieces", lambda *args: list(original(*args))[:-1])
    with pytest.raises(AssertionError, match="0 of"):
        merge.merge(request_of(finished, tmp_path / "out"), QUIET)
    assert not (tmp_path / "out").exists()


def test_a_byte_that_the_disk_changes_is_found(finished, tmp_path, in_this_process, monkeypatch):
    original = ShardWriter.finish

    def finish(writer):
        original(writer)
        file = writer.folder / writer.shards[0].name
        with file.open("r+b") as stream_:
            stream_.seek(-3, os.SEEK_END)
            last = stream_.read(1)
            stream_.seek(-3, os.SEEK_END)
            stream_.write(bytes([last[0] ^ 1]))

    monkeypatch.setattr(ShardWriter, "finish", finish)
    with pytest.raises(UserError, match="does not hold what was written of"):
        merge.merge(request_of(finished, tmp_path / "out"), QUIET)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_a_base_with_what_is_no_number_is_refused(tmp_path, in_this_process, dtype):
    base = save_tiny(tmp_path / "base", "llama")
    tensors = load_file(base / "model.safetensors")
    tensors = {name: value.bfloat16() for name, value in tensors.items()}
    tensors["model.embed_tokens.weight"][7] = float("nan")
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    adapter = make_adapter(save_tiny(tmp_path / "other", "llama"), tmp_path / "adapter")
    request = Request(
        base=BaseConfig(model=str(base)), adapters=((str(adapter), 1.0),), out=str(tmp_path / "out"), dtype=dtype
    )
    with pytest.raises(UserError, match=r"not finite in model\.embed_tokens\.weight"):
        merge.merge(request, QUIET)


def test_a_release_that_overflows_when_it_is_served_is_refused(tmp_path, in_this_process):
    """Its weights fit fp16, what it computes does not."""
    base = save_tiny(tmp_path / "base", "llama")
    tensors = load_file(base / "model.safetensors")
    for name, value in tensors.items():
        if "mlp.up_proj" in name or "mlp.gate_proj" in name:
            tensors[name] = value * (3e3 / value.abs().max())
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    adapter = make_adapter(base, tmp_path / "adapter", 16)
    request = Request(
        base=BaseConfig(model=str(base), bits=16),
        adapters=((str(adapter), 1.0),),
        out=str(tmp_path / "out"),
        dtype="fp16",
        into="original",
    )
    with pytest.raises(UserError, match="dtype = 'fp16': gives logits that are not finite"):
        merge.merge(request, QUIET)


def test_another_tokenizer_in_the_release_is_refused(finished, tmp_path, in_this_process, monkeypatch):
    original = merge.write_candidate

    def write(*args):
        candidate = original(*args)
        file = candidate.folder / "tokenizer.json"
        content = json.loads(file.read_text())
        content["normalizer"] = {"type": "Lowercase"}
        file.write_text(json.dumps(content))
        return candidate

    monkeypatch.setattr(merge, "write_candidate", write)
    with pytest.raises(UserError, match="its tokenizer has another tokens of a text"):
        merge.merge(request_of(finished, tmp_path / "out"), QUIET)


def spoiled(change):
    """`write_candidate`, but for what `change` does to the release's tensors afterwards."""
    original = merge.write_candidate

    def write(*args):
        candidate = original(*args)
        file = candidate.folder / "model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, {"format": "pt"})
        return candidate

    return write


def transpose(tensors):
    name = "transformer.h.0.attn.c_proj.weight"  # square
    tensors[name] = tensors[name].T.contiguous()


def nudge(tensors):
    tensors["transformer.h.1.ln_1.weight"][5] *= 1.3


def lose(tensors):
    tensors.pop("transformer.h.1.mlp.c_fc.weight")


def add(tensors):
    tensors["transformer.h.7.mlp.c_fc.weight"] = torch.ones(3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (transpose, "its logits differ from the live model .* at token"),
        (nudge, "its logits differ"),
        (lose, "missing keys: transformer.h.1.mlp.c_fc.weight"),
        (add, "unexpected keys: transformer.h.7.mlp.c_fc.weight"),
    ],
)
def test_a_release_that_is_wrong_is_refused_and_nothing_is_left(
    finished, tmp_path, in_this_process, monkeypatch, change, message
):
    monkeypatch.setattr(merge, "write_candidate", spoiled(change))
    with pytest.raises(UserError, match=f"the release failed its proof: .*{message}"):
        merge.merge(request_of(finished, tmp_path / "new" / "out"), QUIET)
    assert not (tmp_path / "new").exists()


def test_where_memory_is_short_the_first_blocks_are_compared(finished, tmp_path, in_this_process, monkeypatch):
    monkeypatch.setattr(verify, "available_bytes", lambda: verify.PROCESS_BYTES + 400_000)
    result = merge.merge(request_of(finished, tmp_path / "out", dtype="fp32"), QUIET)
    found = result.report["proof"]["model"]
    assert found["blocks"] == "the first 1"
    assert found["exact"]["relative_max"] < 1e-4
    assert "the first 1 blocks" in (result.folder / "README.md").read_text()


def test_the_better_base_is_released(finished, tmp_path, in_this_process, data_file):
    """On its own training data the adapter does best on the base that it saw; the score of the other is kept."""
    request = request_of(finished, tmp_path / "out", into="best", data=DataConfig(data=str(data_file)), data_given=True)
    result = merge.merge(request, QUIET)
    choice, scores = result.report["choice"], result.report["choice"]["scores"]
    assert choice["chosen"] == min(scores, key=lambda into: scores[into]["loss"]) == result.report["release"]["into"]
    assert scores["original"]["kl"] > scores["trained"]["kl"]
    assert str(data_file) in choice["source"]
    assert {file.name for file in tmp_path.iterdir()} == {"out"}


@pytest.mark.parametrize("better", ["trained", "original"])
def test_either_base_can_win(finished, tmp_path, in_this_process, monkeypatch, better):
    losses = {"trained": 1.0, "original": 1.0, better: 0.5}
    monkeypatch.setattr(
        verify.ModelProof,
        "score",
        property(
            lambda own: {
                "loss": losses["trained" if own.from_live is None else "original"],
                **dict.fromkeys(("loss_error", "kl", "tokens"), 0),
            }
        ),
    )
    result = merge.merge(request_of(finished, tmp_path / "out", into="best"), QUIET)
    assert result.report["release"]["into"] == better


def test_comparing_logits_piece_by_piece_is_comparing_them_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("qlora_kit.release.proof.compare.PIECE_ELEMENTS", 100)
    draw = torch.Generator().manual_seed(0)
    rows = [torch.randn(length, 40, generator=draw) for length in (7, 12)]
    others = [row + 0.1 * torch.randn(row.shape, generator=draw) for row in rows]
    others[1][3, 4] += 5
    labels = [[-100, 3, 4, -100, 5, 6, 7], list(range(12))]
    for name, values in (("a", rows), ("b", others)):
        save_file({f"row.{i}": value for i, value in enumerate(values)}, tmp_path / name)
    found = compare(tmp_path / "a", tmp_path / "b", labels)
    one, other = torch.cat(rows), torch.cat(others)
    assert found.where == (1, 3)
    assert found.max_difference == pytest.approx(float((one - other).abs().max()))
    assert found.mean_difference == pytest.approx(float((one - other).abs().mean()))
    assert found.norm_ratio == pytest.approx(float((one - other).norm() / one.norm()))
    assert found.scale == pytest.approx(float(one.std(correction=0)))
    assert found.agreement == pytest.approx(float((one.argmax(1) == other.argmax(1)).float().mean()))
    divergence = torch.nn.functional.kl_div(other.log_softmax(1), one.log_softmax(1), reduction="sum", log_target=True)
    assert found.kl == pytest.approx(float(divergence) / 19, rel=1e-4)
    shifted = torch.cat([torch.tensor([*marks[1:], -100]) for marks in labels])
    assert found.loss == pytest.approx(float(torch.nn.functional.cross_entropy(other, shifted)))
    assert found.reference_loss == pytest.approx(float(torch.nn.functional.cross_entropy(one, shifted)))
    each = torch.nn.functional.cross_entropy(other, shifted, reduction="none")[shifted != -100]
    assert found.supervised == len(each)
    assert found.loss_error == pytest.approx(float(each.std(correction=0)) / len(each) ** 0.5, rel=1e-4)


def test_differences_that_are_no_numbers_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr("qlora_kit.release.proof.compare.PIECE_ELEMENTS", 3)  # what comes after one must not hide it
    save_file({"row.0": torch.zeros(2, 3)}, tmp_path / "a")
    save_file({"row.0": torch.full((2, 3), float("nan"))}, tmp_path / "b")
    save_file({"row.0": torch.tensor([[0.0, float("nan"), 0.0], [1.0, 2.0, 3.0]])}, tmp_path / "c")
    for file in ("b", "c"):
        found = compare(tmp_path / "a", tmp_path / file, [[1, 1]])
        assert not found.relative_max <= 1e9
        assert not found.is_finite
    assert compare(tmp_path / "a", tmp_path / "a", [[1, 1]]).is_finite


def test_code_beside_a_base_neither_runs_nor_travels_unless_it_is_trusted(tmp_path, in_this_process):
    base = save_tiny(tmp_path / "base", "llama")
    adapter = make_adapter(base, tmp_path / "a")
    (base / "evil.py").write_text("raise RuntimeError('ran')")
    config = json.loads((base / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"}
    (base / "config.json").write_text(json.dumps(config))
    request = Request(base=BaseConfig(model=str(base)), adapters=((str(adapter), 1.0),), out=str(tmp_path / "out"))
    result = merge.merge(request, QUIET)
    assert not (result.folder / "evil.py").exists()
    assert "auto_map" not in (result.folder / "config.json").read_text()
