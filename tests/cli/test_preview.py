"""The preview shows each token, marked without colour too, and the audit."""

import json

import pytest
from data_tokenizers import EOS, byte_level, sentence_piece

from qlora_kit.cli.preview import preview
from qlora_kit.config.settings import DataConfig, RunConfig
from qlora_kit.errors import UserError


@pytest.fixture
def tokenizer(monkeypatch):
    made = byte_level()
    monkeypatch.setattr("qlora_kit.model.tokenizer.load_tokenizer", lambda config: made)
    monkeypatch.setattr("qlora_kit.model.source.load_model_config", lambda config: None)
    monkeypatch.setattr("qlora_kit.model.source.max_positions", lambda architecture: 128)
    return made


def config_for(tmp_path, **settings):
    path = tmp_path / "a.jsonl"
    rows = [{"prompt": "[b]q", "completion": f"é\n{number}"} for number in range(5)]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0]]), encoding="utf-8")
    return RunConfig(data=DataConfig(data=str(path), seq_len=64, **settings))


def test_tokens_and_audit(tmp_path, tokenizer, capsys):
    preview(config_for(tmp_path, pack=True), (2,))
    shown = capsys.readouterr().out
    assert "[|b|]|q|\\n|" in shown  # no markup, and unsupervised
    assert f"«\\n»«1»«{EOS}»" in shown
    assert "«Ã»«©»" in shown  # the two bytes of one character
    assert "a.jsonl:2): 10 tokens, 5 supervised" in shown
    for line in ("examples", "truncated to 64 tokens", "duplicates", "packed rows", "nothing supervised"):
        assert line in shown
    assert "\x1b" not in shown


def test_held_out_data_is_audited_too(tmp_path, tokenizer, capsys):
    config = config_for(tmp_path, eval_data=str(tmp_path / "a.jsonl"))
    preview(config, (1,))
    assert "Audit of --eval-data" in capsys.readouterr().out


def test_space_marks_are_shown(tmp_path, monkeypatch, capsys, tokenizer):
    made = sentence_piece("first")
    monkeypatch.setattr("qlora_kit.model.tokenizer.load_tokenizer", lambda config: made)
    (tmp_path / "b.txt").write_text("The answer is 42.\n", encoding="utf-8")
    preview(RunConfig(data=DataConfig(data=str(tmp_path / "b.txt"), seq_len=64)))
    assert "·" in capsys.readouterr().out


def test_rows_outside_the_data_are_refused(tmp_path, tokenizer):
    with pytest.raises(UserError) as caught:
        preview(config_for(tmp_path), (0, 1, 9))
    assert [(fault.setting, fault.value) for fault in caught.value.faults] == [("rows", 0), ("rows", 9)]
