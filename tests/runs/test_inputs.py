"""What a run reads of its data: the share that is held out, and what both parts decide."""

from __future__ import annotations

from classifiers import save_base, save_rows

from qlora_kit import BaseConfig, DataConfig, RunConfig
from qlora_kit.errors import UserError
from qlora_kit.runs.inputs import read_inputs


def test_labels_of_the_share_that_is_held_out_count_too(tmp_path):
    """Chance decides where a rare label goes: it is one of the data's all the same."""
    data = save_rows(tmp_path / "a.jsonl", [{"text": f"t{i}", "label": f"{i}"} for i in range(20)])
    config = RunConfig(
        base=BaseConfig(model=str(save_base(tmp_path / "base", "bert"))),
        data=DataConfig(data=str(data), eval_fraction=0.3),
    )
    inputs = read_inputs(config)
    assert inputs.config.base.labels == tuple(map(str, range(20)))
    assert (len(inputs.train), len(inputs.evaluation)) == (14, 6)


def test_a_share_to_train_on_of_one_label_is_refused(tmp_path):
    rows = [{"text": "a", "label": "x"} for _ in range(9)] + [{"text": "b", "label": "y"}]
    data = save_rows(tmp_path / "a.jsonl", rows)
    base = BaseConfig(model=str(save_base(tmp_path / "base", "bert")))
    told = []
    for seed in range(20):
        try:
            read_inputs(RunConfig(base=base, data=DataConfig(data=str(data), eval_fraction=0.5), seed=seed))
        except UserError as error:
            told.append(str(error))
    assert 0 < len(told) < 20  # where the one y is held out, and there alone
    assert all("has only the label 'x' in its 5 examples" in said for said in told)
