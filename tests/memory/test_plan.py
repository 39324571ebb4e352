from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from families import FAMILIES
from hypothesis import Phase, example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from memory_cases import cpu_optimizer, nothing_collected, real_batch, small_config
from transformers import AutoConfig

from qlora_kit import build
from qlora_kit.config.settings import RunConfig
from qlora_kit.errors import UserError
from qlora_kit.memory import kernels, preflight, rules
from qlora_kit.memory import simulate as simulation
from qlora_kit.memory.baselines import BASELINES, baseline_plan, possible_plan
from qlora_kit.memory.extrapolate import NotEvenError, extrapolate
from qlora_kit.memory.plan import CannotPlanError, plan, resolve_tokens, with_layers
from qlora_kit.memory.simulate import Simulation, run_step, simulate
from qlora_kit.memory.track import MemoryTracker, Region, overall_peak, peaks_by_region
from qlora_kit.model import load, quantize, source
from qlora_kit.model.device import planned_for

CPU, META = torch.device("cpu"), torch.device("meta")
WINDOW = {"sliding_window": 16, "use_sliding_window": True}
EVEN = [family for family in FAMILIES if family != "gemma2"]  # its layers alternate


def config_file(folder, family, layers, dropout=0.0, **fields):
    config = small_config(family, layers, dropout)
    path = folder / f"{family}-{layers}.json"
    path.write_text(json.dumps({**config.to_dict(), **fields}))
    return str(path)


def run(model, **changes):
    flat = {"model": model, "weights": "random", "bits": 4, "batch_size": 2, "seq_len": 64, "r": 8, **changes}
    return RunConfig.from_flat(flat)


ROUNDING_BYTES = 4 * 512  # the 8-bit states of a flat buffer are rounded once, not layer by layer


def same(one, other):
    """Whether two plans are equal, but for how the optimizer's states are rounded."""
    return (
        (one.phase, one.optim) == (other.phase, other.optim)
        and len(one.series) == len(other.series)
        and all(alike(x, y) for x, y in zip((one, *one.series), (other, *other.series), strict=True))
    )


def alike(one, other):
    states = [point.components["optimizer states"] for point in (one, other)]
    rest = [{**point.components, "optimizer states": 0} for point in (one, other)]
    where = [(point.phase, point.block, point.operation) for point in (one, other)]
    return abs(states[0] - states[1]) <= ROUNDING_BYTES and rest[0] == rest[1] and where[0] == where[1]


@pytest.mark.parametrize(
    "changes", [{"layers": "0-2,5"}, {"rank_pattern": "layers.3.mlp.up_proj=16"}, {"targets": "layers.6.mlp.up_proj"}]
)
def test_blocks_with_factors_of_their_own_are_all_simulated(tmp_path, changes):
    """Three or four blocks, extrapolated, would have other factors than seven."""
    config = run(config_file(tmp_path, "llama", 7), **changes)
    planned = plan(config)
    model = build.build_model(config, META).model
    assert planned.exact
    assert planned.n_trainable == quantize.count_parameters(model).trainable > 0


@pytest.mark.parametrize("family", EVEN)
def test_extrapolation_is_exact_for_equal_layers(tmp_path, family):
    config = run(config_file(tmp_path, family, 7))
    shallow, whole = plan(config), plan(config, exact=True)
    assert (shallow.exact, whole.exact) == (False, True)
    assert same(shallow, whole)
    assert (shallow.n_parameters, shallow.n_trainable) == (whole.n_parameters, whole.n_trainable)
    assert shallow.extras == whole.extras


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_checkpointing": False},
        {"bits": 16, "full": True},
        {"bits": 16, "full": True, "gradient_checkpointing": False, "seq_len": 8},
        {"bits": 16, "optim": "adamw", "batch_size": 8},
        {"bits": 8},
        {"dora": True},
        {"dropout": 0.1, "grad_accum": 2},
        {"optim": "paged_adamw_32bit", "r": 64},
        {"pack": True},
        {"lean": "off"},
        {"half_blocks": "off"},
        {"offload_activations": "off"},
        {"offload_activations": "off", "half_blocks": "on"},
        {"offload_embedding": "on", "flat_buffer": False},
        {"init": "pissa", "adapter_dtype": "fp32"},
        {"variant": "lora-xs", "r": 16},
    ],
    ids=str,
)
def test_extrapolation_is_exact_for_every_switch(tmp_path, changes):
    config = run(config_file(tmp_path, "llama", 9), **changes)
    shallow, whole = plan(config), plan(config, exact=True)
    assert not shallow.exact
    assert same(shallow, whole)


@pytest.mark.parametrize(
    ("family", "kinds"), [("gemma2", ["sliding", "full"] * 6), ("qwen2", ["full", "full", "sliding"] * 5)]
)
def test_groups_of_layers_that_repeat_are_extrapolated(tmp_path, family, kinds):
    """Every kind has its own attention: rows of 64 tokens are longer than the window of 16."""
    fields = {"layer_types": [f"{kind}_attention" for kind in kinds], **WINDOW}
    config = run(config_file(tmp_path, family, len(kinds), **fields), r=16)
    shallow, whole = plan(config), plan(config, exact=True)
    assert (shallow.exact, whole.exact) == (False, True)
    assert same(shallow, whole)
    assert (shallow.n_parameters, shallow.n_trainable) == (whole.n_parameters, whole.n_trainable)


def test_an_adversary_takes_its_step_and_the_gradient_of_the_embeddings(tmp_path):
    """Beside two accumulated batches: δ, the embeddings it moves, and their gradient."""
    file = config_file(tmp_path, "llama", 2)
    peaks = [
        overall_peak(
            simulate(run(file, offload_activations="off", **changes), Simulation(seq_len=64, optim="adamw")).events
        ).n_bytes
        for changes in ({"grad_accum": 2}, {"adversarial": "fgm"})
    ]
    embeddings_bytes = 2 * 64 * 64 * 2  # bf16
    assert embeddings_bytes <= peaks[1] - peaks[0] <= 4 * embeddings_bytes


def test_the_optimizer_has_its_place_in_the_step_even_where_it_allocates_nothing(tmp_path):
    series = plan(run(config_file(tmp_path, "llama", 6), optim="adamw", adapter_dtype="fp32")).series
    clip, optimizer = ([p for p in series if p.phase == phase] for phase in ("clip", "optimizer"))
    assert [p.phase for p in series if p.phase in ("clip", "optimizer")][-1] == "optimizer"
    assert 0 < optimizer[0].live_bytes <= clip[0].live_bytes


def test_layers_that_differ_are_run_whole(tmp_path):
    assert plan(run(config_file(tmp_path, "gemma2", 6))).exact
    assert plan(run(config_file(tmp_path, "llama", 4))).exact
    mixed = config_file(tmp_path, "qwen2", 6, layer_types=["full_attention"] * 5 + ["sliding_attention"], **WINDOW)
    assert plan(run(mixed)).exact


def test_peaks_that_do_not_grow_evenly_are_refused():
    region = Region(2, "loss")
    from qlora_kit.memory.track import Peak

    at_three, at_four = Peak(10, region, "a", {"loss": 10}), Peak(12, region, "b", {"loss": 12})
    with pytest.raises(NotEvenError):
        extrapolate({region: at_three}, {region: at_four}, 8)


@pytest.mark.parametrize("changes", [{}, {"bits": 8}, {"bits": 16, "full": True}, {"gradient_checkpointing": False}])
def test_components_sum_to_the_peak_in_every_part(tmp_path, changes):
    planned = plan(run(config_file(tmp_path, "gpt2", 6, dropout=0.1), **changes))
    assert sum(planned.components.values()) == planned.peak_bytes
    for point in (*planned.series, *planned.phases.values()):
        assert sum(point.components.values()) == point.live_bytes
        assert min(point.components.values()) >= 0
    assert max(p.live_bytes for p in planned.phases.values()) == planned.peak_bytes
    assert json.loads(json.dumps(planned.to_dict()))["peak_bytes"] == planned.peak_bytes


def test_the_warm_up_without_passes_changes_no_peak_of_the_second_step(tmp_path):
    config = run(config_file(tmp_path, "llama", 3))
    architecture = source.load_model_config(config.base)
    simulation = Simulation(seq_len=64, optim="adamw_8bit")
    both, second = (
        peaks_by_region(simulate(config, simulation, with_layers(architecture, 3), first_step=first).events)
        for first in (True, False)
    )
    assert {r: p for r, p in both.items() if r.step == 2} == {r: p for r, p in second.items() if r.step == 2}
    assert overall_peak(simulate(config, simulation, with_layers(architecture, 3)).events).region.step == 2


def test_quantized_layers_on_meta_are_real_ones(tmp_path):
    """Trap 18: `Params4bit.to("meta")` would leave the weights unquantized."""
    for bits, kind in ((4, bnb.nn.Params4bit), (8, bnb.nn.Int8Params)):
        config = run(config_file(tmp_path, "gpt2", 2), bits=bits).base
        on_meta, real = (load.load_base(config, device) for device in (META, CPU))
        shapes = {name: (type(p), p.shape, p.dtype, p.requires_grad) for name, p in real.named_parameters()}
        assert {n: (type(p), p.shape, p.dtype, p.requires_grad) for n, p in on_meta.named_parameters()} == shapes
        assert {p.device.type for p in on_meta.parameters()} == {"meta"}
        assert any(isinstance(p, kind) for p in on_meta.parameters())
        if bits == 4:
            states = [p.quant_state for p in on_meta.parameters() if hasattr(p, "quant_state")]
            assert all(s.nested and s.state2.absmax.device.type == "meta" and s.dtype == torch.bfloat16 for s in states)
        assert quantize.count_parameters(on_meta) == quantize.count_parameters(real)


def trained(config, architecture):
    torch.manual_seed(3)
    built = build.build_model(config, CPU, architecture)
    model = built.model.train()
    optimizer = cpu_optimizer(built, config)
    batch = real_batch(config, architecture.vocab_size)
    tracker = MemoryTracker("cpu")
    for _ in range(2):
        run_step(tracker, built, optimizer, [batch], 1.0)
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.filterwarnings("ignore")
def test_a_plan_leaves_nothing_that_changes_a_later_run(tmp_path):
    """Trap 19: bitsandbytes' code table, cached on `meta`, breaks every later quantization."""
    config = run(config_file(tmp_path, "llama", 2), optim="adamw_8bit", bits=4)
    architecture = small_config("llama")
    before = trained(config, architecture)
    bnb.functional.name2qmap.clear()  # as in a fresh process
    state = torch.get_rng_state()
    plan(config)
    assert torch.equal(torch.get_rng_state(), state)
    assert not bnb.functional.name2qmap
    after = trained(config, small_config("llama"))
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
    table = bnb.functional.name2qmap["dynamic"]
    plan(config)
    assert bnb.functional.name2qmap["dynamic"] is table


def test_without_the_guard_the_code_table_would_stay_on_meta():
    kept = dict(bnb.functional.name2qmap)
    bnb.functional.name2qmap.clear()
    try:
        bnb.nn.Params4bit(torch.empty(64, 64, device="meta"))._quantize(META)
        assert bnb.functional.name2qmap["dynamic"].device.type == "meta"
    finally:
        bnb.functional.name2qmap.clear()
        bnb.functional.name2qmap.update(kept)


def test_values_that_meta_has_not_are_answered():
    """Trap 20: the checks for padding and packing ask for `.item()`."""
    tensor = torch.zeros(3, device="meta")
    with pytest.raises((RuntimeError, NotImplementedError)):
        tensor.sum().item()
    with MemoryTracker("meta", stand_ins=kernels.stand_ins()):
        assert tensor.sum().item() == 1.0
        assert (tensor == 0).all().item() is True
        assert torch.tensor(7.5).item() == 7.5


@pytest.fixture(scope="module")
def operations(tmp_path_factory):
    """The operators that made something, in a plan's second step with dropout and grouped queries."""
    config = run(config_file(tmp_path_factory.mktemp("model"), "gpt2", 2, dropout=0.1), gradient_checkpointing=False)
    record = simulate(config, Simulation(seq_len=64, optim="paged_adamw_8bit"))
    return record, {event.storage.operation for event in record.events}


def test_attention_takes_the_fused_way(operations):
    """Trap 21: on `meta` torch would take the one that writes out the scores, T x T a head."""
    _, made = operations
    assert "aten._scaled_dot_product_flash_attention.default" in made
    assert "aten._scaled_dot_product_flash_attention_backward.default" in made
    assert not any("softmax" in name for name in made if "log_softmax" not in name)


def test_dropout_takes_the_fused_way(operations):
    """Trap 22: the mask is one byte an element, not a factor in the dtype of the input."""
    _, made = operations
    assert "aten.native_dropout.default" in made
    assert not any("bernoulli" in name for name in made)


def test_without_the_choices_of_cuda_neither_is_fused(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels.CudaChoices, "__torch_function__", lambda self, f, t, a=(), k=None: f(*a, **(k or {})))
    config = run(config_file(tmp_path, "gpt2", 2, dropout=0.1), gradient_checkpointing=False)
    made = {e.storage.operation for e in simulate(config, Simulation(seq_len=64, optim="adamw")).events}
    assert "aten.native_dropout.default" not in made
    assert not any("flash" in name for name in made)


def test_frozen_parameters_are_followed_without_a_fake_device(operations):
    """Trap 23: torch's own tracker fails on them."""
    record, _ = operations
    assert record.n_trainable < record.n_parameters
    assert "gradients" in peaks_by_region(record.events)[Region(2, "clip")].components


def test_two_steps_because_the_states_are_born_in_the_first(operations):
    """Trap 24."""
    record, _ = operations
    first, second = (peaks_by_region(record.events)[Region(step, "loss backward")] for step in (1, 2))
    assert second.n_bytes - first.n_bytes == second.components["optimizer states"] > 0
    assert overall_peak(record.events).region.step == simulation.STEPS == 2


@pytest.mark.parametrize("lean", ["on", "off"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "gpt_neox"])
def test_every_step_has_its_loss(tmp_path, family, lean):
    """OPT's head reads its decoder's decoder: a hook on what transformers calls the base model is never met."""
    config = run(config_file(tmp_path, family, 2), lean=lean)
    peaks = peaks_by_region(simulate(config, Simulation(seq_len=64, optim="adamw")).events)
    assert peaks[Region(2, "loss")].components["loss"] > 0
    assert not any("loss" in peak.components for region, peak in peaks.items() if region.phase == "forward")


def test_a_masked_or_unfused_attention_takes_the_memory_efficient_way(tmp_path):
    config = run(config_file(tmp_path, "llama", 2), pack=True, varlen=False)
    t4 = Simulation(seq_len=64, optim="adamw", capability=(7, 5))
    for record in (simulate(config, Simulation(seq_len=64, optim="adamw")), simulate(run(config.base.model), t4)):
        made = {event.storage.operation for event in record.events}
        assert "aten._scaled_dot_product_efficient_attention.default" in made
        assert not any("flash" in name for name in made)


def test_the_dequantized_weight_is_there_in_both_directions(tmp_path):
    config = run(config_file(tmp_path, "llama", 2))
    born = [e for e in simulate(config, Simulation(seq_len=64, optim="adamw")).events if e.change_bytes > 0]
    weight_bytes = 2 * 128 * 384  # bf16, of a feed-forward layer
    for region in (Region(2, "forward", 1), Region(2, "backward", 1, True), Region(2, "backward", 1)):
        sizes = [e.change_bytes for e in born if e.region == region and e.storage.category == "workspaces"]
        assert sizes.count(weight_bytes) >= 2


@pytest.mark.parametrize(
    ("optim", "state_bytes"),
    [("adamw", 2 * 4 + 2), ("adamw_8bit", 2), ("paged_adamw_32bit", 8), ("lion_8bit", 1), ("sgd", 0)],
)
def test_states_follow_each_optimizers_own_rules(tmp_path, optim, state_bytes):
    settings = {"optim": optim, "r": 64, "targets": "gate_proj", "flat_buffer": False}  # 24 576 and 8 192 elements
    config = run(config_file(tmp_path, "llama", 2), **settings)
    record = simulate(config, Simulation(seq_len=64, optim=optim))
    states = peaks_by_region(record.events)[Region(2, "loss")].components.get("optimizer states", 0)
    scales = (
        {"adamw": 1, "adamw_8bit": 2, "lion_8bit": 1}.get(optim, 0) * 4 * 512
    )  # of four factors, each in a block; or steps
    tables = {"adamw_8bit": 2048, "lion_8bit": 1024}.get(optim, 0)
    assert states == record.n_trainable * state_bytes + scales + tables
    assert record.paged_bytes == 0


def test_small_states_stay_in_fp32_and_large_ones_are_paged(tmp_path):
    small = run(config_file(tmp_path, "llama", 2), optim="adamw_8bit", r=8)
    record = simulate(small, Simulation(seq_len=64, optim="adamw_8bit"))
    states = peaks_by_region(record.events)[Region(2, "loss")].components["optimizer states"]
    assert states >= record.n_trainable * 8  # every factor is below 4096 elements
    large = run(config_file(tmp_path, "llama", 2), bits=16, full=True, optim="paged_adamw_32bit")
    paged = simulate(large, Simulation(seq_len=64, optim="paged_adamw_32bit"))
    assert paged.paged_bytes == 0  # 81 920 elements at most
    wider = json.loads(Path(config_file(tmp_path, "llama", 2)).read_text())
    (tmp_path / "wide.json").write_text(json.dumps({**wider, "intermediate_size": 1024}))
    wide = run(str(tmp_path / "wide.json"), bits=16, full=True, optim="paged_adamw_32bit")
    assert simulate(wide, Simulation(seq_len=64, optim="paged_adamw_32bit")).paged_bytes == 2 * 3 * 128 * 1024 * 8


def test_autocast_keeps_a_bf16_copy_of_every_weight_through_the_forward_pass(tmp_path):
    config = run(config_file(tmp_path, "llama", 3), bits=32, full=True, optim="adamw")
    peaks = [
        peaks_by_region(simulate(config, Simulation(seq_len=64, optim="adamw", autocast=autocast)).events)[
            Region(2, "loss")
        ]
        for autocast in (False, True)
    ]
    linear = 3 * (128 * (4 * 32 + 2 * 32 + 2 * 32 + 4 * 32) + 3 * 128 * 384) + 640 * 128
    more = peaks[1].components["activations"] - peaks[0].components["activations"]
    assert more >= 2 * linear - 640 * 128 * 2  # the head's copy is born in the loss


def test_baselines_name_their_recipe_and_order_as_they_should(tmp_path):
    config = run(config_file(tmp_path, "llama", 6), batch_size=1, seq_len=16)
    lora, full32, full16 = (baseline_plan(config, b) for b in BASELINES)
    assert all(b.recipe for b in BASELINES)
    mine = plan(config)
    assert mine.peak_bytes < lora.peak_bytes < full16.peak_bytes < full32.peak_bytes
    without = baseline_plan(config, BASELINES[2], checkpointing=False)
    assert without.peak_bytes >= full16.peak_bytes
    states = full32.phases["optimizer"].components["optimizer states"]
    assert states >= 8 * full32.n_parameters  # 16 bytes a parameter: weight, gradient, two moments


def test_a_gpu_decides_the_workspaces_and_the_way_of_attention(tmp_path):
    config = run(config_file(tmp_path, "llama", 6))
    a100, h100 = (plan(config, gpu=rules.find_gpu(name)) for name in ("A100", "h100"))
    assert h100.peak_bytes - a100.peak_bytes == 2 * (32 * rules.MIB - 8 * rules.MIB - 128 * 1024)
    assert h100.gpu == "h100"
    assert h100.device_bytes > h100.peak_bytes
    with pytest.raises(UserError, match="rtx3060"):
        rules.find_gpu("rtx3061")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there the GPU is asked")
@pytest.mark.parametrize(("gpu", "mib"), [("t4", 8.125), ("rtx4090", 8.125), ("h100", 32), ("rtx5090", 32)])
def test_cublas_takes_more_from_hopper_on(gpu, mib):
    assert rules.cublas_workspace_bytes(rules.find_gpu(gpu).capability) == mib * rules.MIB


@pytest.mark.gpu
def test_torch_is_asked_what_cublas_takes_on_the_gpu_at_hand():
    asks = hasattr(torch.backends.cuda, "cublas_workspace_size")
    found = rules.cublas_workspace_bytes(torch.cuda.get_device_capability())
    assert found == torch.backends.cuda.cublas_workspace_size() if asks else found > 0


def test_flash_attentions_backward_buffers():
    same_heads = rules.flash_backward_bytes((2, 4, 100, 40), (2, 4, 100, 40), 2)
    assert same_heads == (4 * 2 * 4 * 128 * 64, 4 * 2 * 4 * 128)
    grouped = rules.flash_backward_bytes((2, 4, 128, 256), (2, 2, 128, 256), 2)
    assert grouped == (4 * 2 * 4 * 128 * 256, 4 * 2 * 4 * 128, 2 * 2 * 128 * 4 * 256, 2 * 2 * 128 * 4 * 256)


def test_lengths_resolve_as_in_training(tmp_path):
    config = run(config_file(tmp_path, "llama", 2), seq_len=None)
    architecture = source.load_model_config(config.base)
    assert resolve_tokens(config, architecture) == 128  # its positions
    with pytest.raises(UserError, match="128 positions"):
        plan(run(config.base.model, seq_len=129))
    assert plan(RunConfig.from_flat({"model": "gpt2", "batch_size": 1})).seq_len == 1024


def test_a_known_name_needs_no_download_and_an_unknown_one_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    planned = plan(RunConfig.from_flat({"model": "gpt2", "batch_size": 1, "seq_len": 32}))
    assert planned.layers == 12
    assert planned.n_parameters - planned.n_trainable == 124_439_808
    with pytest.raises(UserError):
        plan(RunConfig.from_flat({"model": "gpt-nine", "weights": "random"}))


SIZES = st.fixed_dictionaries(
    {
        "batch_size": st.integers(1, 8),
        "seq_len": st.integers(2, 96),
        "r": st.integers(1, 32),
        "layers": st.integers(3, 9),
    }
)


@pytest.mark.parametrize("bits", [4, 16])
@hypothesis_settings(max_examples=5, deadline=None, phases=(Phase.explicit, Phase.generate))
@given(sizes=SIZES, grown=st.sampled_from(["batch_size", "seq_len", "r", "layers"]), by=st.integers(1, 3))
@example(sizes={"batch_size": 8, "seq_len": 33, "r": 1, "layers": 4}, grown="seq_len", by=3)  # from one chunk to two
def test_more_of_anything_never_needs_less(tmp_path_factory, bits, sizes, grown, by):
    """With torch's AdamW: 8-bit states shrink where a factor reaches 4096 elements."""
    folder = tmp_path_factory.mktemp("models")
    peaks = []
    for size in (sizes, {**sizes, grown: sizes[grown] + by}):
        layers = size["layers"]
        changes = {key: value for key, value in size.items() if key != "layers"}
        peaks.append(plan(run(config_file(folder, "llama", layers), bits=bits, optim="adamw", **changes)).peak_bytes)
    assert peaks[1] >= peaks[0]


def test_a_large_model_on_meta_builds_in_well_under_a_second():
    import time

    config = run("gpt2-large", bits=4).base
    load.load_base(config, META)
    with nothing_collected():
        start_s = time.process_time()
        load.load_base(config, META)
        assert time.process_time() - start_s < 1.0 * float(os.environ.get("QLORA_KIT_SLOWNESS", "1"))


def test_a_plan_of_7b_takes_less_than_three_seconds():
    import time

    config = run("llama-2-7b", batch_size=1, seq_len=2048)
    plan(run("llama-2-7b", batch_size=1))
    start_s = time.process_time()
    plan(config)
    assert time.process_time() - start_s < 3


def test_a_plan_of_70b_takes_seconds():
    import time

    plan(run("llama-2-7b", batch_size=1))
    start_s = time.process_time()
    planned = plan(replace(run("llama-2-70b", batch_size=1, seq_len=None)))
    assert time.process_time() - start_s < 5
    assert planned.layers == 80
    assert 34e9 < planned.peak_bytes < 45e9


JAMBA = {
    "num_key_value_heads": 2,
    "num_experts": 2,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
}
TINY = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "max_position_embeddings": 128,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "vocab_size": 320,
}


def odd_model(folder, model_type, **fields):
    AutoConfig.for_model(model_type, **fields).to_json_file(folder / f"{model_type}.json")
    return str(folder / f"{model_type}.json")


def test_a_model_that_does_not_run_on_meta_is_one_error_and_a_run_goes_on_without_a_plan(tmp_path):
    config = run(odd_model(tmp_path, "jamba", **TINY, **JAMBA), allow_16_bit_experts=True)
    with pytest.raises(CannotPlanError, match=r"--model = .*jamba.json.*cannot be planned") as caught:
        plan(config)
    planned = preflight.plan_run(config, CPU, 64)
    assert (planned.plan, planned.reason) == (None, caught.value.reason)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (("mamba", {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 320}), "--targets.*out_proj.*x_proj"),
        (("llama", {**TINY, "num_hidden_layers": 0}), "--targets.*no linear layer"),
        (("openai-gpt", {"n_embd": 64, "n_layer": 2, "n_head": 4}), "gradient_checkpointing=False"),
    ],
    ids=["mamba", "no layers", "openai-gpt"],
)
def test_what_the_trainer_would_refuse_is_refused_with_a_remedy(tmp_path, model, message):
    """By the run as well, which would end there: it is no model that merely cannot be planned."""
    config = run(odd_model(tmp_path, model[0], **model[1]))
    for refused in (lambda: plan(config), lambda: preflight.plan_run(config, CPU, 64)):
        with pytest.raises(UserError, match=re.compile(message, re.DOTALL)) as caught:
            refused()
        assert not isinstance(caught.value, CannotPlanError)


def test_a_model_whose_blocks_cannot_be_checkpointed_is_planned_without(tmp_path):
    model = odd_model(tmp_path, "openai-gpt", n_embd=64, n_layer=2, n_head=4, n_positions=128, vocab_size=320)
    config = run(model, gradient_checkpointing=False)
    assert plan(config).exact
    assert preflight.plan_run(config, CPU, 64).baselines.keys() == {b.said for b in BASELINES if b.default}


SPARSE = {**TINY, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
HYBRIDS = {
    "deepseek_v3": {
        "num_hidden_layers": 5,
        "n_routed_experts": 4,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "q_lora_rank": 32,
        "kv_lora_rank": 32,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 16,
        "v_head_dim": 32,
    },
    "qwen3_next": {
        "num_hidden_layers": 5,
        "num_experts": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "shared_expert_intermediate_size": 64,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
    },
}


@pytest.mark.filterwarnings("ignore:The following:RuntimeWarning")  # PEFT's, about patterns of its own
@pytest.mark.parametrize("family", HYBRIDS)
def test_experts_and_hybrids_are_run_whole(tmp_path, family):
    """PEFT's layers for experts switch autocast off, which torch refuses on `meta`."""
    stock = torch.autocast
    model = odd_model(tmp_path, family, **{**SPARSE, **HYBRIDS[family]})
    planned = plan(run(model, allow_16_bit_experts=True))
    assert planned.exact
    assert sum(planned.components.values()) == planned.peak_bytes
    assert torch.autocast is stock


def dtypes_of(model):
    return {p.dtype for p in model.parameters() if p.is_floating_point()}


def test_a_gpu_without_bf16_runs_in_fp16_as_the_trainer_does_there(tmp_path):
    """Factors in fp32, the step under fp16 autocast; no full fine-tuning of 16-bit weights."""
    config, t4 = run(config_file(tmp_path, "llama", 2), r=64), rules.find_gpu("t4")
    with planned_for(has_bf16=False):
        model = build.build_model(config, META).model
        adapters = {p.dtype for name, p in model.named_parameters() if "lora_" in name}
        assert (dtypes_of(model), adapters) == ({torch.float16, torch.float32}, {torch.float32})
    assert dtypes_of(build.build_model(config, META).model) == {torch.bfloat16}
    a100, here = (plan(config, gpu=gpu).phases["clip"].components for gpu in (None, t4))
    assert here["adapters"] == 2 * a100["adapters"]
    with pytest.raises(UserError, match="without bf16"):
        plan(run(config.base.model, bits=16, full=True), gpu=t4)
    recipes = {b.name: b.on(t4).recipe for b in BASELINES}
    assert "fp32 under fp16 autocast" in recipes["full32"]
    assert not any("bf16" in recipe for recipe in recipes.values())


def test_a_gpu_without_bf16_is_compared_with_what_it_can_run(tmp_path):
    config, t4 = run(config_file(tmp_path, "llama", 2)), rules.find_gpu("t4")
    assert [possible_plan(config, b, gpu=t4) is None for b in BASELINES] == [False, False, True]
    on_t4, on_a100 = (simulate(config, Simulation(seq_len=64, optim="adamw", capability=c)) for c in ((7, 5), (8, 0)))
    attended = "aten._scaled_dot_product_efficient_attention.default"
    seen = {e.storage.n_bytes for e in on_t4.events if e.storage.operation == attended}
    assert attended not in {e.storage.operation for e in on_a100.events}
    assert 2 * 2 * 64 * 4 * 32 in seen  # batch, tokens, heads, features of two bytes
