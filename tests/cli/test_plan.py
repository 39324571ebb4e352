"""`qlora-kit plan`: its tables, its JSON, its picture, and what a mistake costs."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from families import FAMILIES, save_tiny
from matplotlib.image import imread
from refusals import with_flags

from qlora_kit.cli.main import main

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> list[str]:
    """Flags of a tiny model of which only the config.json is there."""
    folder = tmp_path_factory.mktemp("tiny")
    FAMILIES["gpt2"]().save_pretrained(folder)
    flags = ["--model", str(folder / "config.json"), "--weights", "random", "--batch-size", "16", "--seq-len", "96"]
    return ["plan", *flags, "--r", "4"]


def prints(capsys, *args: str) -> str:
    main(args)
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return out


def json_of(capsys, *args: str) -> dict:
    return json.loads(prints(capsys, *args, "--json"))


def fails(capsys, *args: str) -> str:
    with pytest.raises(SystemExit) as caught:
        main(args)
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert not out
    assert "Traceback" not in err
    return err


def children_s() -> float:
    """Seconds of the processor that ended processes took: those on the clock depend on what else is running."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def test_help_needs_no_torch_and_is_quick():
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    times_s = []
    for _ in range(4):  # the first compiles
        start_s = children_s()
        command = [sys.executable, "-X", "importtime", "-m", "qlora_kit", "plan", "--help"]
        done = subprocess.run(command, capture_output=True, text=True, env=env, check=True)
        times_s.append(children_s() - start_s)
    loaded = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert not loaded & {"torch", "transformers", "matplotlib", "numpy"}
    for flag in (
        "--gpu",
        "--fit",
        "--exact",
        "--json",
        "--plot",
        "--no-baselines",
        "--model",
        "--batch-size",
        "--config",
    ):
        assert flag in done.stdout
    assert min(times_s) < 0.5


def test_the_tables_say_what_when_and_beside_what(tiny, capsys):
    out = prints(capsys, *tiny, "--gpu", "rtx3060")
    for said in (
        "torch.cuda.max_memory_allocated",
        "not yet validated on hardware",
        "batch 16 × 96",
        "quantized weights",
        "quantization state",
        "embeddings and head",
        "adapters",
        "optimizer states",
        "checkpoints",
        "CUDA context",
        "fragmentation",
        "paged optimizer states",
        "estimate",
        "lora16 *",
        "full32 *",
        "full16",
        "16 bytes a parameter",
        "without checkpointing",
        "Fits into 12.00 GiB",
    ):
        assert said in " ".join(out.split()), said


def test_the_sums_of_the_json_agree(tiny, capsys):
    found = json_of(capsys, *tiny)
    plan = found["plan"]
    assert found["basis"] == "predicted, not yet validated on hardware"
    assert sum(plan["components"].values()) == plan["peak_bytes"]
    on_device = sum(extra["n_bytes"] for extra in plan["extras"] if extra["on_device"])
    assert plan["device_bytes"] == plan["peak_bytes"] + on_device
    assert max(point["live_bytes"] for point in plan["phases"].values()) == plan["peak_bytes"]
    for point in plan["series"]:
        assert sum(point["components"].values()) == point["live_bytes"]
    assert found["settings"]["adapter"]["r"] == 4
    assert found["budget"] is found["fit"] is found["gpu"] is None


def test_the_baselines_name_their_recipe_and_ratio(tiny, capsys):
    found = json_of(capsys, *tiny)
    own = found["plan"]["peak_bytes"]
    names = [(b["name"], b["gradient_checkpointing"], b["default"]) for b in found["baselines"]]
    assert names[:3] == [("lora16", True, True), ("full32", True, True), ("full16", True, False)]
    assert names[3:] == [("lora16", False, False), ("full32", False, False), ("full16", False, False)]
    for baseline in found["baselines"]:
        assert baseline["ratio"] == baseline["plan"]["peak_bytes"] / own
        assert baseline["saved_bytes"] == baseline["plan"]["peak_bytes"] - own
        assert ("with checkpointing" in baseline["recipe"]) == baseline["gradient_checkpointing"]
    assert json_of(capsys, *tiny, "--no-baselines")["baselines"] == []


@pytest.mark.parametrize(
    ("flags", "passes", "said"),
    [
        ([], 1, ""),
        (["--adversarial", "fgm"], 2, "2 passes over each batch (--adversarial fgm)"),
        (["--adversarial", "pgd", "--adversarial-steps", "4"], 5, "5 passes over each batch (--adversarial pgd)"),
        (["--rank-penalty", "1e-3"], 1, "two QR decompositions of each layer's factors"),
    ],
)
def test_it_says_what_a_regularized_step_takes_of_time(tiny, capsys, flags, passes, said):
    text = prints(capsys, *tiny, *flags)
    assert said in text
    assert ("passes over" in text, "QR" in text) == ("passes" in said, "QR" in said)
    assert json_of(capsys, *tiny, *flags)["plan"]["passes"] == passes


def test_a_saving_below_nothing_is_said_as_such(tiny, capsys):
    wide = ["--r", "64", "--adapter-dtype", "fp32", "--no-gradient-checkpointing", "--bits", "32"]
    out = prints(capsys, *with_flags(tiny, wide))
    assert "takes more" in out


def test_exact_and_extrapolated_agree(tmp_path, capsys):
    config = FAMILIES["llama"]()
    config.num_hidden_layers = 6
    config.save_pretrained(tmp_path)
    flags = ("plan", "--model", str(tmp_path), "--weights", "random", "--seq-len", "64", "--no-baselines")
    shallow, whole = json_of(capsys, *flags)["plan"], json_of(capsys, *flags, "--exact")["plan"]
    assert (shallow["exact"], whole["exact"]) == (False, True)
    assert shallow["peak_bytes"] == whole["peak_bytes"]
    assert shallow["components"] == whole["components"]


def test_settings_come_from_a_file_and_flags_win(tiny, tmp_path, capsys):
    file = tmp_path / "settings.yaml"
    file.write_text("r: 32\nbatch_size: 2\n")
    plain = [*tiny[:-2], "--no-baselines"]
    found = json_of(capsys, *plain, "--config", str(file))
    assert (found["settings"]["adapter"]["r"], found["plan"]["batch_size"]) == (32, 16)


def test_a_name_needs_no_download(capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = json_of(capsys, "plan", "--model", "gpt2", "--gpu", "T4", "--no-baselines")
    assert found["gpu"]["name"] == "t4"
    assert found["budget"]["fits"]
    assert found["plan"]["attention"]


@pytest.mark.slow
def test_fit_lists_what_fits(tiny, capsys):
    found = json_of(capsys, *tiny, "--fit", "600MiB", "--no-baselines")
    budget = 600 << 20
    assert found["budget"] == {"n_bytes": budget, "source": "as given", "fits": found["plan"]["device_bytes"] <= budget}
    assert [b["seq_len"] for b in found["fit"]["batches"]] == [96, 128]
    assert all(0 < b["device_bytes"] <= budget for b in found["fit"]["batches"])
    assert found["savings"][0]["saves_bytes"] >= found["savings"][-1]["saves_bytes"] > 0
    assert any(change["flags"] == "--gradient-checkpointing" for change in found["switched_on"])


@pytest.mark.slow
def test_what_does_not_fit_comes_with_ranked_remedies(tiny, capsys):
    big = with_flags(tiny, ["--batch-size", "128", "--no-gradient-checkpointing", "--no-baselines"])
    out = " ".join(prints(capsys, *big, "--fit", "520MiB").split())
    for said in (
        "Does not fit into 520 MiB",
        "Largest part: ",
        "and fits.",
        "Changes that take less",
        "Savings that are on already",
        "largest batch",
        "Longest sequence of batch 1: 128 tokens",
    ):
        assert said in out, said
    hopeless = " ".join(prints(capsys, *big, "--fit", "1MiB").split())
    assert "not even all of them together" in hopeless
    assert "none, not even two tokens fit" in hopeless


def test_the_picture_is_whole_and_not_blank(tiny, tmp_path, capsys):
    target = tmp_path / "plan.png"
    out = prints(capsys, *tiny, "--plot", str(target), "--gpu", "t4")
    assert str(target) in out.replace("\n", "")
    pixels = imread(target)
    assert pixels.shape[0] > 600
    assert pixels.shape[1] > 1200
    colours = np.unique((pixels[..., :3] * 255).astype(int).reshape(-1, 3), axis=0)
    assert len(colours) > 100
    assert [p.name for p in tmp_path.iterdir()] == ["plan.png"]


def test_the_picture_does_without_baselines_and_checkpointing(tiny, tmp_path, capsys):
    target = tmp_path / "plan.PNG"
    found = json_of(capsys, *tiny, "--plot", str(target), "--no-baselines", "--no-gradient-checkpointing")
    assert target.stat().st_size > 10_000
    assert found["baselines"] == []


@pytest.mark.parametrize(
    ("flags", "messages"),
    [
        (["--gpu", "rtx4900"], ["--gpu", "rtx4900", "Did you mean rtx4090"]),
        (["--fit", "8BG"], ["--fit", "8BG", "must be a size", "--fit 8GB?"]),
        (["--fit", "8BG", "--gpu", "x9", "--plot", "a.jpg"], ["--fit", "--gpu", "--plot", ".png"]),
        (["--plot", "no/such/folder/a.png"], ["--plot", "no/such/folder"]),
        (["--seq-len", "4096"], ["--seq-len", "4096", "128 positions"]),
        (["--bits", "5"], ["--bits", "4, 8, 16, 32"]),
        (["--targets", "q_porj"], ["--targets", "q_porj", "c_attn"]),
        (["--model", "gpt2-largo"], ["--model", "gpt2-largo", "gpt2-large"]),
        (["--model", "no/Llama-3-8", "--weights", "pretrained"], ["--model", "Did you mean --model llama-3-8b"]),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_two(tiny, tmp_path, capsys, monkeypatch, flags, messages):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("qlora_kit.model.hub.hub_reachable", lambda: False)
    monkeypatch.chdir(tmp_path)
    err = fails(capsys, *with_flags(tiny, flags))
    for message in messages:
        assert message in err
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a CUDA device")
def test_fit_to_the_device_needs_one(tiny, capsys):
    assert "no usable CUDA device" in fails(capsys, *tiny, "--fit", "device")


@pytest.mark.gpu
def test_fit_to_the_device(tiny, capsys):
    found = json_of(capsys, *tiny, "--fit", "device", "--no-baselines")
    assert found["budget"]["fits"]


def test_a_picture_that_cannot_be_written_is_an_error_and_leaves_nothing(tiny, tmp_path, capsys, monkeypatch):
    def full(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(SystemExit):
        main([*tiny, "--no-baselines", "--plot", str(tmp_path / "a.png")])
    assert "No space left" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_plan_leaves_nothing_behind_that_breaks_a_run(tmp_path, capsys):
    model = str(save_tiny(tmp_path / "base", "gpt2"))
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps({"question": f"{i}?", "answer": f"{i}!"}) for i in range(8)))
    flags = ["--model", model, "--data", str(data), "--seq-len", "32", "--r", "4", "--max-steps", "2"]

    def loss(out: str) -> float:
        main(["train", *flags, "--out", str(tmp_path / out)])
        return json.loads((tmp_path / out / "run.json").read_text())["results"]["train_loss"]

    before = loss("before")
    state = torch.random.get_rng_state()
    prints(capsys, "plan", *flags, "--fit", "1GiB", "--plot", str(tmp_path / "a.png"))
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.get_default_dtype() == torch.float32
    assert torch.empty(1).device.type == "cpu"
    assert loss("after") == before
