"""`qlora-kit completion`: the scripts are what their shells can read, and bash completes with them."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from qlora_kit.cli.main import COMMANDS, main


def script(capsys, shell: str) -> str:
    main(["completion", shell])
    return capsys.readouterr().out


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_script_knows_commands_flags_and_choices(capsys, shell):
    text = script(capsys, shell)
    for word in (*COMMANDS, "gradient-checkpointing", "no-double-quant", "constant_with_warmup", "help-all"):
        assert word in text
    if shutil.which(shell) is not None:  # fish is rarely there
        subprocess.run([shell, "-n", "-"], input=text, text=True, check=True)


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        (["p"], {"plan", "profile", "preview", "predict"}),
        (["train", "--sche"], {"--schedule"}),
        (["train", "--r", "4", "--no-tiled"], {"--no-tiled-mlp"}),
        (["train", "--schedule", "c"], {"cosine", "constant", "constant_with_warmup"}),
        (["merge", "--into", "b"], {"best"}),
        (["completion", "f"], {"fish"}),
    ],
)
def test_bash_completes(tmp_path, capsys, words, completed):
    file = tmp_path / "completion.bash"
    file.write_text(script(capsys, "bash"))
    program = f'source {file}; COMP_WORDS=(qlora-kit "$@"); COMP_CWORD=$#; _shtab_qlora_kit; echo "${{COMPREPLY[@]}}"'
    done = subprocess.run(["bash", "-c", program, "bash", *words], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == completed
