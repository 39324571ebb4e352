"""The plan before a run: recorded, said at its end, and the refusal of one that cannot fit."""

from __future__ import annotations

import dataclasses
import io
import json
import re

import pytest
import torch
from families import save_tiny
from rich.console import Console

from qlora_kit import AdapterConfig, BaseConfig, DataConfig, EvalConfig, OptimConfig, RunConfig, UserError, train
from qlora_kit.errors import as_flag
from qlora_kit.memory import preflight
from qlora_kit.memory.fit import Budget
from qlora_kit.memory.plan import plan
from qlora_kit.memory.rules import find_gpu
from qlora_kit.system.progress import PHASES
from qlora_kit.tasks import decoding

CPU = torch.device("cpu")


@pytest.fixture
def config(tmp_path) -> RunConfig:
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps({"prompt": f"{i}?", "completion": f"{i}!"}) for i in range(8)))
    return RunConfig(
        base=BaseConfig(model=str(save_tiny(tmp_path / "base", "llama")), device="cpu"),
        adapter=AdapterConfig(r=4),
        data=DataConfig(data=str(data), seq_len=32),
        optim=OptimConfig(max_steps=2),
        out=str(tmp_path / "run"),
    )


def test_the_plan_is_recorded_and_said_beside_the_baselines(config):
    said = io.StringIO()
    result = train(config, Console(file=said, width=300))
    recorded = json.loads((result.folder / "plan.json").read_text())
    assert sum(recorded["components"].values()) == recorded["peak_bytes"] > 0
    last = said.getvalue().strip().splitlines()[-1]
    assert "predicted, not measured" in last
    assert "full fine-tuning (fp32 weights, bf16 autocast, AdamW) would take" in last
    assert "16-bit LoRA (bf16 base, AdamW) would take" in last


@pytest.mark.slow
def test_a_profiled_run_shows_predicted_beside_measured_and_trains_the_same(config):
    said = io.StringIO()
    profiled = train(dataclasses.replace(config, profile=True), Console(file=said, width=300))
    profile = json.loads((profiled.folder / "profile.json").read_text())
    assert sum(profile["components"].values()) == profile["peak_bytes"]
    assert profile["predicted"]["peak_bytes"] == pytest.approx(profile["peak_bytes"], rel=0.05)
    assert (profiled.folder / "profile.png").stat().st_size > 10_000
    assert "of live tensors were measured" in said.getvalue()
    plain = train(dataclasses.replace(config, out=config.out + "2"), Console(file=io.StringIO()))
    files = [r.adapter / "adapter_model.safetensors" for r in (profiled, plain)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert not (plain.folder / "profile.json").exists()


def test_a_profiled_run_ends_with_what_was_saved_even_without_preflight(config):
    said = io.StringIO()
    train(dataclasses.replace(config, preflight=False, profile=True), Console(file=said, width=300))
    last = said.getvalue().strip().splitlines()[-1]
    assert "full fine-tuning (fp32 weights" in last
    assert last.endswith("of live tensors were measured")


def test_the_peak_of_a_run_says_of_what_phase_it_is(config):
    said = io.StringIO()
    result = train(config, Console(file=said, width=300))
    recorded = json.loads((result.folder / "run.json").read_text())["results"]
    peaks = recorded["phase_peak_bytes"]
    assert recorded["peak_bytes"] == result.peak_bytes == max(peaks.values()) == peaks[recorded["peak_phase"]]
    assert set(peaks) <= set(PHASES)
    assert f"({PHASES[result.peak_phase]})" in said.getvalue()


def test_a_plan_changes_nothing_of_the_run(config):
    planned = train(config, Console(file=io.StringIO()))
    plain = train(dataclasses.replace(config, preflight=False, out=config.out + "2"), Console(file=io.StringIO()))
    files = [r.adapter / "adapter_model.safetensors" for r in (planned, plain)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert not (plain.folder / "plan.json").exists()


@pytest.mark.parametrize(("pack", "planned_tokens"), [(True, 64), (False, 8)])
def test_packed_rows_are_planned_full(config, pack, planned_tokens):
    """Packed, several of the short examples (8 tokens with padding) share a row of 64."""
    settings = dataclasses.replace(config.data, seq_len=64, pack=pack)
    result = train(dataclasses.replace(config, data=settings), Console(file=io.StringIO()))
    assert json.loads((result.folder / "plan.json").read_text())["seq_len"] == planned_tokens


def test_the_plan_is_for_the_longest_row_and_not_for_more():
    config = RunConfig(base=BaseConfig(model="gpt2", weights="random"))
    short = preflight.plan_run(config, CPU, 13)
    assert short.plan is not None
    assert short.plan.seq_len == 16


@pytest.mark.slow
def test_what_does_not_fit_is_refused_with_a_remedy_that_does(monkeypatch):
    config = RunConfig(
        base=BaseConfig(model="gpt2-large", weights="random"),
        data=DataConfig(seq_len=512),
        optim=OptimConfig(batch_size=8),
    )
    gpu = find_gpu("rtx3060")
    needed = plan(config, gpu=gpu).device_bytes
    monkeypatch.setattr("qlora_kit.memory.fit.present_device", lambda: (gpu, Budget(needed - 1, "free on a test")))
    with pytest.raises(UserError) as caught:
        preflight.plan_run(config, torch.device("cuda"), 512)
    text = str(caught.value)
    for part in ("free on a test", "largest part is", "preflight=False", "not yet validated on hardware"):
        assert part in text
    assert re.search(r"With \w+=\w", text)
    assert re.search(r"With --\w", caught.value.text(as_flag))
    monkeypatch.setattr("qlora_kit.memory.fit.present_device", lambda: (gpu, Budget(needed, "free on a test")))
    assert preflight.plan_run(config, torch.device("cuda"), 512).plan is not None


@pytest.mark.slow
def test_a_host_without_room_for_the_checkpoints_is_refused_with_everything_else_that_is_wrong(monkeypatch):
    config = RunConfig(base=BaseConfig(model="gpt2", weights="random"), optim=OptimConfig(batch_size=4))
    gpu = find_gpu("rtx3060")
    planned = plan(preflight.with_rows(config, 512), gpu=gpu)
    assert planned.host_bytes == 2 * 12 * 3 * 2**20  # 4 × 512 × 768 in bf16, of each half block
    (extra,) = [extra for extra in planned.extras if "pinned" in extra.name]
    assert (extra.n_bytes, extra.on_device, extra.moves) == (planned.host_bytes, False, False)
    assert planned.to_dict()["host_bytes"] == planned.host_bytes

    def refusal(free_bytes, available_bytes):
        monkeypatch.setattr("qlora_kit.memory.fit.present_device", lambda: (gpu, Budget(free_bytes, "free on a test")))
        monkeypatch.setattr("qlora_kit.system.host_memory.available_bytes", lambda: available_bytes)
        try:
            preflight.plan_run(config, torch.device("cuda"), 512)
        except UserError as error:
            return error
        return None

    enough, little = planned.device_bytes, planned.host_bytes // 2
    assert refusal(enough, planned.host_bytes) is None
    assert refusal(enough, None) is None, "a system that does not tell"
    error = refusal(enough, little)
    for part in ("offload_activations = 'on'", "72 MiB of checkpoints", "36 MiB are available", "seq_len=256"):
        assert part in str(error)
    assert [fault.setting for fault in refusal(enough - 1, little).faults] == ["model", "offload_activations"]


LONG = decoding.HeldOut(rows=4, row_tokens=512, sampled=None, asked=decoding.AnswerLengths(8, 1000, 20))


def gpt2(**evaluation) -> RunConfig:
    base = BaseConfig(model="gpt2", weights="random")
    return RunConfig(base=base, optim=OptimConfig(batch_size=1), evaluation=EvalConfig(**evaluation))


@pytest.mark.slow
def test_a_run_whose_answers_do_not_fit_is_refused_by_their_name_with_what_helps_them(monkeypatch):
    """Its step would fit: only that was compared with what is free."""
    config, gpu = gpt2(exact_match=8), find_gpu("rtx3060")
    step = preflight.plan_run(config, CPU, 16, held_out=decoding.NOTHING_HELD_OUT).plan
    with_answers = preflight.plan_run(config, CPU, 16, held_out=LONG).plan
    assert with_answers.largest_stage == "generation"
    assert step.device_bytes < with_answers.device_bytes - 2**20
    free = Budget(with_answers.device_bytes - 1, "free on a test")
    monkeypatch.setattr("qlora_kit.memory.fit.present_device", lambda: (gpu, free))
    with pytest.raises(UserError) as caught:
        preflight.plan_run(config, torch.device("cuda"), 16, held_out=LONG)
    text = str(caught.value)
    assert "largest in answering prompts (a prompt of 1000 tokens, with 20 more to answer)" in text
    assert "no exact_match" in text
    fits = preflight.plan_run(gpt2(), torch.device("cuda"), 16, held_out=LONG)
    assert list(fits.plan.stages) == ["loading", "evaluation", "step"]


def test_as_many_prompts_at_once_as_the_plan_has_on_cuda_and_as_are_free_on_the_host(monkeypatch):
    planned = preflight.plan_run(gpt2(exact_match=8), CPU, 16, held_out=LONG).plan
    loading = planned.stages["loading"]
    answers, loaded_bytes = planned.answers, loading.peak_bytes - loading.components["workspaces"]
    assert (answers.prompts, answers.most) == (1, 8)
    assert preflight.prompts_at_once(planned, torch.device("cuda")) == 1
    for more, expected in ((-1, 1), (2, 3), (100, 8)):
        room = answers.one_bytes - loaded_bytes + more * answers.each_bytes
        free = max(room + 20 * 2**20, -(-room * 103 // 100))  # what fragments is no room
        monkeypatch.setattr(preflight, "free_bytes", lambda device, free=free: free)
        assert preflight.prompts_at_once(planned, CPU) == expected
        in_free = preflight.prompts_in_free(gpt2(), CPU, LONG.asked)
        assert in_free == pytest.approx(expected, abs=1)  # its plan has shorter steps, and other states
    odd = RunConfig(base=BaseConfig(model="gpt2", weights="random"), adapter=AdapterConfig(targets=("none",)))
    assert preflight.prompts_in_free(odd, CPU, LONG.asked) == decoding.ANSWER_BATCH


def test_what_is_free_on_a_gpu_beyond_the_step_has_more_prompts_at_once_and_the_run_still_fits(monkeypatch):
    """They followed the step's peak, so that a large GPU answered one by one."""
    gpu = find_gpu("rtx3060")
    found = {}
    least = preflight.plan_run(gpt2(exact_match=8), CPU, 16, held_out=LONG).plan
    for more in (0, 3, 100):
        free = Budget(least.device_bytes + more * least.answers.each_bytes * 104 // 100, "free on a test")
        monkeypatch.setattr("qlora_kit.memory.fit.present_device", lambda free=free: (gpu, free))
        planned = preflight.plan_run(gpt2(exact_match=8), torch.device("cuda"), 16, held_out=LONG).plan
        assert planned.device_bytes <= free.n_bytes
        assert planned.peak_bytes == least.peak_bytes
        found[more] = preflight.prompts_at_once(planned, torch.device("cuda"))
    assert found == {0: 1, 3: 4, 100: 8}


@pytest.mark.parametrize("planned", [True, False])
def test_a_run_answers_as_many_prompts_at_once_as_it_is_told(config, monkeypatch, planned):
    seen, stock = [], decoding.answer_all
    monkeypatch.setattr(preflight, "free_bytes", lambda device: 1)

    def spied(model, tokenizer, prompts, sampling, batch_size, tick=lambda count: None):
        seen.append((len(prompts), batch_size))
        return stock(model, tokenizer, prompts, sampling, batch_size, tick)

    monkeypatch.setattr(decoding, "answer_all", spied)
    data = dataclasses.replace(config.data, eval_data=config.data.data)
    own = dataclasses.replace(config, data=data, evaluation=EvalConfig(exact_match=5), preflight=planned)
    monkeypatch.setattr(decoding, "answer", lambda model, tokenizer, prompts, tokens: ["-"])  # the sample
    result = train(own, Console(file=io.StringIO()))
    assert seen == [(5, 1), (5, 1)]
    if planned:
        recorded = json.loads((result.folder / "plan.json").read_text())
        assert recorded["answers"]["most"] == 5
        assert list(recorded["stages"]) == ["loading", "evaluation", "generation", "step"]


def test_what_is_free_is_a_number_of_bytes_that_the_host_may_have():
    assert 2**20 < preflight.free_bytes(CPU) < 2**50
