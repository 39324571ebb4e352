"""Text to text from data to release: trained, resumed, scored, asked, merged, and loaded by stock transformers."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from text_pairs import KINDS, ROWS, save_base, save_rows
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from qlora_kit import AdapterConfig, BaseConfig, DataConfig, EvalConfig, OptimConfig, RunConfig, train
from qlora_kit.build import build_model
from qlora_kit.cli.main import main
from qlora_kit.memory.plan import plan
from qlora_kit.runs.inputs import make_collator, read_inputs
from qlora_kit.tasks.decoding import AnswerLengths, HeldOut

QUIET = Console(file=io.StringIO())
PREFIX = "do: "


class Workshop:
    """Bases, data, runs and releases, each made when it is first asked for."""

    def __init__(self, root):
        self.root = root
        self.data = str(save_rows(root / "rows.jsonl", ROWS))

    def base(self, kind):
        folder = self.root / kind
        return folder if folder.exists() else save_base(folder, kind)

    def config(self, kind, bits=4, out="run", **groups):
        base = {"model": str(self.base(kind)), "bits": bits, "device": "cpu", **groups.pop("base", {})}
        optim = {"max_steps": 6, "lr": 5e-3, "schedule": "constant", "warmup": 0.0, "batch_size": 8}
        return RunConfig(
            base=BaseConfig(**base),
            adapter=AdapterConfig(r=4, **groups.pop("adapter", {})),
            data=DataConfig(data=self.data, eval_data=self.data, seq_len=32),
            optim=OptimConfig(**{**optim, **groups.pop("optim", {})}),
            evaluation=EvalConfig(**{"eval_steps": 3, **groups.pop("evaluation", {})}),
            out=str(self.root / out),
            preflight=False,
            **groups,
        )

    def run(self, kind):
        out = f"run-{kind}"
        if not (self.root / out).exists():
            train(self.config(kind, out=out, base={"source_prefix": PREFIX}), QUIET)
        return self.root / out


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    return Workshop(tmp_path_factory.mktemp("text2text"))


def metrics_of(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "eval_loss" in line]


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_learns_and_leaves_its_figures(workshop, kind):
    folder = workshop.run(kind)
    record = json.loads((folder / "run.json").read_text())
    own = record["settings"]["base"]
    assert (own["task"], own["source_prefix"]) == ("text2text-generation", PREFIX)
    assert [line["step"] for line in metrics_of(folder)] == [3, 6]
    assert metrics_of(folder)[-1]["eval_loss"] < metrics_of(folder)[0]["eval_loss"]
    report = json.loads((folder / "evaluation.json").read_text())
    assert report["metrics"]["loss"] == min(line["eval_loss"] for line in metrics_of(folder))
    assert {"bleu", "chrf", "rouge1", "rouge2", "rougeL", "perplexity"} <= report["metrics"].keys()
    assert [text["expected"] for text in report["texts"]] == [row["target"] for row in ROWS]
    assert json.loads((folder / "adapter" / "adapter_config.json").read_text())["task_type"] == "SEQ_2_SEQ_LM"


@pytest.mark.parametrize("bits", [8, 16, 32])
def test_every_number_of_bits_trains(workshop, bits):
    config = workshop.config("t5-gated", bits, f"bits-{bits}", optim={"max_steps": 4}, evaluation={"eval_steps": 2})
    first, last = metrics_of(train(config, QUIET).folder)
    assert last["eval_loss"] < first["eval_loss"]


def test_the_metric_decides_which_checkpoint_is_kept(workshop):
    config = workshop.config("t5-gated", out="by-chrf", evaluation={"metric": "chrf"})
    result = train(config, QUIET)
    assert result.metrics["chrf"] == max(line["eval_chrf"] for line in metrics_of(result.folder))


def test_a_resumed_run_is_the_same_run(workshop):
    whole = workshop.config("t5-gated", out="whole", evaluation={"keep_best": False, "keep_checkpoints": 9})
    train(whole, QUIET)
    shutil.copytree(workshop.root / "whole", workshop.root / "part")
    shutil.rmtree(workshop.root / "part" / "checkpoints" / "checkpoint-6")
    again = dataclasses.replace(whole, out=str(workshop.root / "again"), resume=str(workshop.root / "part"))
    train(again, QUIET)
    one, other = (
        load_file(workshop.root / name / "adapter" / "adapter_model.safetensors") for name in ("whole", "again")
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kind", ["t5", "bart", "marian"])
def test_gradients_are_those_of_the_stock_loss_over_one_large_batch(workshop, kind):
    """Two accumulated batches, with targets of different lengths, against transformers' own mean over both at once."""
    rows = [{"source": f"{i}" * (i + 1), "target": "x" * (1 + 5 * (i // 2))} for i in range(4)]
    data = str(save_rows(workshop.root / "uneven.jsonl", rows))
    config = dataclasses.replace(
        workshop.config(kind, 32, adapter={"adapter_dtype": "fp32"}), data=DataConfig(data=data, seq_len=32)
    )
    inputs = read_inputs(config)
    model = build_model(inputs.config, torch.device("cpu")).model
    collate = make_collator(model, inputs)
    for name, parameter in model.named_parameters():  # B begins at zero, and A would have no gradient
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1), std=0.1)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def gradients(run):
        model.zero_grad()
        run()
        return {name: p.grad.clone() for name, p in trained.items()}

    n_items = sum(len(row.labels) for row in inputs.train.rows)

    def ours():
        for part in (inputs.train.rows[:2], inputs.train.rows[2:]):
            model(**collate(part), num_items_in_batch=torch.tensor(n_items)).loss.backward()

    def stock_loss():
        own = model.get_base_model()
        type(own).forward(own, **collate(inputs.train.rows)).loss.backward()

    found, expected = gradients(ours), gradients(stock_loss)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()) + 1e-8)


def test_checkpointing_and_the_lean_pieces_change_no_loss(workshop):
    losses = []
    for settings in ({"gradient_checkpointing": True}, {"gradient_checkpointing": False}):
        out = f"checkpointed-{settings['gradient_checkpointing']}"
        config = workshop.config("bart", 32, out, optim={**settings, "max_steps": 3})
        losses.append(train(config, QUIET).metrics["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("settings", [{"adversarial": "fgm"}, {"neftune": 5.0}])
def test_what_moves_embeddings_moves_those_of_the_encoder(workshop, settings):
    plain = train(workshop.config("t5-gated", 32, "plain", optim={"max_steps": 2}, evaluation={"eval_steps": 2}), QUIET)
    config = workshop.config(
        "t5-gated",
        32,
        f"moved-{next(iter(settings))}",
        optim={"max_steps": 2, **settings},
        evaluation={"eval_steps": 2},
    )
    assert train(config, QUIET).metrics["loss"] != pytest.approx(plain.metrics["loss"], rel=1e-4)
    shutil.rmtree(workshop.root / "plain")


def predicted(workshop, capsys, *args):
    capsys.readouterr()
    asked = save_rows(
        workshop.root / "asked.jsonl", [{"source": row["source"] * (1 + i)} for i, row in enumerate(ROWS[:3])]
    )
    main(["predict", *args, "--data", str(asked)])
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("kind", KINDS)
def test_the_release_gives_the_texts_of_the_run_to_stock_transformers(workshop, in_this_process, capsys, kind):
    folder, release = workshop.run(kind), workshop.root / f"release-{kind}"
    main(["merge", "--run", str(folder), "--out", str(release), "--dtype", "fp32"])
    proof = json.loads((release / "merge_report.json").read_text())["proof"]["model"]
    assert (proof["exact"]["agreement"], proof["answer"]["same"]) == (1.0, True)
    config = json.loads((release / "config.json").read_text())
    assert config["architectures"] == [proof["loaded_as"]]
    assert config["prefix"] == PREFIX
    lines = predicted(workshop, capsys, "--model", str(release))
    assert [line["source"] for line in lines] == ["say 0", "say 1say 1", "say 2say 2say 2"]
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(release), AutoTokenizer.from_pretrained(release)
    for line in lines:
        ids = tokenizer(PREFIX + line["source"], return_tensors="pt")["input_ids"]
        out = model.generate(input_ids=ids, max_new_tokens=128)
        assert tokenizer.decode(out[0], skip_special_tokens=True) == line["text"]


def test_a_release_answers_as_predict_whatever_its_base_came_with(workshop, in_this_process, capsys):
    base = shutil.copytree(workshop.base("bart"), workshop.root / "beams")
    file = base / "generation_config.json"
    own = json.loads(file.read_text())
    beams = {"num_beams": 4, "num_return_sequences": 2, "min_length": 9, "no_repeat_ngram_size": 1, "max_length": 11}
    file.write_text(json.dumps({**own, **beams, "suppress_tokens": [97], "do_sample": True}))
    folder, release = workshop.root / "beams-run", workshop.root / "beams-release"
    train(workshop.config("bart", 32, folder.name, base={"model": str(base)}), QUIET)
    main(["merge", "--run", str(folder), "--out", str(release), "--dtype", "fp32"])
    found = json.loads((release / "generation_config.json").read_text())
    assert (found["do_sample"], found["num_beams"], found["suppress_tokens"]) == (False, 1, [97])
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(release), AutoTokenizer.from_pretrained(release)
    for line in predicted(workshop, capsys, "--run", str(folder)):
        out = model.generate(tokenizer(line["source"], return_tensors="pt")["input_ids"], max_new_tokens=32)
        assert [tokenizer.decode(ids, skip_special_tokens=True) for ids in out] == [line["text"]]


def test_an_adapter_by_itself_says_its_task(workshop, in_this_process, capsys):
    """Without the run: PEFT's settings say what kind of model it is for, and the user which prefix it learned with."""
    adapter, release = workshop.run("bart") / "adapter", workshop.root / "by-adapter"
    places = ("--adapter", str(adapter), "--base", str(workshop.base("bart")), "--out", str(release))
    main(["merge", *places, "--source-prefix", PREFIX, "--dtype", "fp32"])
    assert json.loads((release / "config.json").read_text())["prefix"] == PREFIX
    assert f"--source-prefix '{PREFIX}'" in json.loads((release / "merge_report.json").read_text())["command"]
    of_release = predicted(workshop, capsys, "--model", str(release))
    assert [line["text"] for line in of_release] == [
        line["text"] for line in predicted(workshop, capsys, "--run", str(workshop.run("bart")))
    ]


@pytest.mark.parametrize("kind", ["t5-gated", "bart"])
def test_releases_in_16_bits_and_nf4_pass_their_proof(workshop, in_this_process, kind):
    folder = str(workshop.run(kind))
    main(["merge", "--run", folder, "--out", str(workshop.root / f"bf16-{kind}"), "--dtype", "bf16"])
    out = workshop.root / f"nf4-{kind}"
    main(["merge", "--run", folder, "--out", str(out), "--dtype", "fp32", "--format", "nf4"])
    assert type(AutoModelForSeq2SeqLM.from_pretrained(out).lm_head) is torch.nn.Linear


def test_a_saved_buffer_is_rounded_like_the_weights_of_a_16_bit_release(workshop, in_this_process):
    """Marian's bias on the logits is no parameter, but in its files."""
    folder = shutil.copytree(workshop.base("marian"), workshop.root / "biased")
    weights = load_file(folder / "model.safetensors")
    weights["final_logits_bias"] = torch.linspace(-9, 9, weights["final_logits_bias"].numel())[None] / 7
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    train(workshop.config("marian", 32, "biased-run", base={"model": str(folder)}), QUIET)
    release = workshop.root / "biased-release"
    main(["merge", "--run", str(workshop.root / "biased-run"), "--out", str(release), "--dtype", "bf16"])
    assert load_file(release / "model.safetensors")["final_logits_bias"].dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["t5-gated", "bart"])
def test_predictions_do_not_depend_on_the_batch(workshop, capsys, kind):
    run = str(workshop.run(kind))
    found = [predicted(workshop, capsys, "--run", run, "--batch-size", size) for size in ("1", "3")]
    assert found[0] == found[1]


def test_a_run_is_asked_by_the_columns_it_was_trained_with(workshop, capsys):
    """Without its answers too; and where the file has none of them, by the columns that are recognised."""
    columns = {"source": "translation.de", "target": "translation.en"}
    data = str(save_rows(workshop.root / "pairs.jsonl", [{"translation": {"en": "dog", "de": "Hund"}}] * 4))
    config = workshop.config("t5", 32, "by-hand", optim={"max_steps": 1}, evaluation={"eval_steps": None})
    train(dataclasses.replace(config, data=DataConfig(data=data, columns=columns, seq_len=32)), QUIET)

    def asked(row, *args):
        capsys.readouterr()
        asked = save_rows(workshop.root / "asked-by-hand.jsonl", [row])
        main(["predict", "--run", str(workshop.root / "by-hand"), "--data", str(asked), *args])
        return json.loads(capsys.readouterr().out)["source"]

    both = {"translation": {"en": "cat", "de": "Katze"}, "source": "no"}
    assert asked(both) == "Katze"
    assert asked({"translation": {"de": "Katze"}}) == "Katze"
    assert asked({"source": "Katze"}) == "Katze"
    assert asked(both, "--columns", "source=translation.en") == "cat"


def test_a_run_translates_one_way_however_a_file_orders_the_languages(workshop, capsys):
    data = str(save_rows(workshop.root / "forth.jsonl", [{"translation": {"en": "dog", "de": "Hund"}}] * 4))
    other = [{"translation": {"de": "Hund", "en": "dog"}}] * 2
    back = str(save_rows(workshop.root / "back.jsonl", other))
    config = workshop.config("t5", 32, "one-way", optim={"max_steps": 1}, evaluation={"eval_steps": None})
    config = dataclasses.replace(config, data=DataConfig(data=data, eval_data=back, seq_len=32))
    assert [example.source for example in read_inputs(config).held_out] == ["dog"] * 2
    train(config, QUIET)
    capsys.readouterr()
    main(["predict", "--run", str(workshop.root / "one-way"), "--data", back])
    assert json.loads(capsys.readouterr().out.splitlines()[0])["source"] == "dog"
    main(["preview", "--model", config.base.model, "--data", data, "--eval-data", back, "--rows", "1"])
    assert "sources that training shows too │ 2" in " ".join(capsys.readouterr().out.split())


def fails(capsys, *args):
    with pytest.raises(SystemExit) as caught:
        main(list(args))
    assert caught.value.code == 2
    return " ".join(capsys.readouterr().err.split())


def test_bad_input_is_one_message(workshop, capsys, tmp_path):
    model = str(workshop.base("t5"))
    train_args = ("train", "--model", model, "--out", str(tmp_path / "run"))
    empty = str(save_rows(tmp_path / "empty.jsonl", [{"source": "a", "target": "b"}, {"source": "a", "target": " "}]))
    said = fails(capsys, *train_args, "--data", empty)
    assert "empty.jsonl:2" in said
    assert "has an empty target" in said
    lacking = str(save_rows(tmp_path / "lacking.jsonl", [{"source": "a"}]))
    assert "has no pair of a source and a target among 'source'" in fails(
        capsys, *train_args, "--task", "text2text-generation", "--data", lacking
    )
    good = ("--data", workshop.data, "--eval-data", workshop.data)
    assert "is not a metric of text2text-generation" in fails(capsys, *train_args, *good, "--metric", "f1")
    assert "--pack" in fails(capsys, *train_args, *good, "--pack")
    said = fails(capsys, *train_args, *good, "--labels", "a,b", "--multi-label", "true")
    assert "--labels = 'a,b': does not apply to --task text2text-generation" in said
    assert "--multi-label = True: does not apply" in said
    bert = str(tmp_path / "bert")
    from classifiers import ROWS as LABELLED
    from classifiers import save_base as save_classifier

    save_classifier(bert, "bert")
    args = ("train", "--model", bert, "--out", str(tmp_path / "run"), "--task", "text2text-generation")
    assert "a bert model has no encoder with a decoder" in fails(capsys, *args, *good)
    labelled = str(save_rows(tmp_path / "labelled.jsonl", LABELLED))
    args = ("train", "--model", bert, "--out", str(tmp_path / "run"), "--data", labelled, "--source-prefix", "go: ")
    assert "does not apply to --task text-classification" in fails(capsys, *args)
    assert not (tmp_path / "run").exists()
    run = str(workshop.run("t5"))
    args = ("--run", run, "--source-prefix", "go: ")
    assert "which has its own" in fails(capsys, "merge", *args, "--out", str(tmp_path / "release"))
    assert "which has its own" in fails(capsys, "predict", *args, "--data", workshop.data)
    assert "Use `qlora-kit predict`" in fails(capsys, "generate", "--run", run, "--prompt", "a")


@pytest.mark.parametrize("name", ["decoder_start_token_id", "pad_token_id"])
def test_a_decoder_that_cannot_start_is_refused(workshop, capsys, tmp_path, name):
    base = shutil.copytree(workshop.base("t5"), tmp_path / "base")
    own = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**own, name: None}))
    said = fails(capsys, "train", "--model", str(base), "--data", workshop.data, "--out", str(tmp_path / "run"))
    assert f"its config.json has no {name}, which its decoder needs" in said
    assert said.count("config.json") == 1


def test_preview_shows_both_sides(workshop, capsys):
    model = str(workshop.base("bart"))
    main(["preview", "--model", model, "--data", workshop.data, "--rows", "1", "--seq-len", "3"])
    shown = capsys.readouterr().out
    assert "<s>|s|</s>| «<s>»«c»«</s>»" in shown
    assert "targets truncated to 3 tokens" in shown


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_can_be_planned(workshop, kind):
    found = plan(workshop.config(kind, base={"task": "text2text-generation"}))
    assert {"forward", "loss", "backward", "optimizer"} <= set(found.phases)
    assert found.components["quantized weights"] > 0
    assert sum(found.components.values()) == found.peak_bytes


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_planned_in_the_batches_of_the_evaluation(workshop, kind):
    config = workshop.config(kind, base={"task": "text2text-generation"})
    held_out = HeldOut(rows=50, row_tokens=24, asked=AnswerLengths(50, 24, 20))
    found = plan(config, held_out=held_out)
    assert (list(found.stages), found.unplanned) == (["loading", "evaluation", "generation", "step"], "")
    rows = config.optim.batch_size
    assert found.stages["generation"].what.startswith(f"{rows} prompts at once" if rows > 1 else "a prompt")
    assert found.answers is None


def test_the_profile_of_real_steps_agrees_with_the_plan_of_them(workshop):
    rows = [{"source": "s" * 31, "target": "t" * 31} for _ in range(8)]
    data = str(save_rows(workshop.root / "full.jsonl", rows))
    config = workshop.config(
        "t5", 32, "profiled", optim={"max_steps": 3, "batch_size": 4}, evaluation={"eval_steps": None}
    )
    config = dataclasses.replace(config, data=DataConfig(data=data, seq_len=32), preflight=True, profile=True)
    profile = json.loads((train(config, QUIET).folder / "profile.json").read_text())
    assert profile["predicted"]["peak_bytes"] == pytest.approx(profile["peak_bytes"], rel=0.01)


def test_random_weights_quantize_the_layers_that_files_do(workshop):
    from qlora_kit.model.load import load_base

    names = []
    for settings in ({"weights": "random"}, {}):
        model = load_base(BaseConfig(model=str(workshop.base("t5")), bits=4, **settings), torch.device("cpu"))
        names.append({name for name, module in model.named_modules() if "Linear4bit" in type(module).__name__})
    assert names[0] == names[1]
    assert not any(name.endswith("wo") for name in names[0])


def test_eva_counts_tokens_of_the_source_and_of_the_target_apart(workshop, monkeypatch):
    """Both are padded to the same length here, so that a mask of the one would fit the other."""
    from qlora_kit.adapters import initialization

    seen = {}
    add = initialization._Directions.add
    monkeypatch.setattr(
        initialization._Directions, "add", lambda self, rows: (seen.setdefault(id(self), len(rows)), add(self, rows))[1]
    )
    found = {}
    directions_of = initialization._InputWatch.directions_of
    monkeypatch.setattr(
        initialization._InputWatch,
        "directions_of",
        lambda self, name: (found.setdefault(name, seen[id(self.found[name])]), directions_of(self, name))[1],
    )
    rows = [{"source": "s" * 3, "target": "t" * (1 + i)} for i in range(4)]
    data = str(save_rows(workshop.root / "eva.jsonl", rows))
    config = workshop.config("bart", 32, "eva", adapter={"init": "eva"}, optim={"max_steps": 1})
    train(dataclasses.replace(config, data=DataConfig(data=data, seq_len=32), evaluation=EvalConfig()), QUIET)
    sources, targets = 4 * 5, sum(3 + i for i in range(4))
    for name, count in found.items():
        of_source = ".encoder." in name or "encoder_attn.k_proj" in name or "encoder_attn.v_proj" in name
        assert count == (sources if of_source else targets), name


@pytest.mark.parametrize("kind", ["t5", "marian"])
def test_every_weight_can_train_but_those_that_are_computed(workshop, kind):
    config = workshop.config(kind, 32, f"full-{kind}", base={"full": True}, optim={"max_steps": 1})
    folder = train(dataclasses.replace(config, evaluation=EvalConfig()), QUIET).folder
    assert not any("embed_positions" in name for name in load_file(folder / "model" / "model.safetensors"))


def test_loftq_leaves_layers_that_are_not_quantized(workshop):
    config = workshop.config(
        "t5", 4, "loftq", adapter={"init": "loftq", "adapter_dtype": "fp32"}, optim={"max_steps": 1}
    )
    train(dataclasses.replace(config, evaluation=EvalConfig()), QUIET)
