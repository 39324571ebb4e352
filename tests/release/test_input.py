"""What a user can get wrong: one clear message, exit code 2, and nothing left behind."""

from __future__ import annotations

import errno
import json
import os
import shutil
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from families import save_tiny
from releases import QUIET, asked, check_release, make_adapter, merged, release, train_tiny
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qlora_kit import BaseConfig, UserError
from qlora_kit.cli.main import main
from qlora_kit.release import merge
from qlora_kit.release.factors import parse_adapter
from qlora_kit.release.files.folder import Place
from qlora_kit.release.files.read import open_base

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with a tiny base, an adapter for it, and a finished run on it."""
    folder = tmp_path_factory.mktemp("made")
    save_tiny(folder / "base", "llama")
    make_adapter(folder / "base", folder / "adapter")
    train_tiny(folder / "base", folder / "run")
    return folder


@pytest.fixture
def copy(made, tmp_path) -> Path:
    """The same to be damaged."""
    return Path(shutil.copytree(made, tmp_path / "copy"))


def refused(capsys, tmp_path: Path, *words: str) -> str:
    """Merge in this process; returns what the failing command prints on standard error."""
    out = tmp_path / "new" / "out"
    with pytest.raises(SystemExit) as caught:
        main(["merge", "--out", str(out), *words])
    assert caught.value.code == 2
    printed, err = capsys.readouterr()
    assert not printed
    assert "Traceback" not in err
    assert not out.parent.exists()
    return err


@pytest.mark.parametrize("into", ["original", "best"])
def test_what_loftq_made_up_for_is_not_added_to_a_base_that_did_not_lose_it(copy, tmp_path, capsys, into):
    file = copy / "run" / "run.json"
    record = json.loads(file.read_text())
    record["settings"]["adapter"] |= {"init": "loftq", "adapter_dtype": "fp32"}
    file.write_text(json.dumps(record))
    err = refused(capsys, tmp_path, "--run", str(copy / "run"), "--into", into, "--data", str(copy / "data.jsonl"))
    assert f"--into = '{into}': lacks the quantization errors that the factors" in err


def from_adapter(folder: Path) -> list[str]:
    return ["--adapter", str(folder / "adapter"), "--base", str(folder / "base")]


def changed_settings(folder: Path, **settings) -> None:
    file = folder / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


def changed_tensors(file: Path, change) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


@pytest.mark.parametrize(
    ("words", "messages"),
    [
        ([], ["--run", "--adapter DIR --base MODEL"]),
        (["--adapter", "x"], ["--base", "is needed beside --adapter"]),
        (["--run", "no/such/run"], ["--run", "no such folder"]),
        (["--adapter", "x:much", "--base", "demo"], ["--adapter", "'x:much'", "DIR", "0.7"]),
        (["--adapter", "x:0", "--base", "demo"], ["--adapter", "x:0"]),
        (["--adapter", "x", "--base", "demo", "--bits", "5"], ["--bits = 5"]),
        (["--adapter", "x", "--base", "demo", "--into", "q4", "--dtype", "int8"], ["--into", "trained", "--dtype"]),
        (["--adapter", "x", "--base", "demo", "--bits", "4", "--into", "int8"], ["--into", "held in nf4"]),
        (["--adapter", "x", "--base", "demo", "--bits", "4", "--into", "best"], ["--data", "choose between two bases"]),
        (["--adapter", "x", "--base", "demo", "--into", "best"], ["--bits", "no record of how its base was held"]),
        (["--adapter", "x", "--base", "demo", "--into", "trained"], ["--bits", "no record of how its base was held"]),
        (["--adapter", "none", "--base", "nor/this/one/here"], ["none", "adapter_model", "--base"]),
    ],
)
def test_words_that_do_not_go_together(capsys, tmp_path, words, messages):
    err = refused(capsys, tmp_path, *words)
    for message in messages:
        assert message in err.replace("must be a folder, or a folder and its weight", "DIR"), err


def test_out_is_needed(capsys):
    with pytest.raises(SystemExit):
        main(["merge", "--adapter", "x", "--base", "demo"])
    assert "--out" in capsys.readouterr().err


def test_training_flags_are_not_flags_of_merge(capsys):
    with pytest.raises(SystemExit):
        main(["merge", "--lr", "1"])
    assert "--lr" in capsys.readouterr().err


def test_the_weight_of_an_adapter_stands_after_a_colon(tmp_path):
    assert parse_adapter("a/b") == ("a/b", 1.0)
    assert parse_adapter("a/b:0.7") == ("a/b", 0.7)
    assert parse_adapter("a:b:-2") == ("a:b", -2.0)
    (tmp_path / "x:1").mkdir()
    assert parse_adapter(str(tmp_path / "x:1")) == (str(tmp_path / "x:1"), 1.0)


@pytest.mark.parametrize(
    ("settings", "messages"),
    [
        ({"peft_type": "IA3"}, ["IA3", "only LoRA"]),
        ({"init_lora_weights": "pissa"}, ["pissa", "changed the base"]),
        ({"trainable_token_indices": [3]}, ["trainable_token_indices"]),
        ({"target_parameters": ["experts.down_proj"], "layer_replication": [[0, 2]]}, ["target_param", "layer_repl"]),
        ({"ensure_weight_tying": True}, ["ensure_weight_tying"]),
        ({"r": 8}, ["shapes", "rank is 8"]),
        ({"use_dora": True}, ["lacks", "lora_magnitude_vector"]),
        (
            {"target_modules": ["q_proj", "o_proj", "lm_head"]},
            ["lacks the factors of 1 of the layers that it names: lm_head"],
        ),
    ],
)
def test_adapters_that_are_no_plain_lora(capsys, tmp_path, copy, settings, messages):
    changed_settings(copy, **settings)
    err = refused(capsys, tmp_path, *from_adapter(copy))
    for message in ["--adapter", str(copy / "adapter"), *messages]:
        assert message in err


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("r", "abc"),
        ("r", None),
        ("r", 0),
        ("lora_alpha", None),
        ("lora_alpha", "x"),
        ("rank_pattern", [1]),
        ("rank_pattern", {"*[": 4}),
        ("rank_pattern", {"q_proj": "4"}),
        ("alpha_pattern", {"q_proj": None}),
        ("target_modules", "*["),
        ("target_modules", 5),
        ("target_modules", [5]),
        ("exclude_modules", {}),
        ("layers_to_transform", "0"),
        ("layers_pattern", ["*["]),
        ("modules_to_save", "*["),
        ("use_dora", "no"),
        ("use_rslora", 1),
    ],
)
def test_settings_that_peft_never_writes(capsys, tmp_path, copy, name, value):
    changed_settings(copy, **{name: value})
    err = refused(capsys, tmp_path, *from_adapter(copy))
    assert f"its adapter_config.json has {name} = {value!r}, which is not " in err


def test_a_choice_of_layers_that_peft_cannot_make(capsys, tmp_path, copy):
    changed_settings(copy, target_modules=".*q_proj", layers_to_transform=[0])
    assert "in a way that PEFT does not accept" in refused(capsys, tmp_path, *from_adapter(copy))


@pytest.mark.parametrize("file", ["adapter/adapter_config.json", "base/config.json", "base/model.safetensors"])
def test_json_without_end(capsys, tmp_path, copy, file):
    text = b"[" * 200_000
    if file.endswith(".safetensors"):
        text = len(text).to_bytes(8, "little") + text
    (copy / file).write_bytes(text)
    assert "cannot be read" in (err := refused(capsys, tmp_path, *from_adapter(copy))) or "nested too deeply" in err


def test_a_vocabulary_that_was_resized_is_met_by_a_resized_base(capsys, tmp_path, made):
    """As one trains with added tokens: PEFT keeps the embeddings whole, and the base has fewer."""
    base = AutoModelForCausalLM.from_pretrained(made / "base")
    base.resize_token_embeddings(322, mean_resizing=False)
    base.save_pretrained(tmp_path / "resized")
    shutil.copy(made / "base" / "tokenizer.json", tmp_path / "resized")
    adapter = make_adapter(tmp_path / "resized", tmp_path / "adapter", 16, modules_to_save=["embed_tokens", "lm_head"])
    err = refused(capsys, tmp_path, "--adapter", str(adapter), "--base", str(made / "base"))
    assert "the vocabulary was resized: it has 322 tokens, but this base has 320" in err
    assert "architecture" not in err
    check_release(tmp_path / "resized", [(adapter, 1.0)], tmp_path / "out", bits=32)


def test_the_second_adapter_must_be_whole_too(capsys, tmp_path, made):
    """PEFT chooses by the number of the layer here, and loads what is lacking as zero."""
    other = make_adapter(
        made / "base", tmp_path / "b", seed=1, layers_to_transform=[0, 1], target_modules=["q_proj", "v_proj"]
    )
    words = ["--adapter", str(made / "adapter"), "--adapter", str(other), "--base", str(made / "base")]
    merged(*words, "--out", tmp_path / "out")
    changed_tensors(other / WEIGHTS, lambda t: [t.pop(name) for name in list(t) if "layers.1.self_attn.v" in name])
    err = refused(capsys, tmp_path, *words)
    assert "lacks the factors of 1 of the layers that it names: model.layers.1.self_attn.v_proj" in err
    assert str(other) in err


def test_a_base_that_is_cut_off_while_it_is_read(capsys, tmp_path, copy, monkeypatch):
    file = copy / "base" / "model.safetensors"

    def cut_off(*args):
        file.write_bytes(file.read_bytes()[:60_000])
        return plan(*args)

    plan = merge.plan_files
    monkeypatch.setattr(merge, "plan_files", cut_off)
    err = refused(capsys, tmp_path, *from_adapter(copy))
    assert "--base" in err
    assert "changed while it was read: model.safetensors ended early" in err


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOENT])
def test_a_disk_that_goes_away_is_one_message(capsys, tmp_path, made, monkeypatch, code):
    def gone(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("qlora_kit.release.files.write.os.pwrite", gone)
    err = refused(capsys, tmp_path, *from_adapter(made))
    assert f"--out = '{tmp_path / 'new' / 'out'}': cannot be written ({os.strerror(code)})" in err


FIRST = "base_model.model.model.layers.0.self_attn.q_proj"


def drop_b(tensors):
    tensors.pop(f"{FIRST}.lora_B.weight")


def drop_layer(tensors):
    tensors.pop(f"{FIRST}.lora_B.weight")
    tensors.pop(f"{FIRST}.lora_A.weight")


def not_a_number(tensors):
    tensors[f"{FIRST}.lora_A.weight"][1, 2] = float("nan")


def infinite(tensors):
    tensors[f"{FIRST}.lora_A.weight"][1, 2] = float("inf")


def zero(tensors):
    tensors[f"{FIRST}.lora_B.weight"].zero_()


def foreign(tensors):
    tensors["layers.0.q_proj.lora_A"] = torch.ones(2, 2)


def other_name(tensors):
    for part in ("A", "B"):
        tensors[f"base_model.model.model.layers.7.self_attn.q_proj.lora_{part}.weight"] = tensors[
            f"{FIRST}.lora_{part}.weight"
        ].clone()


def other_width(tensors):
    tensors[f"{FIRST}.lora_A.weight"] = torch.ones(4, 96)


def packed(tensors):
    tensors["base_model.model.lm_head.weight"] = torch.ones(80, dtype=torch.uint8)


def resized(tensors):
    tensors["base_model.model.lm_head.weight"] = torch.ones(330, 64)


def integers(tensors):
    tensors[f"{FIRST}.lora_A.weight"] = torch.ones(4, 64, dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop_b, "lacks 1 of its tensors: model.layers.0.self_attn.q_proj.lora_B"),
        (drop_layer, "lacks the factors of 1 of the layers that it names: model.layers.0.self_attn.q_proj"),
        (not_a_number, f"{FIRST}.lora_A.weight has values that are not finite"),
        (infinite, f"{FIRST}.lora_A.weight has values that are not finite"),
        (zero, f"{FIRST}.lora_B.weight is all zero"),
        (foreign, "which is not a name that PEFT gives"),
        (other_name, "another architecture: this base has no layer model.layers.7.self_attn.q_proj"),
        (other_width, "another architecture: model.layers.0.self_attn.q_proj is 64 → 128 here, and 96 → 128 there"),
        (resized, "the vocabulary was resized: it has 330 tokens, but this base has 320"),
        (packed, "has the dtype torch.uint8"),
        (integers, "has the dtype torch.int32"),
    ],
)
def test_adapters_whose_tensors_are_wrong(capsys, tmp_path, copy, change, message):
    changed_tensors(copy / "adapter" / WEIGHTS, change)
    err = refused(capsys, tmp_path, *from_adapter(copy))
    assert str(copy / "adapter") in err
    assert message in err


def test_an_adapter_of_another_family(capsys, tmp_path, made):
    other = make_adapter(save_tiny(tmp_path / "gpt2", "gpt2"), tmp_path / "other")
    err = refused(capsys, tmp_path, "--adapter", str(other), "--base", str(made / "base"))
    assert "another architecture" in err
    assert "more such faults" in err


@pytest.mark.parametrize("damage", ["cut off", "no tensors", "pickled", "missing", "no settings", "bad settings"])
def test_adapters_whose_files_are_damaged(capsys, tmp_path, copy, damage):
    weights, settings = copy / "adapter" / WEIGHTS, copy / "adapter" / "adapter_config.json"
    if damage == "cut off":
        weights.write_bytes(weights.read_bytes()[:-10])
        message = "was cut off"
    elif damage == "no tensors":
        save_file({}, weights)
        message = "has no tensors"
    elif damage == "pickled":
        weights.rename(copy / "adapter" / "adapter_model.bin")
        message = "pickle"
    elif damage == "missing":
        weights.unlink()
        message = f"has no {WEIGHTS}"
    elif damage == "no settings":
        settings.unlink()
        message = "has no adapter_config.json"
    else:
        settings.write_text("[")
        message = "cannot be read"
    err = refused(capsys, tmp_path, *from_adapter(copy))
    assert message in err
    assert str(copy / "adapter") in err


def test_a_run_given_as_an_adapter_is_told_how_to_give_it(capsys, tmp_path, made):
    err = refused(capsys, tmp_path, "--adapter", str(made / "run"), "--base", str(made / "base"))
    assert f"--run {made / 'run'}" in err


@pytest.mark.parametrize("damage", ["cut off", "not safetensors", "pickled", "missing", "lacks", "shape", "quantized"])
def test_bases_that_are_damaged(capsys, tmp_path, copy, damage):
    weights, config = copy / "base" / "model.safetensors", copy / "base" / "config.json"
    if damage == "cut off":
        weights.write_bytes(weights.read_bytes()[:-10])
        message = "was cut off"
    elif damage == "not safetensors":
        weights.write_text("hello")
        message = "not a safetensors file"
    elif damage == "pickled":
        weights.rename(copy / "base" / "pytorch_model.bin")
        message = "pickle"
    elif damage == "missing":
        weights.unlink()
        message = "no model.safetensors"
    elif damage == "lacks":
        changed_tensors(weights, lambda tensors: tensors.pop("model.norm.weight"))
        message = "its files lack 1 of its weights: model.norm.weight"
    elif damage == "shape":
        changed_tensors(weights, lambda t: t.update({"model.norm.weight": torch.ones(3)}))
        message = "model.norm.weight has the shape (3,), but the model needs (64,)"
    else:
        config.write_text(json.dumps({**json.loads(config.read_text()), "quantization_config": {"bits": 4}}))
        message = "is quantized on disk"
    err = refused(capsys, tmp_path, *from_adapter(copy))
    assert message in err
    assert "--base" in err


def test_a_base_whose_index_leads_elsewhere(capsys, tmp_path, copy):
    (copy / "base" / "model.safetensors").rename(copy / "model.safetensors")
    index = {"weight_map": {"model.norm.weight": "../model.safetensors"}}
    (copy / "base" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "'../model.safetensors'" in refused(capsys, tmp_path, *from_adapter(copy))


def test_a_base_that_holds_no_numbers(capsys, tmp_path, copy):
    changed_tensors(copy / "base" / "model.safetensors", lambda t: t["model.norm.weight"].fill_(float("nan")))
    assert "not finite in model.norm.weight" in refused(capsys, tmp_path, *from_adapter(copy))


def test_another_base_than_the_runs_is_refused_and_can_be_overruled(capsys, tmp_path, made):
    other = save_tiny(tmp_path / "other", "llama", seed=1)
    words = ["--run", str(made / "run"), "--base", str(other)]
    err = refused(capsys, tmp_path, *words)
    assert "is not the base that" in err
    assert "--allow-other-base" in err
    assert str(other) in err
    err = refused(capsys, tmp_path, "--adapter", str(made / "run" / "adapter"), "--base", str(other))
    assert "is not the base that" in err  # the run's record lies beside its adapter
    chosen = [(made / "run" / "adapter", 1.0)]
    result = release(other, chosen, tmp_path / "out", allow_other_base=True)
    assert result.report["base"]["is_that_of_the_run"] is False


def test_a_run_cannot_be_read_as_trained_in_other_bits(capsys, tmp_path, made):
    err = refused(capsys, tmp_path, "--run", str(made / "run"), "--bits", "8")
    assert "--bits = 8" in err
    assert "was 4" in err


def test_a_full_run_and_a_random_base_have_nothing_to_merge(capsys, tmp_path, copy):
    file = copy / "run" / "run.json"
    record = json.loads(file.read_text())
    record["settings"]["base"] |= {"weights": "random", "model": "pythia-70m"}
    file.write_text(json.dumps(record))
    assert "random weights" in refused(capsys, tmp_path, "--run", str(copy / "run"))


def test_two_adapters_that_hold_the_same_tensor_whole(capsys, tmp_path, made):
    one = make_adapter(made / "base", tmp_path / "a", modules_to_save=["lm_head"])
    other = make_adapter(made / "base", tmp_path / "b", seed=1, modules_to_save=["lm_head"])
    words = ["--adapter", str(one), "--adapter", str(other), "--base", str(made / "base")]
    assert "a whole lm_head.weight" in refused(capsys, tmp_path, *words)


def test_dora_is_merged_alone(capsys, tmp_path, made):
    one = make_adapter(made / "base", tmp_path / "a", use_dora=True)
    words = ["--adapter", str(one), "--adapter", str(made / "adapter"), "--base", str(made / "base")]
    assert "DoRA" in refused(capsys, tmp_path, *words)


def test_what_is_there_is_not_touched_without_overwrite(tmp_path, made):
    chosen = [(made / "adapter", 1.0)]
    first = release(made / "base", chosen, tmp_path / "out")
    before = {file.name: file.read_bytes() for file in first.folder.iterdir()}
    with pytest.raises(UserError, match=r"already exists.*\n.*overwrite=True"):
        release(made / "base", chosen, tmp_path / "out", dtype="fp32")
    assert {file.name: file.read_bytes() for file in first.folder.iterdir()} == before
    second = release(made / "base", chosen, tmp_path / "out", dtype="fp32", overwrite=True)
    assert json.loads((second.folder / "config.json").read_text())["dtype"] == "float32"
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_what_is_no_release_is_never_replaced(tmp_path, made):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("dear")
    with pytest.raises(UserError, match="is not a release, so it is never replaced"):
        release(made / "base", [(made / "adapter", 1.0)], tmp_path / "mine", overwrite=True)
    (tmp_path / "file").write_text("dear")
    with pytest.raises(UserError, match="never replaced"):
        release(made / "base", [(made / "adapter", 1.0)], tmp_path / "file", overwrite=True)
    assert (tmp_path / "mine" / "thesis.tex").read_text() == (tmp_path / "file").read_text() == "dear"


def test_an_old_release_stays_when_the_new_one_fails(tmp_path, made, monkeypatch):
    chosen = [(made / "adapter", 1.0)]
    release(made / "base", chosen, tmp_path / "out")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    monkeypatch.setattr("qlora_kit.release.files.write.os.fsync", full_disk)
    with pytest.raises(UserError, match="the disk is full"):
        release(made / "base", chosen, tmp_path / "out", overwrite=True, dtype="fp32")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def full_disk(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("call", ["pwrite", "fsync", "ftruncate"])
def test_a_disk_that_fills_is_one_message_and_leaves_nothing(capsys, tmp_path, made, monkeypatch, call):
    monkeypatch.setattr(f"qlora_kit.release.files.write.os.{call}", full_disk)
    assert "the disk is full" in refused(capsys, tmp_path, *from_adapter(made))


def test_space_is_looked_for_before_anything_is_written(capsys, tmp_path, made, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1 << 20)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    monkeypatch.setattr("qlora_kit.release.files.write.os.pwrite", full_disk)
    err = refused(capsys, tmp_path, *from_adapter(made))
    assert "the disk has 1 MiB free" in err
    assert f"--out = '{tmp_path / 'new' / 'out'}'" in err


def test_space_for_the_proof_is_that_of_its_questions(tmp_path, made):
    request = asked(*from_adapter(made), "--out", tmp_path / "out")
    assert merge._needed_bytes(request, merge.read_inputs(request, QUIET), whole_model=True) < 100 << 20


@pytest.mark.parametrize("out", ["/proc/x", "..", ""])
def test_places_that_cannot_be_written(capsys, made, out):
    with pytest.raises(SystemExit) as caught:
        main(["merge", "--out", out, *from_adapter(made)])
    assert caught.value.code == 2
    assert "--out" in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_write_protected_place(capsys, tmp_path, made):
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(SystemExit):
        main(["merge", "--out", str(tmp_path / "locked" / "x"), *from_adapter(made)])
    assert "--out" in capsys.readouterr().err


def test_two_merges_to_one_place_do_not_meet(tmp_path, made):
    place = Place.at(str(tmp_path / "out"))
    with place.made(), pytest.raises(UserError, match="another merge is writing"):
        release(made / "base", [(made / "adapter", 1.0)], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    release(made / "base", [(made / "adapter", 1.0)], tmp_path / "out")


def test_a_file_that_does_not_keep_what_is_written_is_noticed(capsys, tmp_path, made, monkeypatch):
    honest = os.pwrite

    def forgetful(file, content, offset):
        kept = bytearray(content)
        kept[-1] ^= 1
        return honest(file, bytes(kept) if len(content) == 128 else content, offset)

    monkeypatch.setattr("qlora_kit.release.files.write.os.pwrite", forgetful)
    assert "does not hold what was written for" in refused(capsys, tmp_path, *from_adapter(made))


@pytest.mark.parametrize("sharded", [False, True])
def test_only_the_weights_that_are_read_are_fetched(tmp_path, monkeypatch, sharded):
    """Others may lie beside them on the hub, and take as much again."""
    asked_for = []
    if sharded:
        index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        (tmp_path / "model.safetensors").touch()

    def fetch(model, revision, patterns, setting):
        asked_for.extend(patterns)
        return tmp_path

    monkeypatch.setattr("qlora_kit.model.hub.fetch_model_folder", fetch)
    with pytest.raises(UserError, match="cannot be read"):
        open_base(BaseConfig(model="someone/sharded"))
    wanted = {name for name in asked_for if name.endswith(".safetensors")}
    parts = {"model-1.safetensors", "model-2.safetensors"} if sharded else set()
    assert wanted == {"model.safetensors", *parts}
    assert not any(fnmatch(name, pattern) for pattern in asked_for for name in ("consolidated.safetensors", "x.bin"))


def test_a_hub_model_is_taken_from_the_cache(tmp_path, made, monkeypatch):
    cache = tmp_path / "cache"
    snapshot = cache / "models--someone--tiny" / "snapshots" / ("0" * 40)
    shutil.copytree(made / "base", snapshot)
    (cache / "models--someone--tiny" / "refs").mkdir()
    (cache / "models--someone--tiny" / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("qlora_kit.model.hub.hub_reachable", lambda: False)
    result = release(Path("someone/tiny"), [(made / "adapter", 1.0)], tmp_path / "out")
    assert result.report["base"]["model"] == "someone/tiny"
    with pytest.raises(UserError, match="hub"):
        release(Path("someone/else"), [(made / "adapter", 1.0)], tmp_path / "other")
