"""A tagger from data to release: trained, asked, merged, and loaded by stock transformers."""

from __future__ import annotations

import dataclasses
import io
import json

import pyarrow.parquet
import pytest
import torch
from classifiers import SENTENCES, save_base, save_conll, save_rows, tokenizer_of
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForTokenClassification, pipeline

from qlora_kit import AdapterConfig, BaseConfig, DataConfig, EvalConfig, OptimConfig, RunConfig, train
from qlora_kit.cli.main import main
from qlora_kit.memory.plan import plan
from qlora_kit.tasks.tagging.pieces import split

QUIET = Console(file=io.StringIO())
LABELS = ["O", "B-person", "I-person", "B-place"]


class Workshop:
    """Bases, data and runs, each made when it is first asked for."""

    def __init__(self, root):
        self.root = root
        self.data = save_conll(root / "a.conll", SENTENCES)

    def base(self, kind):
        folder = self.root / kind
        return folder if folder.exists() else save_base(folder, kind)

    def config(self, kind, bits=4, out="run", **optim):
        return RunConfig(
            base=BaseConfig(model=str(self.base(kind)), bits=bits, device="cpu"),
            adapter=AdapterConfig(r=4),
            data=DataConfig(data=str(self.data), eval_data=str(self.data), seq_len=64),
            optim=OptimConfig(
                **{"lr": 2e-2, "schedule": "constant", "warmup": 0.0, "batch_size": 8, "max_steps": 9, **optim}
            ),
            evaluation=EvalConfig(eval_steps=3),
            out=str(self.root / out),
            preflight=False,
        )

    def run(self, kind):
        out = f"run-{kind}"
        if not (self.root / out).exists():
            train(self.config(kind, out=out), QUIET)
        return self.root / out


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    return Workshop(tmp_path_factory.mktemp("tagging"))


def lines_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_a_run_learns_and_leaves_its_labels_and_its_report(workshop, kind):
    folder = workshop.run(kind)
    record = json.loads((folder / "run.json").read_text())
    own = record["settings"]["base"]
    assert (own["task"], own["labels"], own["multi_label"]) == ("token-classification", LABELS, False)
    assert record["results"]["metrics"]["f1"] >= 0.7
    assert json.loads((folder / "adapter" / "labels.json").read_text())["labels"] == LABELS
    assert json.loads((folder / "adapter" / "adapter_config.json").read_text())["task_type"] == "TOKEN_CLS"
    report = json.loads((folder / "evaluation.json").read_text())
    assert set(report["report"]) >= {"person", "place", "micro avg", "macro avg"}
    assert report["report"]["person"]["support"] == 12
    assert report["words"] == sum(len(row["tokens"]) for row in SENTENCES)
    evaluated = [line for line in lines_of(folder / "metrics.jsonl") if "eval_f1" in line]
    assert [line["step"] for line in evaluated] == [3, 6, 9]
    assert report["metrics"]["f1"] == max(line["eval_f1"] for line in evaluated)


@pytest.mark.parametrize(
    ("kind", "bits"),
    [("roberta", 16), ("distilbert", 8), ("electra", 32), ("llama", 4), ("qwen2", 32), ("gpt2", 16), ("t5", 4)],
)
def test_other_models_and_bits(workshop, kind, bits):
    config = workshop.config(kind, bits, out=f"{kind}-{bits}", max_steps=2)
    config = dataclasses.replace(config, base=dataclasses.replace(config.base, task="token-classification"))
    folder = train(config, QUIET).folder
    saved = load_file(folder / "adapter" / "adapter_model.safetensors")
    (head,) = (weight for name, weight in saved.items() if "lora" not in name and weight.ndim == 2)
    assert head.shape == (len(LABELS), 64)
    assert head.dtype == torch.float32
    resolved = dataclasses.replace(config.base, labels=tuple(LABELS))
    assert {"forward", "loss", "backward"} <= set(plan(dataclasses.replace(config, base=resolved)).phases)


def test_the_profile_of_real_steps_agrees_with_the_plan_of_them(workshop):
    config = dataclasses.replace(workshop.config("gpt2", 32, out="profiled", max_steps=3), profile=True)
    profile = json.loads((train(config, QUIET).folder / "profile.json").read_text())
    assert profile["predicted"]["peak_bytes"] == pytest.approx(profile["peak_bytes"], rel=0.01)


def test_numbers_with_their_names_and_weights_by_frequency(workshop):
    names = ("O", "B-place", "B-person", "I-person")
    rows = [{"tokens": row["tokens"], "ner_tags": [names.index(tag) for tag in row["tags"]]} for row in SENTENCES]
    data = workshop.root / "numbers.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), data)
    config = workshop.config("bert", 32, out="numbers", max_steps=1, class_weights="balanced")
    config = dataclasses.replace(
        config,
        base=dataclasses.replace(config.base, labels=names),
        data=dataclasses.replace(config.data, data=str(data), eval_data=None, eval_fraction=0.25),
    )
    folder = train(config, QUIET).folder
    assert json.loads((folder / "adapter" / "labels.json").read_text())["labels"] == list(names)


def test_accumulated_batches_are_one_batch(workshop):
    """Sentences of different lengths: the mean is over their words, however they fall into batches."""
    ends = []
    for name, batch, times in (("whole", 8, 1), ("parts", 2, 4)):
        config = workshop.config(
            "llama", 32, out=name, batch_size=batch, grad_accum=times, max_steps=1, lr=1.0, optim="sgd"
        )  # after one step of SGD a factor B is its gradient
        config = dataclasses.replace(config, adapter=AdapterConfig(r=4, adapter_dtype="fp32"))
        ends.append(load_file(train(config, QUIET).folder / "adapter" / "adapter_model.safetensors"))
    factors = [name for name in ends[0] if "lora_B" in name]
    assert max(float(ends[0][name].abs().max()) for name in factors) > 1e-3
    for name in factors:  # 30 words' gradients summed in another order, in fp32
        largest = float(ends[0][name].abs().max())
        assert torch.allclose(ends[0][name], ends[1][name], rtol=0, atol=1e-4 * largest), name


def test_predictions_name_tags_and_entities(workshop, tmp_path, capsys):
    folder, out = workshop.run("bert"), tmp_path / "out.jsonl"
    asked = save_conll(tmp_path / "q.conll", [{"tokens": row["tokens"]} for row in SENTENCES[:5]])
    main(["predict", "--run", str(folder), "--data", str(asked), "--out", str(out), "--batch-size", "4"])
    found = lines_of(out)
    assert [line["tokens"] for line in found] == [row["tokens"] for row in SENTENCES[:5]]
    assert [line["tags"] for line in found] == [row["tags"] for row in SENTENCES[:5]]
    first = found[0]["entities"][0]
    assert (first["type"], first["text"], first["start"], first["end"]) == ("person", "Ann Lee", 1, 3)
    assert first["score"] == pytest.approx(sum(found[0]["scores"][1:3]) / 2)
    texts = save_rows(tmp_path / "q.jsonl", [{"text": " ".join(row["tokens"])} for row in SENTENCES[:5]])
    capsys.readouterr()
    main(["predict", "--run", str(folder), "--data", str(texts), "--batch-size", "1"])
    again = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["tags"] for line in again] == [line["tags"] for line in found]


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_the_release_answers_in_a_pipeline_as_the_run_does(workshop, in_this_process, tmp_path, kind):
    release = tmp_path / "release"
    main(["merge", "--run", str(workshop.run(kind)), "--out", str(release), "--dtype", "fp32"])
    report = json.loads((release / "merge_report.json").read_text())
    assert report["proof"]["model"]["exact"]["agreement"] == 1.0
    assert report["proof"]["model"]["exact"]["supervised"] > 0
    assert json.loads((release / "config.json").read_text())["id2label"] == {
        str(n): own for n, own in enumerate(LABELS)
    }
    texts = save_rows(tmp_path / "q.jsonl", [{"text": " ".join(row["tokens"])} for row in SENTENCES])
    main(["predict", "--model", str(release), "--data", str(texts), "--out", str(tmp_path / "out.jsonl")])
    tag = pipeline("token-classification", model=str(release), device="cpu", ignore_labels=[])
    for line in lines_of(tmp_path / "out.jsonl"):
        by_place = {piece["index"]: piece for piece in tag(" ".join(line["tokens"]))}
        own = [by_place[first] for first in split(line["tokens"], tokenizer_of(kind), 64).firsts]
        assert [piece["entity"] for piece in own] == line["tags"]
        assert [piece["score"] for piece in own] == pytest.approx(line["scores"], abs=1e-5)


def test_a_release_in_nf4_passes_its_proof(workshop, in_this_process, tmp_path):
    out = tmp_path / "nf4"
    main(["merge", "--run", str(workshop.run("bert")), "--out", str(out), "--dtype", "fp32", "--format", "nf4"])
    assert type(AutoModelForTokenClassification.from_pretrained(out).classifier) is torch.nn.Linear


def fails(capsys, *args):
    with pytest.raises(SystemExit) as caught:
        main(list(args))
    assert caught.value.code == 2
    return capsys.readouterr().err


def test_bad_input_is_one_message(workshop, capsys, tmp_path):
    bert, data, out = str(workshop.base("bert")), str(workshop.data), str(tmp_path / "run")
    args = ("train", "--model", bert, "--out", out)
    unequal = save_rows(tmp_path / "unequal.jsonl", [{"tokens": ["a", "b"], "tags": ["O"]}])
    assert f"{unequal}:1': has 2 words and 1 tags" in fails(capsys, *args, "--data", str(unequal))
    strange = str(save_conll(tmp_path / "strange.conll", [{"tokens": ["a"], "tags": ["B-ship"]}]))
    told = fails(capsys, *args, "--data", data, "--eval-data", strange)
    assert "strange.conll:1" in told
    assert "has the tag 'B-ship' (a), which is not among O, B-person" in told
    torn = tmp_path / "torn.conll"
    torn.write_text("a\tO\nb\n")
    assert "torn.conll:2" in fails(capsys, *args, "--data", str(torn))
    by_bleu = ("--eval-data", data, "--metric", "bleu")
    assert "is not a metric of token-classification" in fails(capsys, *args, "--data", data, *by_bleu)
    assert "--pack" in fails(capsys, *args, "--data", data, "--pack")
    assert "has no head for token-classification" in fails(
        capsys, "train", "--model", str(workshop.base("bart")), "--data", data, "--out", out
    )
    assert "no column of words" in fails(
        capsys, *args, "--task", "token-classification", "--data", str(save_rows(tmp_path / "t.jsonl", [{"text": "a"}]))
    )
    run = str(workshop.run("bert"))
    assert "no column of words" in fails(
        capsys, "predict", "--run", run, "--data", str(save_rows(tmp_path / "x.jsonl", [{"body": "a"}]))
    )
    assert not (tmp_path / "run").exists()


def test_preview_audits_tags(workshop, tmp_path, capsys):
    held_out = save_conll(
        tmp_path / "b.conll", [{"tokens": ["a"], "tags": ["B-ship"]}, {"tokens": ["b"], "tags": ["O"]}]
    )
    sets = ["--data", str(workshop.data), "--eval-data", str(held_out)]
    main(["preview", "--model", str(workshop.base("bert")), *sets, "--seq-len", "9"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "«hi/O Ann/B-person»" in shown  # and nothing of the words that are cut off
    assert "entities person │ 12 (50.0%)" in shown
    assert "B-ship (1)" in shown
    assert "entities cut off or cut short │ 6" in shown
