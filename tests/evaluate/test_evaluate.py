"""`qlora-kit eval`: base, what was trained, and a release, on the same tokens."""

from __future__ import annotations

import gc
import io
import json
import math
import shutil
import weakref

import pytest
import torch
from families import save_tiny, tiny_tokenizer
from peft import PeftModel
from rich.console import Console
from tiny_runs import PAIRS, TEXTS
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qlora_kit import data
from qlora_kit.cli.main import main
from qlora_kit.evaluate import evaluate
from qlora_kit.model import quantize
from qlora_kit.runs import finished

QUIET = Console(file=io.StringIO())


def evaluated(capsys, *args: object) -> dict:
    main(["eval", "--device", "cpu", "--json", *map(str, args)])
    return json.loads(capsys.readouterr().out)


def fails(capsys, *args: object) -> str:
    with pytest.raises(SystemExit) as caught:
        main(["eval", "--device", "cpu", *map(str, args)])
    out, err = capsys.readouterr()
    assert caught.value.code == 2, err
    assert "Traceback" not in err
    assert not out
    return err


def stock_loss(model, rows) -> tuple[float, int]:
    """The mean over supervised tokens, one example and one token at a time, and their number."""
    total, count = 0.0, 0
    for row in rows:
        with torch.no_grad():
            log_p = model(torch.tensor([row.input_ids])).logits[0].float().log_softmax(-1)
        for place in range(1, len(row.input_ids)):
            if row.supervised[place]:
                total -= float(log_p[place - 1, row.input_ids[place]])
                count += 1
    return total / count, count


def stock_exact_match(model, tokenizer, examples) -> float:
    right = 0
    for example in examples:
        prompt = torch.tensor([data.encode_prompt(example, tokenizer)])
        out = model.generate(
            prompt, max_new_tokens=20, do_sample=False, pad_token_id=tokenizer.pad_token_id, use_cache=True
        )
        text = tokenizer.decode(out[0, prompt.shape[1] :], skip_special_tokens=True)
        right += text.strip() == example.completion.strip()
    return right / len(examples)


def encoded(rows):
    tokenizer = data.prepare_tokenizer(tiny_tokenizer())
    examples = [
        data.Example(prompt=row["prompt"], completion=row["completion"], messages=None, origin="f:1") for row in rows
    ]
    return tokenizer, examples, data.encode_set(examples, tokenizer, seq_len=64, train_on="answer").rows


def test_the_figures_are_those_of_the_stock_libraries(capsys, tmp_path, tiny_runs):
    run = tiny_runs["adapter"]
    found = evaluated(capsys, "--run", run, "--exact-match", 4, "--batch-size", 3)
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    stock = AutoModelForCausalLM.from_pretrained(
        tiny_runs.base("llama"), quantization_config=settings, dtype=torch.bfloat16, device_map={"": "cpu"}
    ).eval()
    quantize.keep_weights_plain(stock)
    tokenizer, examples, rows = encoded(PAIRS[:6])
    for name in ("base", "adapter"):
        model = stock if name == "base" else PeftModel.from_pretrained(stock, str(run / "adapter")).eval()
        loss, tokens = stock_loss(model, rows)
        assert found["tokens"] == tokens
        assert found["models"][name]["loss"] == pytest.approx(loss, rel=5e-3)  # bf16, in batches and alone
        assert found["models"][name]["perplexity"] == pytest.approx(math.exp(found["models"][name]["loss"]))
        assert found["models"][name]["exact_match"] == stock_exact_match(model, tokenizer, examples[:4])
    assert found["models"]["base"]["loss"] - found["models"]["adapter"]["loss"] > 0.1
    assert (found["examples"], found["exact_match_prompts"], found["warning"]) == (6, 4, None)


def test_without_data_it_is_what_the_run_held_out_and_said(capsys, tiny_runs):
    run = tiny_runs["adapter"]
    results = json.loads((run / "run.json").read_text())["results"]
    found = evaluated(capsys, "--run", run)
    rounding = torch.finfo(torch.bfloat16).eps / 2  # the run evaluates with the lean step, in another order of sums
    assert found["models"]["adapter"]["loss"] == pytest.approx(results["eval_loss"], rel=rounding)
    assert found["models"]["adapter"]["exact_match"] == results["exact_match_after"]
    assert found["models"]["base"]["exact_match"] == results["exact_match_before"]
    assert found["exact_match_prompts"] == 3
    explicit = evaluated(capsys, "--run", run, "--data", tiny_runs.root / "held-out-prompt-completion.jsonl")
    assert explicit["models"] == found["models"]
    other = evaluated(capsys, "--run", run, "--data", tiny_runs.root / "data-prompt-completion.jsonl")
    assert other["examples"] == 12
    assert other["models"] != found["models"]


def test_a_share_that_was_split_off_is_found_again(tmp_path, tiny_runs):
    run = shutil.copytree(tiny_runs["adapter"], tmp_path / "run")
    record = json.loads((run / "run.json").read_text())
    record["settings"]["data"] |= {"eval_data": None, "eval_fraction": 0.25}
    (run / "run.json").write_text(json.dumps(record))
    material = evaluate.read_scored(finished.find_run(str(run), {}), None)
    everything = data.read_examples(record["settings"]["data"]["data"], {})
    held_out = data.split_examples(everything, 0.25, 42)[1]
    assert [row.origin for row in material.encoded.rows] == [example.origin for example in held_out]
    assert "held out" in material.source


@pytest.fixture(scope="session")
def release(tmp_path_factory, tiny_runs):
    """The adapter of the fp32 run merged by PEFT, which is right for an unquantized base."""
    folder = tmp_path_factory.mktemp("release")
    stock = AutoModelForCausalLM.from_pretrained(tiny_runs.base("gpt2"), dtype=torch.float32)
    PeftModel.from_pretrained(stock, str(tiny_runs["fp32"] / "adapter")).merge_and_unload().save_pretrained(folder)
    data.prepare_tokenizer(tiny_tokenizer()).save_pretrained(folder)
    return folder


def test_a_release_stands_beside_its_adapter(capsys, tiny_runs, release):
    main(["eval", "--run", str(tiny_runs["fp32"]), "--release", str(release), "--exact-match", "3", "--device", "cpu"])
    out = capsys.readouterr().out
    lines = [line.split() for line in out.splitlines()[-3:]]
    assert [line[0] for line in lines] == ["base", "adapter", "release"]
    assert lines[1][-3:] == lines[2][-3:] != lines[0][-3:]
    assert "6 examples" in out
    assert "exact match of 3" in out
    assert f"{release}, float32" in out
    found = evaluated(capsys, "--run", tiny_runs["fp32"], "--release", release)["models"]
    assert found["release"]["loss"] == pytest.approx(found["adapter"]["loss"], rel=1e-5)
    assert found["release"]["exact_match"] == found["adapter"]["exact_match"] is not None  # also where nobody asked


def test_a_model_is_evaluated_alone(capsys, tmp_path, tiny_runs, release):
    """As the release of an adapter that was made elsewhere."""
    rows = "\n".join(json.dumps({"prompt": f"{i}?", "completion": f"{i}!"}) for i in range(60))
    (tmp_path / "data.jsonl").write_text(rows)
    words = ["--data", tmp_path / "data.jsonl", "--seq-len", 32]
    alone = evaluated(capsys, "--model", release, *words)
    beside = evaluated(capsys, "--run", tiny_runs["fp32"], "--release", release, *words)
    assert alone["models"] == {"model": beside["models"]["release"]}
    assert alone["exact_match_prompts"] == beside["exact_match_prompts"] == 50
    assert evaluated(capsys, "--model", release, "--exact-match", 2, *words)["exact_match_prompts"] == 2


def test_a_model_that_was_trained_whole_stands_beside_its_base(capsys, tiny_runs):
    found = evaluated(capsys, "--run", tiny_runs["full"])["models"]
    _, _, rows = encoded(PAIRS[:6])
    for name, folder in (("base", tiny_runs.base("gpt2")), ("full", tiny_runs["full"] / "model")):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        assert found[name]["loss"] == pytest.approx(stock_loss(model, rows)[0], rel=1e-5)
    assert found["full"]["loss"] < found["base"]["loss"]


def test_one_model_is_in_memory_at_a_time(monkeypatch, tiny_runs, release):
    run = finished.find_run(str(tiny_runs["fp32"]), {"device": "cpu"})
    first, load_run, load_release = [], finished.load_run_model, finished.load_as_saved

    def noted(*args):
        model = load_run(*args)
        first.append(weakref.ref(model))
        return model

    def last(*args):
        gc.collect()
        assert first[0]() is None, "the adapter's model is still there"
        return load_release(*args)

    monkeypatch.setattr(finished, "load_run_model", noted)
    monkeypatch.setattr(finished, "load_as_saved", last)
    assert list(evaluate.evaluate(run, None, str(release), QUIET).models) == ["base", "adapter", "release"]


def test_plain_text_has_no_exact_match(capsys, tiny_runs):
    found = evaluated(capsys, "--run", tiny_runs["text"], "--exact-match", 5)
    assert found["exact_match_prompts"] == 0
    assert found["models"]["adapter"]["exact_match"] is None
    assert found["tokens"] == sum(len(row["text"]) for row in TEXTS[:6])  # a byte is a token; the first has no context


def test_what_is_cut_is_counted_and_what_is_wrong_with_the_base_said(capsys, tmp_path, tiny_runs):
    other = save_tiny(tmp_path / "base", "llama", seed=1)
    flags = ["--run", str(tiny_runs["adapter"]), "--base", str(other), "--seq-len", "13"]
    main(["eval", "--device", "cpu", *flags])
    out, err = capsys.readouterr()
    assert "are cut at 13 tokens" in out
    assert "its hash differs" in out
    assert "CPU" in err
    found = evaluated(capsys, *flags)
    assert found["truncated"] > 0
    assert "hash" in found["warning"]


@pytest.mark.parametrize(
    ("flags", "messages"),
    [
        ([], ["--run", "is missing"]),
        (["--run", "{runs}/none"], ["--run", "no such folder"]),
        (["--run", "{run}", "--data", "none.jsonl"], ["--data = 'none.jsonl'"]),
        (["--run", "{run}", "--exact-match", "0"], ["--exact-match"]),
        (["--run", "{run}", "--seq-len", "4096"], ["--seq-len", "128"]),
        (["--run", "{run}", "--columns", "prompt=nope,completion=completion"], ["--columns", "nope"]),
        (["--run", "{run}", "--base", "no/such/base"], ["--base MODEL"]),
        (["--run", "{run}", "--release", "no/such/release"], ["--release"]),
        (["--run", "{run}", "--release", "{run}/adapter"], ["--release", "is an adapter, not a whole model"]),
        (["--run", "{run}", "--temperature", "1"], ["--temperature"]),
        (["--run", "{run}", "--model", "x", "--bits", "4"], ["--model = 'x'", "--bits", "cannot go with --run"]),
        (["--model", "x", "--release", "y"], ["--data", "--release = 'y'", "needs --run"]),
        (["--model", "no/such/model", "--data", "demo"], ["--model"]),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_two(capsys, tiny_runs, flags, messages):
    names = {"run": tiny_runs["adapter"], "runs": tiny_runs.root / "runs"}
    err = fails(capsys, *(flag.format(**names) for flag in flags))
    for message in messages:
        assert message in err


def test_a_run_that_held_nothing_out_needs_data(capsys, tmp_path, tiny_runs):
    run = shutil.copytree(tiny_runs["adapter"], tmp_path / "run")
    record = json.loads((run / "run.json").read_text())
    record["settings"]["data"]["eval_data"] = None
    (run / "run.json").write_text(json.dumps(record))
    assert "Give --data FILE" in fails(capsys, "--run", run)


def test_a_release_with_other_tokens_or_too_few_positions_is_refused(capsys, tmp_path, tiny_runs, release):
    other = shutil.copytree(release, tmp_path / "release")
    tokenizer = tiny_tokenizer()
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(content))
    assert "another vocabulary" in fails(capsys, "--run", tiny_runs["fp32"], "--release", other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "n_positions": 8}))
    assert "8 positions" in fails(capsys, "--run", tiny_runs["fp32"], "--release", other)
