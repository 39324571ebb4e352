"""A classifier from data to release: trained, resumed, asked, merged, and loaded by stock transformers."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from classifiers import PAIRS, ROWS, SEVERAL, save_base, save_rows
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, pipeline

from qlora_kit import (
    AdapterConfig,
    BaseConfig,
    DataConfig,
    EvalConfig,
    OptimConfig,
    RunConfig,
    UserError,
    train,
)
from qlora_kit.cli.main import main

QUIET = Console(file=io.StringIO())


class Workshop:
    """Bases, data, runs and releases, each made when it is first asked for."""

    def __init__(self, root):
        self.root = root

    def base(self, kind):
        folder = self.root / kind
        return folder if folder.exists() else save_base(folder, kind)

    def config(self, kind, rows=ROWS, bits=4, out="run", **groups):
        base = {"model": str(self.base(kind)), "bits": bits, "device": "cpu", **groups.pop("base", {})}
        name = f"{id(rows)}.jsonl"
        data = str(save_rows(self.root / name, rows))
        return RunConfig(
            base=BaseConfig(**base),
            adapter=AdapterConfig(r=4),
            data=DataConfig(data=data, eval_data=data, seq_len=64, **groups.pop("data", {})),
            optim=OptimConfig(
                lr=2e-2, schedule="constant", warmup=0.0, batch_size=8, **{"max_steps": 9, **groups.pop("optim", {})}
            ),
            evaluation=EvalConfig(**{"eval_steps": 3, **groups.pop("evaluation", {})}),
            out=str(self.root / out),
            preflight=False,
            **groups,
        )

    def run(self, kind):
        out = f"run-{kind}"
        if not (self.root / out).exists():
            train(self.config(kind, out=out), QUIET)
        return self.root / out


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    return Workshop(tmp_path_factory.mktemp("classification"))


def record_of(folder):
    return json.loads((folder / "run.json").read_text())


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_a_run_learns_and_leaves_its_labels_and_its_report(workshop, kind):
    folder = workshop.run(kind)
    record = record_of(folder)
    own = record["settings"]["base"]
    assert (own["task"], own["labels"], own["multi_label"]) == ("text-classification", ["no", "yes"], False)
    assert record["results"]["metrics"]["accuracy"] >= 0.9
    assert json.loads((folder / "adapter" / "labels.json").read_text())["labels"] == ["no", "yes"]
    report = json.loads((folder / "evaluation.json").read_text())
    assert set(report["report"]) >= {"no", "yes", "macro avg", "weighted avg"}
    assert sum(map(sum, report["confusion"])) == 24
    assert (folder / "confusion.png").stat().st_size > 1000
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval_f1" in line] == [3, 6, 9]
    assert report["metrics"]["f1"] == max(line["eval_f1"] for line in lines if "eval_f1" in line)
    assert "sample" not in {key for line in lines for key in line}


def test_what_the_run_says(workshop):
    said = io.StringIO()
    train(workshop.config("bert", out="said", optim={"max_steps": 2}), Console(file=said, width=200))
    text = said.getvalue()
    assert "task: text-classification (as the data and the model say): 2 labels, no, yes" in text
    assert "held-out loss" in text
    assert "accuracy" in text
    assert "precision" in text
    assert "attention is not causal everywhere" in text


def test_a_resumed_run_is_the_same_run(workshop):
    whole = workshop.config("bert", out="whole", evaluation={"keep_best": False, "keep_checkpoints": 9})
    train(whole, QUIET)
    again = dataclasses.replace(whole, out=str(workshop.root / "again"))
    shutil.copytree(workshop.root / "whole", workshop.root / "part")
    for step in (6, 9):
        shutil.rmtree(workshop.root / "part" / "checkpoints" / f"checkpoint-{step}")
    train(dataclasses.replace(again, resume=str(workshop.root / "part")), QUIET)
    one, other = (
        load_file(workshop.root / name / "adapter" / "adapter_model.safetensors") for name in ("whole", "again")
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_best_checkpoint_by_the_metric_is_kept(workshop):
    """Held-out labels that say the opposite: what learns gets worse, and the first evaluation was the best."""
    opposite = [{**row, "label": {"yes": "no", "no": "yes"}[row["label"]]} for row in ROWS]
    config = workshop.config(
        "bert", out="by-loss", evaluation={"metric": "loss", "eval_steps": 3, "keep_checkpoints": 9}
    )
    held_out = str(save_rows(workshop.root / "opposite.jsonl", opposite))
    folder = train(dataclasses.replace(config, data=dataclasses.replace(config.data, eval_data=held_out)), QUIET).folder
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}
    best = min(losses, key=losses.get)
    assert best < max(losses) == 9
    assert record_of(folder)["results"]["metrics"]["loss"] == losses[best]
    kept = load_file(folder / "adapter" / "adapter_model.safetensors")
    for step in losses:
        own = load_file(folder / "checkpoints" / f"checkpoint-{step}" / "adapter_model.safetensors")
        assert all(torch.equal(kept[name], own[name]) for name in kept) == (step == best)


def test_class_weights_are_the_inverse_of_the_frequency(workshop, monkeypatch):
    from qlora_kit.model import heads

    seen = []
    forward = heads.TaskLoss.forward
    monkeypatch.setattr(
        heads.TaskLoss, "forward", lambda self, *args: (seen.append(self.weights), forward(self, *args))[1]
    )
    config = workshop.config("bert", out="weighted", optim={"max_steps": 2, "class_weights": "balanced"})
    train(config, QUIET)
    assert seen[0].tolist() == pytest.approx([24 / (2 * 8), 24 / (2 * 16)])


def test_pairs_several_labels_and_numbers(workshop):
    folder = train(workshop.config("bert", PAIRS, out="pairs", optim={"max_steps": 2}), QUIET).folder
    assert record_of(folder)["settings"]["base"]["labels"] == ["0", "1"]
    folder = train(workshop.config("gpt2", SEVERAL, out="several", optim={"max_steps": 2}), QUIET).folder
    own = record_of(folder)["settings"]["base"]
    assert (own["labels"], own["multi_label"]) == (["three", "two"], True)
    main(["predict", "--run", str(folder), "--data", str(save_rows(workshop.root / "q.jsonl", SEVERAL))])


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_predictions_are_those_of_stock_peft(workshop, kind, capsys):
    folder = workshop.run(kind)
    out = workshop.root / f"{kind}.jsonl"
    asked = save_rows(workshop.root / "asked.jsonl", [{"text": row["text"], "note": 1} for row in ROWS[:9]])
    main(["predict", "--run", str(folder), "--data", str(asked), "--out", str(out), "--batch-size", "4"])
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["text"] for line in lines] == [row["text"] for row in ROWS[:9]]
    assert sum(line["label"] == row["label"] for line, row in zip(lines, ROWS, strict=False)) >= 8
    main(["predict", "--run", str(folder), "--data", str(asked), "--batch-size", "1"])
    printed, said = capsys.readouterr()
    one_by_one = [json.loads(line) for line in printed.splitlines()]
    assert [line["label"] for line in one_by_one] == [line["label"] for line in lines]
    assert "not read of the data: note (9 records)" in said


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_a_release_in_nf4_passes_its_proof(workshop, in_this_process, kind):
    out = workshop.root / f"nf4-{kind}"
    main(["merge", "--run", str(workshop.run(kind)), "--out", str(out), "--dtype", "fp32", "--format", "nf4"])
    model = AutoModelForSequenceClassification.from_pretrained(out)
    head = model.classifier if kind == "bert" else model.score
    assert type(head) is torch.nn.Linear


METHODS = [
    *({"init": init} for init in ("gaussian", "orthogonal", "pissa", "olora", "loftq", "eva")),
    {"variant": "lora-xs"},
    *({"adversarial": kind} for kind in ("fgm", "pgd")),
    {"neftune": 5.0},
    {"rank_penalty": 1e-2},
]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_every_way_to_train_leaves_a_release_that_passes_its_proof(workshop, in_this_process, tmp_path, method):
    """With a head that trains in full beside the factors."""
    config = workshop.config("bert", out=str(tmp_path / "run"), optim={"max_steps": 3}, evaluation={"eval_steps": 3})
    own = {"adapter_dtype": "fp32", **method} if {"init", "variant"} & set(method) else {}
    regularized = {} if own else method
    config = dataclasses.replace(
        config,
        adapter=dataclasses.replace(config.adapter, **own),
        optim=dataclasses.replace(config.optim, **regularized),
    )
    folder = train(config, QUIET).folder
    release = tmp_path / "release"
    main(["merge", "--run", str(folder), "--out", str(release), "--dtype", "fp32"])
    report = json.loads((release / "merge_report.json").read_text())
    assert report["proof"]["model"]["exact"]["agreement"] == 1.0
    saved = load_file(folder / "adapter" / "adapter_model.safetensors")
    head = AutoModelForSequenceClassification.from_pretrained(release).classifier.weight
    assert torch.equal(head, saved["base_model.model.classifier.weight"])


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_the_release_answers_in_a_pipeline_as_the_run_does(workshop, in_this_process, kind):
    folder = workshop.run(kind)
    release = workshop.root / f"release-{kind}"
    main(["merge", "--run", str(folder), "--out", str(release), "--dtype", "fp32"])
    report = json.loads((release / "merge_report.json").read_text())
    assert report["proof"]["model"]["exact"]["agreement"] == 1.0
    assert report["proof"]["model"]["task"] == "text-classification"
    config = json.loads((release / "config.json").read_text())
    assert config["id2label"] == {"0": "no", "1": "yes"}
    classify = pipeline("text-classification", model=str(release), device="cpu", top_k=None)
    texts = [row["text"] for row in ROWS[:9]]
    found = [{own["label"]: own["score"] for own in one} for one in classify(texts)]
    asked = save_rows(workshop.root / "asked.jsonl", [{"text": text} for text in texts])
    out = workshop.root / "from-release.jsonl"
    main(["predict", "--model", str(release), "--data", str(asked), "--out", str(out)])
    for line, scores in zip(out.read_text().splitlines(), found, strict=True):
        assert json.loads(line)["scores"] == pytest.approx(scores, abs=1e-5)


def test_the_card_says_how_a_pipeline_is_given_a_pair(workshop, in_this_process, tmp_path):
    """Two texts run together in it where the tokenizer puts nothing between them; training puts a newline there."""
    folder = train(workshop.config("gpt2", PAIRS, out="joined-pairs", optim={"max_steps": 2}), QUIET).folder
    release = tmp_path / "release"
    main(["merge", "--run", str(folder), "--out", str(release), "--dtype", "fp32"])
    assert 'classify(f"{text}\\n{pair}")' in (release / "README.md").read_text()
    out = tmp_path / "answers.jsonl"
    data = str(save_rows(tmp_path / "pairs.jsonl", PAIRS))
    main(["predict", "--model", str(release), "--data", data, "--out", str(out)])
    classify = pipeline("text-classification", model=str(release), device="cpu", top_k=None)
    for line, row in zip(out.read_text().splitlines(), PAIRS, strict=True):
        (one,) = classify([f"{row['sentence1']}\n{row['sentence2']}"])
        found = {own["label"]: own["score"] for own in one}
        assert json.loads(line)["scores"] == pytest.approx(found, abs=1e-5)


def fails(workshop, capsys, *args):
    with pytest.raises(SystemExit) as caught:
        main(list(args))
    assert caught.value.code == 2
    return capsys.readouterr().err


def test_bad_input_is_one_message(workshop, capsys, tmp_path):
    bert, rows = str(workshop.base("bert")), [{"text": "a", "label": "x"}, {"text": "b", "label": "x"}]
    one_class = str(save_rows(tmp_path / "one.jsonl", rows))
    assert "has only the label 'x'" in fails(workshop, capsys, "train", "--model", bert, "--data", one_class)
    data = str(save_rows(tmp_path / "two.jsonl", ROWS))
    strange = str(save_rows(tmp_path / "strange.jsonl", [{"text": "a", "label": "never"}]))
    args = ("train", "--model", bert, "--data", data, "--out", str(tmp_path / "run"))
    assert "has the label 'never'" in fails(workshop, capsys, *args, "--eval-data", strange)
    assert "is not a metric of text-classification" in fails(
        workshop, capsys, *args, "--eval-data", data, "--metric", "bleu"
    )
    assert "--pack" in fails(workshop, capsys, *args, "--pack")
    assert "generates no text" in fails(workshop, capsys, *args, "--task", "text-generation", "--columns", "text=text")
    assert not (tmp_path / "run").exists()
    run = str(workshop.run("bert"))
    assert "Use `qlora-kit predict`" in fails(workshop, capsys, "generate", "--run", run, "--prompt", "a")
    assert "--data" in fails(workshop, capsys, "predict", "--run", run)
    before = Path(data).read_text()
    assert "would be lost" in fails(workshop, capsys, "predict", "--run", run, "--data", data, "--out", data)
    assert Path(data).read_text() == before
    assert "has no head" in fails(workshop, capsys, "predict", "--model", bert, "--data", data)


def test_labels_that_do_not_belong_to_the_weights_are_noticed(workshop, tmp_path, capsys):
    shutil.copytree(workshop.run("bert"), tmp_path / "run")
    file = tmp_path / "run" / "adapter" / "labels.json"
    file.write_text(file.read_text().replace('"no"', '"na"'))
    with pytest.raises(SystemExit):
        main(["predict", "--run", str(tmp_path / "run"), "--data", str(save_rows(tmp_path / "q.jsonl", ROWS))])
    assert "name different labels" in capsys.readouterr().err


def test_preview_audits_labels(workshop, tmp_path, capsys):
    data, held_out = (
        save_rows(tmp_path / "a.jsonl", ROWS),
        save_rows(tmp_path / "b.jsonl", [{"text": "a", "label": "z"}]),
    )
    main(["preview", "--model", str(workshop.base("bert")), "--data", str(data), "--eval-data", str(held_out)])
    shown = capsys.readouterr().out
    assert "«no»" in shown
    assert "label yes" in shown
    assert "16 (66.7%)" in shown
    assert "z (1)" in shown


def test_a_class_that_is_needed_is_needed(workshop):
    config = workshop.config("bert", out="explicit", base={"labels": ("yes", "no", "maybe")}, optim={"max_steps": 1})
    assert record_of(train(config, QUIET).folder)["settings"]["base"]["labels"] == ["yes", "no", "maybe"]
    with pytest.raises(UserError, match="not among"):
        train(workshop.config("bert", out="wrong", base={"labels": ("yes", "maybe")}), QUIET)
