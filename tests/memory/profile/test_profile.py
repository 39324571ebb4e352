from __future__ import annotations

import copy
import dataclasses
import json

import pytest
import torch
from memory_cases import (
    BATCH,
    TOKENS,
    collated_batch,
    cpu_optimizer,
    nothing_collected,
    profiled_peak,
    real_batch,
    settings,
    small_config,
)

from qlora_kit import build
from qlora_kit.config.settings import RunConfig
from qlora_kit.memory.baselines import BASELINES
from qlora_kit.memory.plan import MemoryPlan, plan
from qlora_kit.memory.profile.picture import draw_profile, drawn_points
from qlora_kit.memory.profile.profiler import Profiler, phase_part, save_profile, summary_line
from qlora_kit.memory.profile.result import UNATTRIBUTED, Measured, MemoryProfile
from qlora_kit.memory.simulate import run_step
from qlora_kit.memory.track import MemoryTracker

CPU = torch.device("cpu")
STEPS = 2


class Run:
    """A tiny model, ready to train, and the steps that a profile is taken of."""

    def __init__(self, config, family="gpt2", device=CPU):
        torch.manual_seed(0)
        self.config, self.architecture = config, small_config(family)
        self.built = build.build_model(config, device, copy.deepcopy(self.architecture))
        self.model = self.built.model.train()
        self.optimizer = cpu_optimizer(self.built, config)
        batches = (real_batch(config, self.architecture.vocab_size) for _ in range(config.optim.grad_accum))
        self.batches = [{name: tensor.to(device) for name, tensor in batch.items()} for batch in batches]

    def step(self):
        run_step(MemoryTracker("cpu"), self.built, self.optimizer, self.batches, 1.0)

    def hooks(self):
        modules = list(self.model.modules())
        names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        on_modules = sum(len(getattr(m, name)) for m in modules for name in names)
        gradients = sum(len(p._post_accumulate_grad_hooks or ()) for p in self.model.parameters())
        steps = len(self.optimizer._optimizer_step_pre_hooks) + len(self.optimizer._optimizer_step_post_hooks)
        return on_modules + gradients + steps


def profiled(run, monkeypatch, steps=STEPS, predicts=True):
    monkeypatch.setattr("qlora_kit.memory.profile.profiler.resolve_architecture", lambda config: run.architecture)
    with Profiler(run.config, CPU, steps, predicts=predicts) as profiler:
        profiler.begin(run.model, run.optimizer)
        for _ in range(steps):
            profiler.begin_step()
            run.step()
            profiler.end_step()
    return profiler.profile


@pytest.fixture(scope="module")
def profile():
    with pytest.MonkeyPatch.context() as monkeypatch:
        return profiled(Run(settings(bits=4)), monkeypatch)


def test_components_sum_to_the_peak_in_every_part(profile):
    assert sum(profile.components.values()) == profile.peak_bytes > 0
    for point in (*profile.series, *profile.phases.values()):
        assert sum(point.components.values()) == point.live_bytes
    assert profile.peak_bytes == profile.phases[profile.phase].live_bytes
    assert set(profile.phases) >= {"forward", "loss", "loss backward", "backward", "clip", "optimizer"}


def test_every_component_of_a_qlora_step_is_found(profile):
    in_all = {name for p in profile.phases.values() for name, n_bytes in p.components.items() if n_bytes}
    assert in_all >= {"quantized weights", "adapters", "gradients", "optimizer states", "checkpoints", "loss", "inputs"}


def test_what_is_measured_was_predicted(profile):
    assert abs(profile.error) < 0.005
    assert sum(profile.predicted.components.values()) == profile.predicted.peak_bytes
    assert "not as CUDA" in profile.predicted.basis
    for name, n_bytes in profile.predicted.phases.items():
        if name not in ("load", "idle"):
            assert n_bytes == pytest.approx(profile.phases[name].live_bytes, rel=0.01), name


def test_the_largest_tensors_name_the_line_that_made_them(profile):
    sizes = [tensor.n_bytes for tensor in profile.largest]
    assert sizes == sorted(sizes, reverse=True)
    lines = [tensor.line for tensor in profile.largest if tensor.line]
    assert any("modeling_gpt2.py:" in line and " in forward" in line for line in lines)
    assert not any("/torch/" in line for line in lines)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("way", [{}, {"bits": 4}, {"full": True, "gradient_checkpointing": False}], ids=str)
def test_the_peak_is_that_of_torchs_own_record(family, way, monkeypatch):
    run = Run(settings(**way), family)
    tracker = MemoryTracker("cpu", 1)
    from qlora_kit.memory.watch import label_model

    label_model(tracker, run.model)
    for batch in run.batches:
        for tensor in batch.values():
            tracker.label(tensor, "inputs")
    static_bytes = tracker.live_bytes
    recorder = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
    with nothing_collected(), recorder:
        profile = profiled(run, monkeypatch, predicts=False)
    assert profile.peak_bytes == pytest.approx(static_bytes + profiled_peak(recorder), rel=0.005)


def test_a_profile_leaves_nothing_on_the_model(monkeypatch):
    run = Run(settings())
    before = run.hooks()
    profiled(run, monkeypatch, predicts=False)
    assert run.hooks() == before
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None


def test_a_step_that_fails_leaves_nothing_either():
    run = Run(settings())
    before = run.hooks()
    profiler = Profiler(run.config, CPU)
    run.batches = [{"input_ids": torch.tensor([[-1]]), "labels": torch.tensor([[0]])}]
    with profiler:
        profiler.begin(run.model, run.optimizer)
        profiler.begin_step()
        assert run.hooks() > before
        with pytest.raises(IndexError):
            run.step()
    assert run.hooks() == before
    assert profiler.profile is None
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None


def test_only_the_first_steps_are_measured(monkeypatch):
    run = Run(settings())
    before = run.hooks()
    with Profiler(run.config, CPU, steps=1, predicts=False) as profiler:
        profiler.begin(run.model, run.optimizer)
        profiler.begin_step()
        run.step()
        profiler.end_step()
        assert profiler.profile.steps == 1
        profiler.begin_step()
        assert run.hooks() == before
        run.step()
        profiler.end_step()
    assert profiler.profile.steps == 1


def test_a_profiled_run_learns_the_same(monkeypatch):
    plain, measured = Run(settings(bits=4)), Run(settings(bits=4))
    for _ in range(STEPS):
        plain.step()
    profiled(measured, monkeypatch, predicts=False)
    weights = zip(plain.model.parameters(), measured.model.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in weights)


def test_accumulation_and_shapes_are_noted(monkeypatch):
    run = Run(settings(grad_accum=2))
    profile = profiled(run, monkeypatch)
    assert (profile.rows, profile.tokens, profile.padded) == (BATCH, TOKENS, False)
    assert abs(profile.error) < 0.005


def test_padding_is_predicted_too(monkeypatch):
    run = Run(settings(), "llama")
    run.batches[0]["attention_mask"][0, : TOKENS // 2] = 0
    profile = profiled(run, monkeypatch)
    assert profile.padded
    assert abs(profile.error) < 0.005


LEAN_QLORA = {"bits": 4, "adapter_dtype": "bf16"}
PREDICTED = [(family, kind, {}) for family in ("gpt2", "llama") for kind in ("plain", "padded", "packed")]
PREDICTED += [("opt", "packed", {}), ("gpt_neox", "packed", {}), ("opt", "padded", {}), ("gpt_neox", "plain", {})]
PREDICTED += [
    ("llama", "packed", {"varlen": False}),
    ("gpt2", "packed", {"lean": "off"}),
    ("llama", "plain", {"half_blocks": "on"}),
    ("gpt2", "plain", {"dropout": 0.1}),
    ("llama", "plain", {"optim": "adamw_8bit"}),
    ("llama", "plain", {"init": "pissa", "adapter_dtype": "fp32"}),
    ("gpt2", "plain", {"variant": "lora-xs"}),
    ("gpt2", "plain", {"layers": "1", "lora_plus": 4}),
    ("llama", "plain", {"adversarial": "fgm"}),
    ("llama", "plain", {"rank_penalty": 0.1, "neftune": 5}),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("family", "kind", "changes"), PREDICTED, ids=str)
def test_the_lean_step_takes_what_was_predicted(family, kind, changes, monkeypatch):
    """Of the batch that the run makes. Not so at 8 bits: `meta` allocates there as CUDA's kernels do, not a CPU's."""
    run = Run(settings(pack=kind == "packed", **{**LEAN_QLORA, **changes}), family)
    run.batches = [collated_batch(kind, run.model)]
    profile = profiled(run, monkeypatch)
    assert abs(profile.error) < 0.005
    assert profile.padded == (kind == "padded")


def test_json_gives_the_profile_back(profile, tmp_path):
    file = save_profile(profile, tmp_path)
    content = json.loads(file.read_text())
    assert content["error"] == profile.error
    assert MemoryProfile.from_dict(content) == profile


def test_the_picture_shows_the_step_in_its_order(profile):
    """Checkpoints grow in the forward pass and shrink in the backward pass; no block comes twice."""
    points = drawn_points(profile)
    for phase, sign in (("forward", 1), ("backward", -1)):
        kept = [sign * p.components["checkpoints"] for p in points if p.phase == phase]
        assert kept == sorted(kept)
        blocks = [p.block for p in points if p.phase == phase and p.block is not None]
        assert blocks == [0, 1][::sign]
    assert [p.phase for p in points][-1] == "optimizer"


def test_the_picture_is_drawn(profile, tmp_path):
    draw_profile(profile, tmp_path / "profile.png")
    assert (tmp_path / "profile.png").read_bytes().startswith(b"\x89PNG")


def test_cudas_count_beyond_the_record_is_named(profile):
    from qlora_kit.memory.profile.cuda import Counter
    from qlora_kit.memory.track import Event, Region, Storage

    events = [Event(512, Storage(512, "activations", "a"), Region(step=1, phase="forward"))]
    measured = Measured(events=events, counters={"forward": Counter(2048, 4096)})
    assert measured.peak.live_bytes == 2048
    assert measured.peak.components[UNATTRIBUTED] == 1536
    assert sum(measured.peak.components.values()) == 2048


GIB = 1 << 30


@pytest.fixture(scope="module")
def planned() -> MemoryPlan:
    return plan(RunConfig.from_flat({"model": "gpt2", "weights": "random", "batch_size": 1, "seq_len": 16}))


def taking(plan, n_bytes):
    return dataclasses.replace(plan, peak_bytes=n_bytes)


def test_the_last_line_says_what_was_saved_and_what_is_only_predicted(planned):
    line = summary_line(
        None, taking(planned, GIB), {BASELINES[1].said: taking(planned, 4 * GIB)}, measured_bytes=2 * GIB
    )
    assert line == (
        "memory: peak of the step 2.00 GiB measured (predicted 1.00 GiB); "
        "full fine-tuning (fp32 weights, bf16 autocast, AdamW) would take 4.00 GiB (predicted): saves 50%"
    )


def test_a_negative_saving_is_reported_as_such(planned):
    line = summary_line(None, taking(planned, 3 * GIB), {BASELINES[0].said: taking(planned, 2 * GIB)})
    assert line == (
        "memory on a GPU: peak of the step 3.00 GiB predicted, not measured; "
        "16-bit LoRA (bf16 base, AdamW) would take 2.00 GiB (predicted): saves nothing, takes 50% more"
    )


def test_a_phase_that_took_more_than_the_step_is_said_beside_its_own_prediction(planned):
    assert phase_part(planned, {"loading": GIB, "step": 2 * GIB}) == phase_part(planned, {}) == ""
    loading = dataclasses.replace(planned.stages["loading"], peak_bytes=GIB)
    found = dataclasses.replace(planned, stages={**planned.stages, "loading": loading})
    measured = {"step": GIB, "loading": 3 * GIB, "generation": GIB}
    assert phase_part(found, measured) == "its largest phase is loading: 3.00 GiB measured, 1.00 GiB predicted"
    assert phase_part(found, {}) == "its largest phase is loading: 1.00 GiB predicted"
    assert phase_part(found, {"initialization": GIB, "step": 1}) == (
        "its largest phase is fitting the factors to the data: 1.00 GiB measured"
    )


def test_a_cpus_figure_is_not_compared_with_a_gpus(planned, profile):
    line = summary_line(profile, taking(planned, GIB), {BASELINES[0].said: taking(planned, 2 * GIB)})
    assert "saves 50%" in line
    assert line.endswith("of live tensors were measured")
    assert "predicted, not measured" in line


@pytest.mark.filterwarnings("ignore")
def test_the_command_trains_a_few_steps_and_writes_what_they_took(tmp_path, capsys):
    from qlora_kit.cli.profile import run

    out = tmp_path / "profiled"
    config = RunConfig.from_flat({"model": "demo", "out": str(out), "batch_size": 2, "device": "cpu"})
    profile = run(config, steps=2, snapshot=True)
    assert {p.name for p in out.iterdir()} == {"run.json", "metrics.jsonl", "profile.json", "profile.png"}
    assert MemoryProfile.from_dict(json.loads((out / "profile.json").read_text())) == profile
    assert profile.steps == 2
    assert abs(profile.error) < 0.01  # through the Trainer, with padding
    printed = capsys.readouterr().out
    for name in ("optimizer states", "largest at the peak", "in all", "no snapshot: "):
        assert name in printed
    assert "16-bit LoRA (bf16 base, AdamW) would take" in printed.splitlines()[-1]
