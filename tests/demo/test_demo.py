"""The embedded demo: what the generator gives is what is committed, and the base is what its metrics say."""

import importlib.util
import json
import re
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest

from qlora_kit import demo
from qlora_kit.demo import text


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def make_demo():
    """The script, as a module: its measures are the ones behind `metrics.json`."""
    path = Path(__file__).parents[2] / "scripts" / "make_demo.py"
    spec = importlib.util.spec_from_file_location("make_demo", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(demo.base_folder())


@pytest.fixture(scope="module")
def base():
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(demo.base_folder(), dtype=torch.bfloat16).eval()


@pytest.fixture(scope="module")
def metrics():
    return json.loads((demo.base_folder() / "metrics.json").read_text(encoding="utf-8"))


def test_generators_are_deterministic():
    assert text.task_examples() == text.task_examples()
    first, second, other = (list(islice(text.pretraining_text(seed), 50)) for seed in (1, 1, 2))
    assert first == second
    assert first != other


def test_committed_examples_are_what_the_generator_gives():
    train, evaluation = text.task_examples()
    assert read_lines(demo.train_file()) == train
    assert read_lines(demo.eval_file()) == evaluation
    assert (len(train), len(evaluation)) == (text.TRAIN_EXAMPLES, text.EVAL_EXAMPLES)


def test_held_out_examples_are_not_in_training():
    train, evaluation = text.task_examples()
    for part in ("prompt", "completion"):
        assert not {e[part] for e in train} & {e[part] for e in evaluation}

    def pairs(examples):
        return {tuple(re.match(r"from: (\w+); to: (\w+);", e["completion"]).groups()) for e in examples}

    assert not pairs(train) & pairs(evaluation)
    assert len({e["prompt"] for e in evaluation}) == len(evaluation)


def test_pretraining_never_shows_the_records_form():
    shown = [d for d in islice(text.pretraining_text(text.PRETRAIN_SEED), 5000) if text.RECORD_FIELD.search(d)]
    assert not shown
    assert all(len(text.RECORD_FIELD.findall(e["completion"])) == len(text.KEYS) for e in text.task_examples()[1])
    # nor can a document that was not drawn: no frame or recall has a key before a colon
    assert not any(re.search(rf"\b({'|'.join(text.KEYS)}):", part) for part in text.FRAMES + text.RECALLS)


def test_every_completion_can_be_read_off_its_prompt():
    """An independent reader: the one word of each closed class that the story has, and grammar for the people."""
    for example in [*text.task_examples()[0], *text.task_examples()[1]]:
        assert read_story(example["prompt"]) == example["completion"], example


def read_story(story):
    words = re.findall(r"\w+", story)

    def only(vocabulary):
        (word,) = {w for w in words if w in vocabulary}
        return word

    people = [w for w in words if w in text.NAMES]
    aside = re.search(r"(\w+) (?:was not there|saw it|was there too)\.", story)
    giver, receiver = (w for w in dict.fromkeys(people) if not aside or w != aside[1])
    passive = re.search(rf"\bgot\b.* from {receiver}\b|^.*{giver} (?:lives|asked)\b.*\b(?:him|her)\b", story)
    if passive:
        giver, receiver = receiver, giver
    return text.RECORD.format(
        giver=giver,
        receiver=receiver,
        things=only(text.THINGS),
        colour=only(text.COLOURS),
        count=only(text.COUNTS),
        place=only(text.PLACES),
    )


def test_the_doors_import_nothing_heavy():
    code = "import sys; from qlora_kit.demo import base_folder; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_package_stays_small():
    assert sum(p.stat().st_size for p in demo.base_folder().iterdir()) <= 3_000_000
    assert sum(p.stat().st_size for p in demo.train_file().parent.iterdir()) <= 500_000
    names = {p.name for p in demo.base_folder().iterdir()}
    assert names == {
        "README.md",
        "config.json",
        "generation_config.json",
        "metrics.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_tokenizer_knows_the_toy_language_and_any_other_text(tokenizer):
    words = [*text.NAMES, *text.THINGS, *text.PLACES, *text.COLOURS, *text.COUNTS]
    assert all(len(tokenizer(" " + word)["input_ids"]) == 1 for word in words)
    for probe in (
        *(e["prompt"] + "\n" + e["completion"] for e in text.task_examples()[1]),
        "Zoë paid 3,50 €\t!\r\n 漢字",
    ):
        assert tokenizer.decode(tokenizer(probe)["input_ids"]) == probe
    assert tokenizer.eos_token == "<|endoftext|>"
    assert tokenizer.eos_token not in tokenizer.decode(tokenizer("Anna lives in Oslo.")["input_ids"])


def test_examples_fit_the_models_positions(base, tokenizer):
    lengths = [len(tokenizer(e["prompt"] + "\n" + e["completion"])["input_ids"]) for e in read_lines(demo.train_file())]
    assert max(lengths) < base.config.n_positions // 2


def test_base_is_a_plain_gpt2_whose_layers_fill_nf4_blocks(base, metrics):
    assert type(base).__name__ == "GPT2LMHeadModel"
    assert base.config.activation_function == "gelu_new"
    assert base.lm_head.weight.data_ptr() == base.transformer.wte.weight.data_ptr()
    assert base.num_parameters() == metrics["parameters"]
    assert {base.config.resid_pdrop, base.config.embd_pdrop, base.config.attn_pdrop} == {0.0}
    assert all(p.shape[0] % 64 == 0 and p.shape[1] % 64 == 0 for p in base.transformer.h.parameters() if p.ndim == 2)


def test_base_has_the_loss_that_its_metrics_say(make_demo, base, tokenizer, metrics):
    loss = make_demo.held_out_loss(base, tokenizer)
    assert loss == pytest.approx(metrics["held_out_loss"], abs=0.005)  # bf16 sums differ a little between CPUs
    assert loss < 0.3 * metrics["uniform_loss"]


def test_base_cannot_do_the_task_and_its_readme_says_so(make_demo, base, tokenizer, metrics):
    assert metrics["task_exact_match"] == make_demo.task_exact_match(base, tokenizer) < 0.1
    readme = (demo.base_folder() / "README.md").read_text(encoding="utf-8")
    assert readme == make_demo.README.format(**metrics)


def test_a_failed_remake_leaves_what_was_there(make_demo, tmp_path, monkeypatch):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")

    def fail(folder):
        folder.mkdir()
        raise RuntimeError("no")

    monkeypatch.setattr(make_demo, "write_base", fail)
    with pytest.raises(RuntimeError, match="no"):
        make_demo.make(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["base"]
    assert (tmp_path / "base" / "config.json").read_text() == "{}"


def test_the_check_reports_other_metrics(make_demo, tmp_path, metrics):
    import shutil

    for name in ("base", "data"):
        shutil.copytree(demo.base_folder().parent / name, tmp_path / name)
    assert make_demo.differences(demo.base_folder().parent, tmp_path) == []
    worse = {**metrics, "held_out_loss": metrics["held_out_loss"] + 0.1}
    (tmp_path / "base" / "metrics.json").write_text(json.dumps(worse))
    assert [fault.split()[0] for fault in make_demo.differences(demo.base_folder().parent, tmp_path)] == [
        "held_out_loss"
    ]
