"""What lies beside the weights of a release: its tokenizer is one, whoever brings it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from families import save_tiny
from releases import make_adapter, merged, train_tiny

from qlora_kit import BaseConfig, UserError, demo
from qlora_kit.release.files.side_files import copy_side_files, find_tokenizer, licence_of


def folder_with(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{folder.name} {name}")
    return folder


def test_the_tokenizer_is_the_one_asked_for_or_the_adapters_or_the_bases(tmp_path):
    own = folder_with(tmp_path / "own", "spiece.model")
    base = folder_with(tmp_path / "base", "tokenizer.json")
    bare = folder_with(tmp_path / "bare", "tokenizer_config.json")
    adapter = folder_with(tmp_path / "adapter", "tekken.json")
    unset = BaseConfig(model=str(base))
    assert find_tokenizer(unset, [bare, adapter], base) == adapter
    assert find_tokenizer(unset, [bare], base) == base
    assert find_tokenizer(BaseConfig(model=str(base), tokenizer=str(own)), [adapter], base) == own
    assert find_tokenizer(BaseConfig(model=str(base), tokenizer="demo"), [adapter], base) == demo.base_folder()
    with pytest.raises(UserError, match="tokenizer = "):
        find_tokenizer(BaseConfig(model=str(base), tokenizer=str(bare)), [adapter], base)


def test_a_tokenizer_of_the_hub_is_taken_from_the_cache(tmp_path, monkeypatch):
    cache = tmp_path / "cache" / "models--someone--tok"
    folder_with(cache / "snapshots" / ("0" * 40), "tokenizer.json", "tokenizer_config.json")
    folder_with(cache / "refs", "main")
    (cache / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("qlora_kit.model.hub.hub_reachable", lambda: False)
    config = BaseConfig(model="someone/base", tokenizer="someone/tok")
    assert find_tokenizer(config, [], tmp_path) == cache / "snapshots" / ("0" * 40)


@pytest.mark.parametrize(
    "name",
    ["vocab.txt", "spiece.model", "sentencepiece.bpe.model", "tekken.json", "qwen.tiktoken", "tokenizer.json"],
)
def test_every_kind_of_tokenizer_comes_along(tmp_path, name):
    source = folder_with(tmp_path / "source", name, "additional_chat_templates/tools.jinja", "weights.safetensors")
    out = folder_with(tmp_path / "out", "config.json")
    base = folder_with(tmp_path / "base", "LICENCE.txt", "generation_config.json", "vocab.json", "code.py")
    copy_side_files(base, find_tokenizer(BaseConfig(model=str(base)), [source], base), out, with_code=False)
    found = {str(file.relative_to(out)) for file in out.rglob("*") if file.is_file()}
    wanted = {name, "additional_chat_templates/tools.jinja", "LICENCE.txt", "generation_config.json", "config.json"}
    assert found == wanted


def test_all_files_of_marians_tokenizer_come_along(tmp_path):
    names = {"vocab.json", "target_vocab.json", "source.spm", "target.spm", "tokenizer_config.json"}
    source, out = folder_with(tmp_path / "source", *names), folder_with(tmp_path / "out")
    out.mkdir()
    copy_side_files(folder_with(tmp_path / "base", "config.json"), source, out, with_code=False)
    assert {file.name for file in out.iterdir()} == names


def test_the_tokenizer_asked_for_is_in_the_release(tmp_path):
    base = save_tiny(tmp_path / "base", "llama")
    adapter = make_adapter(base, tmp_path / "adapter")
    (adapter / "tokenizer.json").write_text("{}")
    merged("--adapter", adapter, "--base", base, "--tokenizer", base, "--out", tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


def test_a_run_brings_the_tokenizer_that_lies_with_its_adapter(tmp_path):
    """Also where the one that it was trained with is gone, or its base has none."""
    base = save_tiny(tmp_path / "base", "gpt2")
    tokenizer = shutil.copytree(base, tmp_path / "tokenizer")
    run = train_tiny(base, tmp_path / "run", tokenizer=str(tokenizer))
    shutil.rmtree(tokenizer)
    (base / "tokenizer.json").unlink()
    merged("--run", run, "--out", tmp_path / "out")
    saved = (run / "adapter" / "tokenizer.json").read_bytes()
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == saved


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("---\nlicense: mit # ok\n---\n", {"license": "mit"}),
        ("\ufeff---\r\nlicense: mit\r\n---\r\n", {"license": "mit"}),
        ("---\nlicense:\n- mit\n- gpl\n---\n", {"license": ["mit", "gpl"]}),
        ("---\nlicense: 5\nlicense_name: own\n---\n", {"license_name": "own"}),
        ("# no front matter\n---\nlicense: mit\n---\n", {}),
        ("---\nlicense: [\n---\n", {}),
        ("---\n- a\n---\n", {}),
        ("---\nlicense: mit\n", {}),
    ],
)
def test_the_licence_is_read_from_a_card(tmp_path, text, found):
    (tmp_path / "README.md").write_bytes(text.encode())
    assert licence_of(tmp_path) == found
