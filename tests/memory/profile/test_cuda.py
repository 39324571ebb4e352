"""The playback of the allocator's record, on records written by hand; what needs a GPU is marked so."""

from __future__ import annotations

import pytest
import torch
from memory_cases import settings, small_config

from qlora_kit.memory.profile.cuda import Note, blocks_of, play_back
from qlora_kit.memory.profile.result import UNATTRIBUTED, Measured
from qlora_kit.memory.track import Region

MODEL = {"filename": "/site/transformers/models/gpt2/modeling_gpt2.py", "line": 12, "name": "forward"}
TORCH = {"filename": "/site/torch/nn/functional.py", "line": 5, "name": "linear"}
BITSANDBYTES = {"filename": "/site/bitsandbytes/backends/cuda/ops.py", "line": 7, "name": "_dequantize_4bit_impl"}
CHECKPOINT = {"filename": "/site/torch/utils/checkpoint.py", "line": 9, "name": "recompute_fn"}
WORKSPACE = 8_519_680


def alloc(time_us, addr, size, *frames):
    return {"action": "alloc", "addr": addr, "size": size, "time_us": time_us, "frames": list(frames)}


def free(time_us, addr):
    return {"action": "free_requested", "addr": addr, "size": 0, "time_us": time_us, "frames": []}


def played(trace, notes=(), blocks=()):
    return play_back(blocks, trace, notes, WORKSPACE)


def test_what_lived_before_is_named_by_its_address():
    blocks = [{"address": 100, "size": 1024}, {"address": 5000, "size": 512}]
    result = played([], [Note(time_us=1, address=100, category="adapters")], blocks)
    assert [(e.change_bytes, e.storage.category) for e in result.events] == [(1024, "adapters"), (512, "workspaces")]


def test_an_allocation_is_told_by_the_part_of_the_step_and_by_what_made_it():
    trace = [
        alloc(11, 1, 100, TORCH, MODEL),
        alloc(12, 2, 700, BITSANDBYTES, MODEL),
        alloc(21, 3, 512),
        alloc(22, 4, 512, TORCH, MODEL, CHECKPOINT),
    ]
    notes = [
        Note(time_us=10, region=Region(step=1, phase="forward", block=0)),
        Note(time_us=20, region=Region(step=1, phase="backward", block=0)),
    ]
    result = played(trace, notes)
    found = [(e.storage.n_bytes, e.storage.category) for e in result.events]
    assert found == [(512, "activations"), (1024, "workspaces"), (512, "activations"), (512, "recomputed block")]
    assert result.lines[id(result.events[0].storage)] == "gpt2/modeling_gpt2.py:12 in forward"
    assert result.lines[id(result.events[2].storage)] == ""
    assert [e.region.recomputes for e in result.events] == [False, False, False, True]


def test_a_name_belongs_to_what_lives_at_the_address_then():
    trace = [alloc(11, 1, 512), free(12, 1), alloc(13, 1, 1024)]
    notes = [
        Note(time_us=10, region=Region(step=1, phase="forward")),
        Note(time_us=14, address=1, category="gradients"),
    ]
    events = played(trace, notes).events
    assert [(e.change_bytes, e.storage.category) for e in events] == [
        (512, "activations"),
        (-512, "activations"),
        (1024, "gradients"),
    ]


def test_a_workspace_of_cublas_is_known_by_its_size_and_by_staying():
    trace = [alloc(11, 1, WORKSPACE), alloc(12, 2, WORKSPACE), free(13, 2)]
    events = played(trace, [Note(time_us=10, region=Region(step=1, phase="forward"))]).events
    assert [e.storage.category for e in events] == ["workspaces", "activations", "activations"]


def test_other_entries_of_the_record_change_nothing():
    others = [
        {"action": action, "addr": 1, "size": 2 << 20, "time_us": 11, "frames": []}
        for action in ("segment_alloc", "free_completed", "snapshot", "segment_free")
    ]
    assert played(others, [Note(time_us=10, region=Region(step=1, phase="forward"))]).events == []


def test_blocks_without_addresses_are_counted_from_their_segment():
    states = ("active_allocated", "inactive", "active_allocated")
    segment = {"address": 1000, "blocks": [{"size": 512, "state": state} for state in states]}
    assert [block["address"] for block in blocks_of(segment)] == [1000, 2024]


@pytest.mark.gpu
def test_a_profile_on_cuda_explains_the_allocators_peak():
    from test_profile import Run

    from qlora_kit.memory.profile.profiler import Profiler

    device = torch.device("cuda:0")
    run = Run(settings(bits=16, adapter_dtype="bf16"), device=device)  # moved, the factors would leave their buffer
    assert run.built.factors is not None
    with Profiler(run.config, device, 2, predicts=False) as profiler:
        profiler.begin(run.model, run.optimizer)
        for _ in range(2):
            profiler.begin_step()
            run.step()
            profiler.end_step()
    profile = profiler.profile
    assert sum(profile.components.values()) == profile.peak_bytes
    assert abs(profile.components.get(UNATTRIBUTED, 0)) < 0.02 * profile.peak_bytes
    assert {"gradients", "optimizer states", "adapters", "weights"} <= {k for k, v in profile.components.items() if v}


def test_a_record_without_steps_has_no_peak():
    with pytest.raises(ValueError, match="empty"):
        _ = Measured(events=[]).peak
    assert small_config("gpt2").n_embd == 128
