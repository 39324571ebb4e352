"""The command line: what a user types, and what a mistake costs."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from families import save_tiny
from refusals import fails, with_flags

from qlora_kit.cli.main import main

ROOT = Path(__file__).resolve().parents[2]
NOISE = (
    "Failed to load CPU gemm",
    "loss_type=None",
    "use_cache",
    "FutureWarning",
    "UserWarning",
    "Loading weights",
    "it/s]",
)


def run(*args: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, cwd=cwd, env=env, check=False)


@pytest.fixture(scope="session")
def inputs(tmp_path_factory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("inputs")
    data = folder / "data.jsonl"
    data.write_text("\n".join(json.dumps({"question": f"{i}?", "answer": f"{i}!"}) for i in range(8)))
    return str(save_tiny(folder / "base", "gpt2")), str(data)


def children_s() -> float:
    """Seconds of the processor that ended processes took: those on the clock depend on what else is running."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def test_help_needs_no_torch_and_is_quick():
    script = str(ROOT / "scripts" / "train.py")
    run(script, "--help")  # compile once
    times_s = []
    for _ in range(3):
        start_s = children_s()
        done = run(script, "--help")
        times_s.append(children_s() - start_s)
    assert done.returncode == 0
    for option in ("--model", "--data", "--bits", "--no-double-quant", "--config", "--resume"):
        assert option in done.stdout
    assert min(times_s) < 0.5
    loaded = run("-X", "importtime", script, "--help").stderr
    assert not any(line.split("|")[-1].strip() == "torch" for line in loaded.splitlines())


def test_no_command_and_help_list_the_commands(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    assert "train" in capsys.readouterr().out
    assert "is not a command" in fails(capsys, "trian")


@pytest.mark.parametrize("args", [["--help"], ["plan", "--help"]])
def test_a_reader_that_leaves_early_gets_no_traceback(args):
    """As `qlora-kit --help | head` does."""
    command = [sys.executable, "-m", "qlora_kit", *args]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) as process:
        process.stdout.close()
        assert not process.stderr.read()


@pytest.mark.slow
def test_a_command_says_nothing_of_libraries_before_it_begins():
    """The import of bitsandbytes warns, and some commands' modules import it."""
    command = [sys.executable, "-m", "qlora_kit", "profile", "--model", "no/such", "--weights", "random"]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: --model")


@pytest.mark.slow
def test_the_script_and_the_command_do_the_same(tmp_path, inputs):
    model, data = inputs
    flags = ["--model", model, "--data", data, "--max-steps", "2", "--seq-len", "32", "--r", "4"]
    script = run(str(ROOT / "scripts" / "train.py"), *flags, "--out", "a", cwd=tmp_path)
    command = run("-m", "qlora_kit", "train", *flags, "--out", "b", cwd=tmp_path)
    assert script.returncode == command.returncode == 0, script.stderr + command.stderr
    weights = [(tmp_path / out / "adapter" / "adapter_model.safetensors").read_bytes() for out in "ab"]
    assert weights[0] == weights[1]
    for noise in NOISE:  # trap 8: what the libraries say and nobody can mend
        assert noise not in script.stderr
    for said in ("CPU", "parameters at 4 bits", "loss", "tokens/s", "peak", "adapter: a/adapter"):
        assert said in script.stderr


def test_flags_win_over_the_file(tmp_path, inputs, capsys):
    model, data = inputs
    file = tmp_path / "settings.yaml"
    file.write_text(f"model: {model}\ndata: {data}\nmax_steps: 3\nr: 4\nseq_len: 32\nout: {tmp_path / 'x'}\n")
    main(["train", "--config", str(file), "--max-steps", "1"])
    record = json.loads((tmp_path / "x" / "run.json").read_text())
    assert (record["steps"], record["settings"]["adapter"]["r"]) == (1, 4)
    capsys.readouterr()
    assert "already exists" in fails(capsys, "train", "--config", str(file))
    main(["train", "--config", str(tmp_path / "x" / "run.json"), "--out", str(tmp_path / "y")])
    first, again = (json.loads((tmp_path / out / "run.json").read_text()) for out in "xy")
    assert first["results"]["train_loss"] == again["results"]["train_loss"]


def test_preview_shows_what_is_supervised_and_audits(inputs, capsys):
    model, data = inputs
    main(["preview", "--model", model, "--data", data, "--rows", "1,3"])
    out = capsys.readouterr().out
    assert "«" in out
    assert "duplicates" in out.lower()
    assert "--rows" in fails(capsys, "preview", "--model", model, "--data", data, "--rows", "x")


@pytest.mark.parametrize(
    ("flags", "messages"),
    [
        (["--bits", "5", "--r", "0"], ["--bits = 5", "4, 8, 16, 32", "--r = 0", "at least 1"]),
        (["--model", "no/such/folder/anywhere"], ["--model", "--weights random"]),
        (["--targets", "q_porj"], ["q_porj", "c_attn"]),
        (["--data", "none.jsonl"], ["--data", "none.jsonl"]),
        (["--seq-len", "100000"], ["--seq-len", "128"]),
        (["--columns", "prompt=nope,completion=answer"], ["--columns", "nope", "question"]),
        (["--config", "none.yaml"], ["--config", "none.yaml"]),
        (["--out", "/proc/x"], ["--out", "/proc/x"]),
        (["--lr", "fast"], ["--lr", "number"]),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_two(tmp_path, inputs, capsys, flags, messages):
    model, data = inputs
    out = tmp_path / "run"
    args = ["train", "--model", model, "--data", data, "--out", str(out), "--max-steps", "1"]
    err = fails(capsys, *with_flags(args, flags))
    for message in messages:
        assert message in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("args", "messages"),
    [
        (
            ["train", "--data", "a.jsonl", "--data", "b.jsonl"],
            ["--data = ['a.jsonl', 'b.jsonl']: is given more than once", "put them into a folder"],
        ),
        (["generate", "--run", "x", "--data=a", "--data", "b"], ["--data = ['a', 'b']", "put them into a folder"]),
        (["train", "--lr", "1e-3", "--r", "4", "--lr=1e-4", "--r", "4"], ["--lr = ['1e-3', '1e-4']", "--r = ['4', "]),
        (["train", "--batch-size", "3", "--batch_size", "4"], ["--batch-size = ['3', '4']", "Give it once"]),
        (["plan", "--exact", "--no-exact"], ["--exact = ['--exact', '--no-exact']"]),
        (["train", "--config", "a.yaml", "--config", "b.yaml"], ["--config = ['a.yaml', 'b.yaml']"]),
        (["search", "--r", "4", "--r", "8"], ["--r = ['4', '8']", "--r 4,8,16"]),
    ],
)
def test_a_flag_given_twice_is_refused(capsys, args, messages):
    err = fails(capsys, *args)
    for message in messages:
        assert message in err


def test_a_prompt_may_be_given_several_times(capsys):
    err = fails(capsys, "generate", "--model", "no/such", "--prompt", "a", "--prompt", "b")
    assert "more than once" not in err


def test_an_unknown_flag_suggests_the_nearest(capsys):
    assert "--batch-size" in fails(capsys, "train", "--batchsize", "3")


@pytest.mark.parametrize(
    ("content", "messages"),
    [
        ('{"prompt": "a", "completion": "b"}\n{"prompt": \n', ["data.jsonl", "2"]),
        ("", ["data.jsonl"]),
        ('{"x": 1}\n', ["x"]),
    ],
)
def test_bad_data_names_the_file_and_line(tmp_path, inputs, capsys, content, messages):
    file = tmp_path / "data.jsonl"
    file.write_text(content)
    err = fails(capsys, "train", "--model", inputs[0], "--data", str(file), "--out", str(tmp_path / "run"))
    for message in messages:
        assert message in err
    assert {p.name for p in tmp_path.iterdir()} == {"data.jsonl"}
