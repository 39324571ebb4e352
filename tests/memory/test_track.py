from __future__ import annotations

import gc
import itertools

import pytest
import torch
from memory_cases import cpu_optimizer, real_batch, record, settings, small_config

from qlora_kit import build
from qlora_kit.memory import kernels
from qlora_kit.memory.simulate import run_step
from qlora_kit.memory.track import (
    CATEGORIES,
    PHASES,
    MemoryTracker,
    Region,
    overall_peak,
    peaks_by_region,
)
from qlora_kit.memory.watch import label_model, watch
from qlora_kit.model.blocks import find_blocks

CPU, META = torch.device("cpu"), torch.device("meta")


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_live_bytes_follow_birth_and_death(device):
    with MemoryTracker(device, block_bytes=1) as tracker:
        first = torch.empty(100, device=device)
        second = torch.empty(50, dtype=torch.int8, device=device)
        assert tracker.live_bytes == 450
        del first
        assert tracker.live_bytes == 50
        del second
    assert tracker.live_bytes == 0
    assert overall_peak(tracker.events).n_bytes == 450


def test_every_storage_is_rounded_up_to_a_block():
    with MemoryTracker("meta") as tracker:
        tensors = [torch.empty(n, dtype=torch.uint8, device="meta") for n in (1, 512, 513)]
        assert tracker.live_bytes == 512 + 512 + 1024
    assert tensors


def test_views_share_and_a_storage_lives_as_long_as_any_of_them():
    with MemoryTracker("cpu", 1) as tracker:
        view = torch.empty(8, 8).T[2:].unsqueeze(0)[:, 1]
        assert tracker.live_bytes == 256
        del view
        assert tracker.live_bytes == 0


def test_what_autograd_keeps_is_live_until_the_backward_pass():
    leaf = torch.ones(64, requires_grad=True)
    with MemoryTracker("cpu", 1) as tracker:
        loss = (leaf.exp() * 2).sum()
        assert tracker.live_bytes == 256 + 4  # the exponential, saved; the loss
        loss.backward()
        assert tracker.live_bytes == 256 + 4  # the gradient; the loss


def test_a_storage_resized_in_place_counts_its_new_size():
    with MemoryTracker("cpu", 1) as tracker:
        tensor = torch.empty(4)
        tensor.resize_(100)
        assert tracker.live_bytes == 400
        del tensor
    assert tracker.live_bytes == 0


def test_other_devices_and_paused_births_do_not_count():
    with MemoryTracker("meta", 1) as tracker:
        here = torch.empty(10)
        with tracker.paused():
            elsewhere = torch.empty(10, device="meta")
        assert tracker.live_bytes == 0
    assert here.numel() == elsewhere.numel()


def test_a_label_holds_from_birth_whenever_it_is_given():
    with MemoryTracker("meta", 1) as tracker:
        tensor = torch.empty(10, device="meta")
        torch.empty(5, device="meta")
        tracker.label(tensor, "gradients")
    assert overall_peak(tracker.events).components == {"gradients": 40, "workspaces": 20}


def test_a_region_that_only_frees_peaks_at_its_start():
    with MemoryTracker("cpu", 1) as tracker:
        tensor = torch.empty(10)
        tracker.enter("backward")
        del tensor
    assert peaks_by_region(tracker.events)[Region(step=0, phase="backward")].n_bytes == 40


@pytest.fixture(scope="module")
def qlora_record():
    return record(settings(bits=4), small_config("llama", layers=3))


@pytest.mark.filterwarnings("ignore")
def test_components_sum_to_the_peak_everywhere(qlora_record):
    peaks = peaks_by_region(qlora_record.events)
    for peak in peaks.values():
        assert sum(peak.components.values()) == peak.n_bytes
        assert set(peak.components) <= set(CATEGORIES)
        assert all(n_bytes >= 0 for n_bytes in peak.components.values())
    assert {region.phase for region in peaks} == set(PHASES)
    live = list(itertools.accumulate(event.change_bytes for event in qlora_record.events))
    assert max(live) == overall_peak(qlora_record.events).n_bytes
    assert min(live) >= 0


@pytest.mark.filterwarnings("ignore")
def test_blocks_are_told_apart_forwards_and_backwards(qlora_record):
    order = [r for r in peaks_by_region(qlora_record.events) if r.step == 2]
    assert [r.block for r in order if r.phase == "forward" and r.block is not None] == [0, 1, 2]
    assert [r.block for r in order if r.recomputes] == [2, 1, 0]
    assert all(r.phase == "backward" for r in order if r.recomputes)


@pytest.mark.filterwarnings("ignore")
def test_each_category_holds_what_it_says():
    config = settings(bits=4, optim="adamw")
    architecture = small_config("llama")
    built = build.build_model(config, CPU, architecture)
    model = built.model.train()
    optimizer = cpu_optimizer(built, config)
    tracker = MemoryTracker("cpu", 1, kernels.open_kernels())
    with watch(tracker, model, optimizer), tracker:
        tracker.begin_step()
        batch = real_batch(config, architecture.vocab_size)
        run_step(tracker, built, optimizer, [batch], 1.0)
    peaks = peaks_by_region(tracker.events)
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    after = peaks[Region(step=1, phase="optimizer")].components
    assert after["adapters"] == after["gradients"] == trained
    states = sum(v.nbytes for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor))
    assert after["optimizer states"] == states
    packed = [p for p in model.parameters() if hasattr(p, "quant_state")]
    assert after["quantized weights"] == sum(p.nbytes for p in packed)
    assert after["embeddings and head"] == 2 * 640 * 128 * 2
    checkpoint_bytes = config.optim.batch_size * config.data.seq_len * 128 * 2
    in_loss = peaks[Region(step=1, phase="loss")].components
    assert in_loss["checkpoints"] == len(find_blocks(model)) * checkpoint_bytes
    assert in_loss["loss"] >= config.optim.batch_size * config.data.seq_len * 640 * 4
    assert (
        peaks[Region(step=1, phase="backward", block=0, recomputes=True)].components["recomputed block"]
        > checkpoint_bytes
    )
    gc.collect()


def test_the_hooks_leave_nothing_on_the_model():
    config = settings()
    model = build.build_model(config, META, small_config("gpt2")).model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    before = _hooks(model)
    with watch(MemoryTracker("meta"), model, optimizer):
        assert _hooks(model) > before
    assert _hooks(model) == before
    assert not optimizer._optimizer_step_pre_hooks
    assert not any(getattr(p, "_post_accumulate_grad_hooks", None) for p in model.parameters())


def _hooks(model):
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


@pytest.mark.parametrize("bits", [4, 8])
def test_states_of_quantized_weights_are_told_from_the_weights(bits):
    model = build.build_model(settings(bits=bits), META, small_config("gpt2")).model
    tracker = MemoryTracker("meta", 1)
    label_model(tracker, model)
    components = overall_peak(tracker.events).components
    elements = 2 * 12 * 128 * 128  # two blocks of twelve squares of the width
    assert components["quantized weights"] == elements * bits // 8
    assert components["quantization state"] > 0
    assert "weights" not in components


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("gpt2", {}),
        ("llama", {"gradient_checkpointing": False}),
        ("llama", {"full": True}),
        ("opt", {}),
        ("gpt_neox", {"full": True, "gradient_checkpointing": False}),
        ("phi", {}),
        ("gemma2", {}),
    ],
    ids=str,
)
def test_meta_and_real_tensors_agree_to_the_byte(family, changes):
    """The same operators (eager attention, no bitsandbytes) give the same peak, part by part."""
    config = settings(**changes)
    assert _parts(config, family, META) == _parts(config, family, CPU)


def _parts(config, family, device):
    architecture = small_config(family)
    architecture._attn_implementation = "eager"
    if family == "gemma2":
        architecture.layer_types = ["full_attention", "full_attention"]
    built = build.build_model(config, device, architecture)
    model = built.model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-3, 0.9, foreach=False)
    tracker = MemoryTracker(device.type, 1, kernels.stand_ins() if device.type == "meta" else None)
    batch = {name: tensor.to(device) for name, tensor in real_batch(config, 640).items()}
    with watch(tracker, model, optimizer), tracker:
        for tensor in batch.values():
            tracker.label(tensor, "inputs")
        for _ in range(2):
            tracker.begin_step()
            run_step(tracker, built, optimizer, [batch], 1.0)
    tracker.stop()
    return {region: peak.n_bytes for region, peak in peaks_by_region(tracker.events).items()}
