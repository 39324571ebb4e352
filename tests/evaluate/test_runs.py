"""`qlora-kit eval` of tasks other than writing text: what a run trained, its release, and a model alone."""

from __future__ import annotations

import io
import json

import classifiers
import pytest
import text_pairs
from rich.console import Console

from qlora_kit import AdapterConfig, BaseConfig, DataConfig, EvalConfig, OptimConfig, RunConfig, train
from qlora_kit.cli.main import main
from qlora_kit.tasks.questions.metrics import squad_metrics

QUIET = Console(file=io.StringIO())
QUESTIONS = [
    {
        "id": str(number),
        "question": "?",
        "context": f"one two #{word} four",
        "answers": {"text": [word], "answer_start": [9]} if number % 3 else {"text": [], "answer_start": []},
    }
    for number, word in enumerate(["abc", "def", "cab", "bad"] * 4)
]
BASES = {
    "text-classification": (classifiers, "bert", classifiers.ROWS),
    "token-classification": (classifiers, "gpt2", None),
    "question-answering": (classifiers, "bert", QUESTIONS),
    "text2text-generation": (text_pairs, "t5", text_pairs.ROWS),
}


class Workshop:
    """Runs and releases, each made when it is first asked for."""

    def __init__(self, root):
        self.root = root

    def data(self, task):
        module, _, rows = BASES[task]
        if rows is None:
            return classifiers.save_conll(self.root / "a.conll", classifiers.SENTENCES)
        return module.save_rows(self.root / f"{task}.jsonl", rows)

    def run(self, task):
        folder = self.root / f"run-{task}"
        if folder.exists():
            return folder
        module, kind, _ = BASES[task]
        data = str(self.data(task))
        config = RunConfig(
            base=BaseConfig(model=str(module.save_base(self.root / task, kind)), task=task, device="cpu"),
            adapter=AdapterConfig(r=4),
            data=DataConfig(data=data, eval_data=data, seq_len=48),
            optim=OptimConfig(lr=1e-2, schedule="constant", warmup=0.0, batch_size=8, max_steps=6),
            evaluation=EvalConfig(eval_steps=6),
            out=str(folder),
            preflight=False,
        )
        return train(config, QUIET).folder

    def release(self, task):
        folder = self.root / f"release-{task}"
        if not folder.exists():
            main(["merge", "--run", str(self.run(task)), "--out", str(folder), "--dtype", "fp32"])
        return folder


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    return Workshop(tmp_path_factory.mktemp("judging"))


def judged(capsys, *args):
    capsys.readouterr()
    main(["eval", "--device", "cpu", "--json", *map(str, args)])
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("task", list(BASES))
def test_without_data_they_are_the_figures_of_the_run(workshop, capsys, task):
    run = workshop.run(task)
    record = json.loads((run / "run.json").read_text())
    found = judged(capsys, "--run", run)
    assert (found["task"], found["warning"]) == (task, None)
    own = found["models"]["adapter"]
    for name, value in record["results"]["metrics"].items():
        assert own[name] == pytest.approx(value, rel=2**-8), name  # the lean step sums in another order, in bf16
    again = judged(capsys, "--run", run, "--data", workshop.data(task), "--batch-size", 3)["models"]["adapter"]
    sums = {"loss", "perplexity"}  # of floats, which the batch adds up in another order
    assert {name: v for name, v in again.items() if name not in sums} == {
        name: v for name, v in own.items() if name not in sums
    }
    assert all(again[name] == pytest.approx(own[name], rel=2**-8) for name in sums & own.keys())


def test_other_data_is_scored_as_its_answers_say(workshop, capsys, tmp_path):
    """The figures are those that scikit-learn has for the lines of `predict`."""
    from sklearn.metrics import accuracy_score, f1_score

    run, rows = workshop.run("text-classification"), classifiers.ROWS[:11]
    rows = [{**row, "label": {"yes": "no", "no": "yes"}[row["label"]]} if n % 3 else row for n, row in enumerate(rows)]
    data, out = classifiers.save_rows(tmp_path / "other.jsonl", rows), tmp_path / "answers.jsonl"
    main(["predict", "--run", str(run), "--data", str(data), "--out", str(out), "--device", "cpu"])
    answers = [json.loads(line)["label"] for line in out.read_text().splitlines()]
    labels = [row["label"] for row in rows]
    found = judged(capsys, "--run", run, "--data", data)["models"]["adapter"]
    assert found["accuracy"] == pytest.approx(accuracy_score(labels, answers))
    assert found["f1"] == pytest.approx(f1_score(labels, answers, average="macro"))
    assert found["examples"] == 11
    main(["eval", "--run", str(run), "--data", str(data), "--device", "cpu"])
    out = capsys.readouterr().out
    assert f"accuracy {accuracy_score(labels, answers):.1%}" in out
    assert "precision" in out


def test_answers_to_other_questions_are_scored_as_squad_does(workshop, capsys, tmp_path):
    run, rows = workshop.run("question-answering"), QUESTIONS[3:9]
    data, out = classifiers.save_rows(tmp_path / "other.jsonl", rows), tmp_path / "answers.jsonl"
    main(["predict", "--run", str(run), "--data", str(data), "--out", str(out), "--device", "cpu"])
    answers = [json.loads(line)["answer"] for line in out.read_text().splitlines()]
    expected = squad_metrics(answers, [tuple(row["answers"]["text"]) for row in rows])
    found = judged(capsys, "--run", run, "--data", data)["models"]["adapter"]
    for name in ("exact_match", "f1"):
        assert found[name] == pytest.approx(expected[name])


@pytest.mark.parametrize("task", ["text-classification", "token-classification"])
def test_the_release_reaches_the_same(workshop, in_this_process, capsys, task):
    run, release = workshop.run(task), workshop.release(task)
    both = judged(capsys, "--run", run, "--release", release)["models"]
    assert set(both) == {"adapter", "release"}
    assert both["release"]["accuracy"] == pytest.approx(both["adapter"]["accuracy"], abs=0.1)  # fp32 beside bf16
    alone = judged(capsys, "--model", release, "--data", workshop.data(task), "--seq-len", 48)["models"]["model"]
    assert alone["loss"] == pytest.approx(both["release"]["loss"], rel=1e-5)
    assert alone["report"] == both["release"]["report"]


def test_mistakes_are_one_message(workshop, in_this_process, capsys, tmp_path):
    run = workshop.run("text-classification")

    def fails(*args):
        with pytest.raises(SystemExit) as caught:
            main(["eval", "--device", "cpu", *map(str, args)])
        assert caught.value.code == 2
        return capsys.readouterr().err

    strange = classifiers.save_rows(tmp_path / "strange.jsonl", [{"text": "a", "label": "maybe"}])
    said = fails("--run", run, "--data", strange)
    assert "'maybe', which is not among" in said
    assert "Mend the data, or train with all of them named in labels." in said  # `eval` has no --labels
    assert "--exact-match = 3: does not apply to text-classification" in fails("--run", run, "--exact-match", 3)
    tagger = workshop.release("token-classification")
    assert "is for token-classification" in fails("--run", run, "--release", tagger)
    assert "needs --run" in fails("--model", tagger, "--release", tagger, "--data", strange)
