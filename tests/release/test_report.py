"""The report and the card: what stands in them is true, and the command in them repeats the release."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shlex
import shutil
from pathlib import Path

import pytest
import yaml
from families import save_tiny
from releases import asked, make_adapter, merged, train_tiny

from qlora_kit.release.report import command_of
from qlora_kit.release.request import records_of


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    save_tiny(folder / "base", "llama")
    shutil.copytree(folder / "base", folder / "moved")
    train_tiny(folder / "base", folder / "run")
    make_adapter(folder / "base", folder / "a")
    make_adapter(folder / "base", folder / "b", seed=1)
    return folder


@pytest.mark.parametrize(
    "words",
    [
        "--run run",
        "--run run --base moved --seq-len 24",
        "--run run --base moved --revision v2 --tokenizer moved --trust-remote-code --allow-other-base",
        "--run run --data run.jsonl --columns prompt=prompt,completion=completion --into best --dtype fp32",
        "--adapter a --base base",
        "--adapter a:0.12345678901 --adapter b:-1e-7 --base base --bits 4 --quant-type fp4 --no-double-quant",
        "--adapter a --base base --bits 8 --into original --format nf4 --dtype fp16 --tokenizer demo",
        "--adapter a --base base --data run.jsonl --seq-len 9 --revision main --into fp4",
        "--adapter run/adapter --base base",
    ],
)
def test_the_command_makes_the_same_request(made, monkeypatch, words):
    monkeypatch.chdir(made)
    request = asked(*words.split(), "--out", "release/my x", "--overwrite")
    command = shlex.split(command_of(request, records_of(request)))
    assert command[:2] == ["qlora-kit", "merge"]
    assert asked(*command[2:]) == dataclasses.replace(request, overwrite=False)


def front_matter(folder: Path) -> dict:
    return yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])


def test_a_folder_is_no_model_of_the_hub_and_licences_are_kept(made, tmp_path):
    """With every character in the name that means something to YAML."""
    base = shutil.copytree(made / "base", tmp_path / "my: base #1 'x\"")
    (base / "README.md").write_text("---\r\nlicense:\r\n- apache-2.0\r\n- mit\r\n---\r\n# base\n")
    found = merged("--adapter", made / "a", "--base", base, "--out", tmp_path / "out")
    assert front_matter(tmp_path / "out") == {
        "library_name": "transformers",
        "license": ["apache-2.0", "mit"],
        "tags": ["lora", "merged", "qlora_kit"],
    }
    assert found.report["licenses"] == {"base": "apache-2.0, mit", "adapter": None, "data": None}


def test_the_adapters_own_licence_stands_beside_the_bases(made, tmp_path):
    base, adapter = shutil.copytree(made / "base", tmp_path / "base"), shutil.copytree(made / "a", tmp_path / "a")
    (base / "README.md").write_text("---\nlicense: other\nlicense_name: tongyi\nlicense_link: x\n---\n")
    (adapter / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    found = merged("--adapter", adapter, "--base", base, "--out", tmp_path / "out")
    fields = front_matter(tmp_path / "out")
    assert fields["license"] == ["other", "cc-by-nc-4.0"]
    assert (fields["license_name"], fields["license_link"]) == ("tongyi", "x")
    assert found.report["licenses"] == {"base": "tongyi", "adapter": "cc-by-nc-4.0", "data": None}


def test_the_card_says_how_the_adapter_was_trained(made, tmp_path):
    merged("--run", made / "run", "--out", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "learning rate 0.02, batch 4 × 1, at most 32 tokens, seed 42" in card
    assert "layers (down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj)" in card
    content = (made / "run" / "adapter" / "adapter_model.safetensors").read_bytes()
    assert f"sha256:{hashlib.sha256(content).hexdigest()}" in card
    report = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert report["command"] in card
