"""Question answering from data to release: trained, asked, merged, and loaded by stock transformers."""

from __future__ import annotations

import dataclasses
import io
import json
import random

import pytest
import torch
from classifiers import DECODERS, save_base, save_rows
from rich.console import Console
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

from qlora_kit import AdapterConfig, BaseConfig, DataConfig, EvalConfig, OptimConfig, RunConfig, train
from qlora_kit.cli.main import main
from qlora_kit.tasks.questions.metrics import squad_metrics

QUIET = Console(file=io.StringIO())
WORDS, LETTERS = 8, 3  # in a context, in a word


def made(count, seed):
    """Contexts of words in which one is marked by a #, the answer; in every fourth none is."""
    draw, rows = random.Random(seed), []
    for number in range(count):
        words = ["".join(draw.choices("abcdefgh", k=LETTERS)) for _ in range(WORDS)]
        answers = {"text": [], "answer_start": []}
        if number % 4:
            place = draw.randrange(WORDS)
            answers = {"text": [words[place]], "answer_start": [place * (LETTERS + 1) + 1]}
            words[place] = f"#{words[place]}"
        rows.append({"id": str(number), "question": "?", "context": " ".join(words), "answers": answers})
    return rows


TRAINING, HELD_OUT = made(128, seed=0), made(32, seed=1)


class Workshop:
    """Bases, data, runs and releases, each made when it is first asked for."""

    def __init__(self, root):
        self.root = root
        self.training = str(save_rows(root / "train.jsonl", TRAINING))
        self.held_out = str(save_rows(root / "eval.jsonl", HELD_OUT))

    def base(self, kind):
        folder = self.root / kind
        return folder if folder.exists() else save_base(folder, kind)

    def config(self, kind, out, bits=4, steps=2, seq_len=64, **groups):
        base = {"model": str(self.base(kind)), "bits": bits, "device": "cpu", "task": "question-answering"}
        return RunConfig(
            base=BaseConfig(**{**base, **groups.pop("base", {})}),
            adapter=AdapterConfig(r=8),
            data=DataConfig(data=self.training, eval_data=self.held_out, seq_len=seq_len),
            optim=OptimConfig(lr=1e-2, schedule="constant", warmup=0.0, batch_size=16, max_steps=steps),
            evaluation=EvalConfig(eval_steps=max(1, steps // 2)),
            out=str(self.root / out),
            preflight=False,
            **groups,
        )

    def run(self, kind):
        out = f"run-{kind}"
        if not (self.root / out).exists():
            train(self.config(kind, out, steps=30 if kind in DECODERS else 8), QUIET)
        return self.root / out


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    return Workshop(tmp_path_factory.mktemp("answers"))


def lines_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_run_learns_to_find_answers_and_that_there_are_none(workshop):
    folder = workshop.run("gpt2")
    metrics = json.loads((folder / "evaluation.json").read_text())["metrics"]
    assert metrics["exact_match_answerable"] >= 0.8  # the base: see the test below
    assert metrics["exact_match_unanswerable"] >= 0.8
    record = json.loads((folder / "run.json").read_text())
    assert record["results"]["metrics"]["f1"] == metrics["f1"]
    assert metrics["examples"] == len(HELD_OUT)
    settings = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert settings["task_type"] == "QUESTION_ANS"
    assert "qa_outputs" in settings["modules_to_save"]


def test_the_base_finds_next_to_nothing(workshop):
    folder = train(workshop.config("gpt2", "untrained", steps=1), QUIET).folder
    assert json.loads((folder / "evaluation.json").read_text())["metrics"]["exact_match_answerable"] <= 0.2


def test_what_the_run_says(workshop):
    said = io.StringIO()
    config = workshop.config("bert", "said", base={"task": None})
    train(config, Console(file=said, width=200))
    text = said.getvalue()
    assert "task: question-answering (as the data and the model say)" in text
    assert "exact match " in text
    assert "unanswerable" in text


@pytest.mark.parametrize("kind", ["roberta", "distilbert", "electra", "t5", "bart"])
@pytest.mark.parametrize("bits", [4, 32])
def test_every_kind_of_encoder_trains(workshop, kind, bits):
    folder = train(workshop.config(kind, f"{kind}-{bits}", bits, seq_len=32), QUIET).folder  # several windows each
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("bits", [8, 16])
def test_the_other_bits_train(workshop, bits):
    train(workshop.config("bert", f"bert-{bits}", bits), QUIET)


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_predictions_are_the_scored_ones_whatever_the_batch(workshop, kind, capsys):
    folder, out = workshop.run(kind), workshop.root / f"{kind}.jsonl"
    main(["predict", "--run", str(folder), "--data", workshop.held_out, "--out", str(out), "--batch-size", "8"])
    lines = lines_of(out)
    assert [line["id"] for line in lines] == [row["id"] for row in HELD_OUT]
    for line, row in zip(lines, HELD_OUT, strict=True):
        assert list(line) == ["id", "question", "answer", "score", "start", "end"]
        assert 0 <= line["score"] <= 1
        if line["start"] is None:
            assert (line["answer"], line["end"]) == ("", None)
        else:
            assert line["answer"] == row["context"][line["start"] : line["end"]]
    found = squad_metrics([line["answer"] for line in lines], [row["answers"]["text"] for row in HELD_OUT])
    metrics = json.loads((folder / "evaluation.json").read_text())["metrics"]
    assert {name: metrics[name] for name in found} == pytest.approx(found)
    capsys.readouterr()
    main(["predict", "--run", str(folder), "--data", workshop.held_out, "--batch-size", "1"])
    one_by_one = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["answer"] for line in one_by_one] == [line["answer"] for line in lines]


def plain_answer(model, tokenizer, row, joint):
    """Each end where its logit is highest in one window; "" where that is no part of the context."""
    encoded = tokenizer(row["question"] + joint, row["context"], return_tensors="pt", return_offsets_mapping=True)
    offsets, parts = encoded.pop("offset_mapping")[0], encoded.sequence_ids(0)
    with torch.no_grad():
        outputs = model(**encoded)
    start, end = int(outputs.start_logits[0].argmax()), int(outputs.end_logits[0].argmax())
    if (parts[start], parts[end]) != (1, 1) or end < start:
        return ""
    return row["context"][offsets[start][0] : offsets[end][1]].strip()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bert", "gpt2", "t5", "bart", "llama"])
def test_the_release_answers_by_plain_argmax_in_stock_transformers(workshop, in_this_process, kind):
    """There is no pipeline for this task in transformers 5. The likeliest ends are the likeliest pair if they fit."""
    release, out = workshop.root / f"release-{kind}", workshop.root / f"released-{kind}.jsonl"
    main(["merge", "--run", str(workshop.run(kind)), "--out", str(release), "--dtype", "fp32"])
    proof = json.loads((release / "merge_report.json").read_text())["proof"]["model"]
    assert proof["exact"]["agreement"] == 1.0
    assert proof["task"] == "question-answering"
    main(["predict", "--model", str(release), "--data", workshop.held_out, "--out", str(out)])
    model = AutoModelForQuestionAnswering.from_pretrained(release).eval()
    tokenizer = AutoTokenizer.from_pretrained(release)
    plain = [plain_answer(model, tokenizer, row, "\n" if kind in DECODERS else "") for row in HELD_OUT]
    same = [line["answer"] == answer for line, answer in zip(lines_of(out), plain, strict=True) if answer]
    assert len(same) >= (16 if kind == "gpt2" else 1)
    assert all(same)


def test_a_release_in_nf4_passes_its_proof(workshop, in_this_process):
    out = workshop.root / "nf4"
    main(["merge", "--run", str(workshop.run("bert")), "--out", str(out), "--dtype", "fp32", "--format", "nf4"])
    assert type(AutoModelForQuestionAnswering.from_pretrained(out).qa_outputs) is torch.nn.Linear
    assert "AutoModelForQuestionAnswering" in (out / "README.md").read_text()


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_the_profile_of_real_steps_agrees_with_the_plan_of_them(workshop, kind):
    config = workshop.config(kind, f"profiled-{kind}", bits=32, profile=True)
    config = dataclasses.replace(config, optim=OptimConfig(batch_size=4, max_steps=3, gradient_checkpointing=False))
    profile = json.loads((train(config, QUIET).folder / "profile.json").read_text())
    assert profile["predicted"]["peak_bytes"] == pytest.approx(profile["peak_bytes"], rel=0.01)


def test_a_run_follows_the_metric_it_is_told(workshop):
    config = workshop.config("gpt2", "followed", steps=4)
    config = dataclasses.replace(config, evaluation=EvalConfig(eval_steps=2, metric="exact_match"))
    folder = train(config, QUIET).folder
    values = [line["eval_exact_match"] for line in lines_of(folder / "metrics.jsonl") if "eval_exact_match" in line]
    assert json.loads((folder / "evaluation.json").read_text())["metrics"]["exact_match"] == max(values)


def fails(capsys, *args):
    with pytest.raises(SystemExit) as caught:
        main(list(args))
    assert caught.value.code == 2
    return capsys.readouterr().err


def test_bad_input_is_one_message(workshop, capsys, tmp_path):
    bert, out = str(workshop.base("bert")), tmp_path / "run"
    right = HELD_OUT[1]
    wrong = {**right, "answers": {"text": ["zzz"], "answer_start": [0]}}
    train_on = ("train", "--model", bert, "--out", str(out), "--data")
    assert "a.jsonl:2" in (said := fails(capsys, *train_on, str(save_rows(tmp_path / "a.jsonl", [right, wrong]))))
    assert "'zzz' is not at character 0 of its context" in said
    none = str(save_rows(tmp_path / "none.jsonl", [HELD_OUT[0]]))
    assert "has no answer in any example" in fails(capsys, *train_on, none)
    long = str(save_rows(tmp_path / "long.jsonl", [right, {**right, "question": "?" * 200}]))
    assert "long.jsonl:2" in (said := fails(capsys, *train_on, long))
    assert "has a question of 203 tokens, and 50% of the 128 of --seq-len" in said
    said = fails(capsys, *train_on, workshop.held_out, "--labels", "a,b", "--multi-label", "true")
    assert "--labels = 'a,b': does not apply to --task question-answering" in said
    assert "--multi-label = True: does not apply" in said
    assert "is not a metric of question-answering" in fails(
        capsys, *train_on, workshop.held_out, "--eval-data", workshop.held_out, "--metric", "accuracy"
    )
    assert not out.exists()


def test_a_question_that_is_too_long_to_be_answered_is_named(workshop, capsys, tmp_path):
    asked = {name: HELD_OUT[1][name] for name in ("question", "context")}
    long = save_rows(tmp_path / "long.jsonl", [asked, {**asked, "question": "?" * 200}, asked])
    said = fails(capsys, "predict", "--run", str(workshop.run("bert")), "--data", str(long))
    assert f"--data = '{long}:2': has a question of 203 tokens" in said
    assert "Shorten it, or raise --seq-len" in said


def test_preview_audits_answers(workshop, capsys, tmp_path):
    data = str(save_rows(tmp_path / "a.jsonl", [*HELD_OUT[:4], HELD_OUT[1]]))
    main(["preview", "--model", str(workshop.base("bert")), "--data", data, "--rows", "2", "--seq-len", "32"])
    shown = " ".join(capsys.readouterr().out.split())
    assert f"«{HELD_OUT[1]['answers']['text'][0]}»" in shown
    assert shown.count("«no answer»") == 1  # in the window without it
    assert "window 1 of 2" in shown
    assert "with an answer │ 4 (80.0%)" in shown
    assert "windows to an example: mean / max │ 2.00 / 2" in shown
    assert "duplicates │ 1" in shown
