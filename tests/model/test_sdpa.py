"""Grouped keys on every GPU: the kernel that a call takes, and no scores where flash attention cannot run."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, tiny_model
from memory_cases import settings, small_config
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qlora_kit import build
from qlora_kit.lean import varlen
from qlora_kit.memory import kernels
from qlora_kit.memory.autocast import MetaAutocast
from qlora_kit.memory.simulate import Simulation, simulate
from qlora_kit.memory.track import MemoryTracker
from qlora_kit.model import load, sdpa
from qlora_kit.model.device import planned_for
from qlora_kit.model.sdpa import EFFICIENT, FLASH, MATH, AttentionCall, kernel_of

META = torch.device("meta")
T4, A100, RTX4090, HOPPER = (7, 5), (8, 0), (8, 9), (9, 0)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ROWS, HEADS, GROUPS, TOKENS, WIDTH = 2, 8, 4, 256, 32


class Grouped:
    num_key_value_groups = GROUPS
    is_causal = True


def tensors(dtype, device="meta", tokens=TOKENS):
    draw = torch.Generator().manual_seed(0)
    shapes = [(ROWS, heads, tokens, WIDTH) for heads in (HEADS, HEADS // GROUPS, HEADS // GROUPS)]
    return [torch.randn(s, generator=draw, dtype=dtype).to(device).requires_grad_() for s in shapes]


def stock(*args, **options):
    return ALL_ATTENTION_FUNCTIONS["sdpa"](*args, **options)


@pytest.mark.parametrize(
    ("kernel", "capability", "call"),
    [
        (FLASH, A100, AttentionCall(dtype=BF16, width=128, value_width=128, grouped=True)),
        (FLASH, HOPPER, AttentionCall(dtype=FP16, width=20, value_width=20)),
        (EFFICIENT, A100, AttentionCall(dtype=BF16, width=128, value_width=128, masked=True)),
        (EFFICIENT, A100, AttentionCall(dtype=BF16, width=320, value_width=320)),
        (EFFICIENT, A100, AttentionCall(dtype=BF16, width=192, value_width=128)),
        (EFFICIENT, A100, AttentionCall(dtype=BF16, width=64, value_width=64, square=False)),
        (EFFICIENT, A100, AttentionCall(dtype=FP32, width=128, value_width=128)),
        (EFFICIENT, T4, AttentionCall(dtype=FP16, width=128, value_width=128)),
        (MATH, T4, AttentionCall(dtype=BF16, width=128, value_width=128)),
        (MATH, A100, AttentionCall(dtype=FP32, width=30, value_width=30)),
        (EFFICIENT, T4, AttentionCall(dtype=FP32, width=30, value_width=30)),
        (MATH, A100, AttentionCall(dtype=BF16, width=20, value_width=20, masked=True)),
        (FLASH, RTX4090, AttentionCall(dtype=BF16, width=256, value_width=256)),
        (EFFICIENT, RTX4090, AttentionCall(dtype=BF16, width=256, value_width=256, dropout=0.1)),
        (EFFICIENT, RTX4090, AttentionCall(dtype=BF16, width=208, value_width=208)),
        (FLASH, RTX4090, AttentionCall(dtype=BF16, width=208, value_width=208, trains=False)),
        (FLASH, A100, AttentionCall(dtype=BF16, width=208, value_width=208)),
    ],
    ids=str,
)
def test_the_kernel_is_the_one_that_torchs_source_says(kernel, capability, call):
    assert kernel_of(call, capability) == kernel


@pytest.mark.parametrize(
    "call",
    [
        AttentionCall(dtype=FP16, width=128, value_width=128, grouped=True),
        AttentionCall(dtype=FP32, width=128, value_width=128, grouped=True),
    ],
    ids=str,
)
def test_up_to_torch_2_13_grouped_keys_without_flash_make_all_scores(call, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.13.0+cu126")
    assert kernel_of(call, T4) == MATH
    monkeypatch.setattr(torch, "__version__", "2.14.1")
    assert kernel_of(call, T4) == EFFICIENT


WITHOUT_FLASH = [(T4, FP16), (A100, FP32), (HOPPER, FP32)]


def recorded(attend, capability, dtype, autocast=None):
    """What `attend` makes on a GPU of `capability`, by operation: its bytes as often as it does."""
    inputs = tensors(dtype)
    tracker = MemoryTracker("meta", stand_ins=kernels.stand_ins())
    with kernels.CudaChoices(capability), tracker:
        if autocast is None:
            out, _ = attend(Grouped(), *inputs, None, scaling=0.1)
        else:
            with MetaAutocast(dtype=autocast):
                out, _ = attend(Grouped(), *inputs, None, scaling=0.1)
        out.sum().backward()
    return sorted((e.storage.operation, e.storage.n_bytes) for e in tracker.events if e.change_bytes > 0)


def scores_bytes(dtype):
    return ROWS * HEADS * TOKENS**2 * dtype.itemsize


@pytest.mark.parametrize(("capability", "dtype"), WITHOUT_FLASH, ids=str)
def test_without_flash_the_keys_are_repeated_and_there_are_no_scores(capability, dtype, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.13.0")
    ours, theirs = recorded(sdpa.attend, capability, dtype), recorded(stock, capability, dtype)
    assert max(n_bytes for _, n_bytes in theirs) >= scores_bytes(dtype), "what torch would do"
    assert max(n_bytes for _, n_bytes in ours) < scores_bytes(dtype) / 2
    repeated = ROWS * HEADS * TOKENS * WIDTH * dtype.itemsize
    assert ours.count(("aten.clone.default", repeated)) >= 2
    assert any("efficient_attention" in operation for operation, _ in ours)


@pytest.mark.parametrize("capability", [A100, RTX4090, HOPPER], ids=str)
def test_with_flash_attention_nothing_changes(capability):
    assert recorded(sdpa.attend, capability, BF16) == recorded(stock, capability, BF16)
    assert any("flash" in operation for operation, _ in recorded(sdpa.attend, capability, BF16))


def test_the_kernel_follows_the_dtype_of_autocast():
    assert any("flash" in operation for operation, _ in recorded(sdpa.attend, A100, FP32, autocast=BF16))
    half = recorded(sdpa.attend, T4, FP32, autocast=FP16)
    assert any("efficient" in operation for operation, _ in half)
    assert ("aten.clone.default", ROWS * HEADS * TOKENS * WIDTH * 2) in half, "repeated in fp16"


def llama3_shape():
    """Heads and groups of Llama 3, narrow."""
    config = small_config("llama")
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = HEADS, HEADS // GROUPS, WIDTH
    config.max_position_embeddings = 1024
    return config


@pytest.mark.parametrize("pack", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("lean", ["on", "off"])
@pytest.mark.parametrize(("capability", "bits"), [(T4, 4), (A100, 32), (HOPPER, 32)], ids=str)
def test_a_plan_without_flash_has_what_the_runs_attention_makes_and_no_scores(capability, bits, lean, pack):
    """A packed row without `varlen` has a mask, with which transformers repeats the keys itself."""
    config = settings(bits=bits, batch_size=ROWS, seq_len=TOKENS, pack=pack, lean=lean)
    simulation = Simulation(seq_len=TOKENS, optim="adamw", capability=capability)
    with planned_for(has_bf16=capability != T4):
        record = simulate(config, simulation, llama3_shape())
    dtype = FP16 if capability == T4 else FP32
    made = [(e.storage.operation, e.storage.n_bytes) for e in record.events if e.change_bytes > 0]
    activations = [n for operation, n in made if "mm" in operation or "softmax" in operation]
    assert scores_bytes(dtype) not in activations
    assert not any("softmax" in operation and "log" not in operation for operation, _ in made)
    of_attention = [entry for entry in recorded(sdpa.attend, capability, dtype) if "efficient" in entry[0]]
    assert of_attention
    if not pack:
        assert set(of_attention) <= set(made)


def test_every_grouped_model_for_a_gpu_attends_so_and_the_others_as_before():
    for family in FAMILIES:
        model = load.load_base(settings(bits=16).base, META, architecture=FAMILIES[family]())
        grouped = any(getattr(module, "num_key_value_groups", 1) > 1 for module in model.modules())
        assert (model.config._attn_implementation == sdpa.NAME) == (grouped and family != "gemma2")
    on_cpu = load.load_base(settings(bits=16, model="gpt2").base, torch.device("cpu"), architecture=FAMILIES["llama"]())
    assert on_cpu.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("masked", [False, True])
def test_repeated_keys_give_what_grouped_ones_give(masked):
    """On a CPU, as if it were a GPU without flash attention: outputs and gradients."""
    mask = torch.ones(1, 1, 24, 24, dtype=torch.bool).tril() if masked else None
    found = []
    for capability in (None, T4):
        inputs = tensors(torch.float64, "cpu", tokens=24)
        out, _ = sdpa.attend_on(capability, Grouped(), *inputs, mask, scaling=0.2)
        found.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_a_whole_model_computes_what_it_did():
    model, ids = tiny_model("llama"), torch.arange(24).view(2, 12)
    before = model(ids).logits
    sdpa.put_on(model)
    assert model.config._attn_implementation == sdpa.NAME
    torch.testing.assert_close(model(ids).logits, before, rtol=0, atol=0)


def test_packed_rows_of_such_a_model_attend_example_by_example():
    model = build.build_model(settings(bits=32, pack=True, lean="on"), META, llama3_shape()).model
    assert model.config._attn_implementation == varlen.NAMES[sdpa.NAME]


# ------------------------------------------------------------------------------------------------------- on a GPU
# Which kernel torch takes it only says where there is a GPU.


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [FP16, BF16, FP32], ids=str)
@pytest.mark.parametrize("width", [32, 128, 208, 256, 320])
@pytest.mark.parametrize("grouped", [False, True])
def test_torch_takes_the_kernel_that_is_planned(dtype, width, grouped):
    capability = torch.cuda.get_device_capability()
    heads = 2 if grouped else HEADS
    query, key, value = (
        torch.randn(2, n, 64, width, device="cuda", dtype=dtype, requires_grad=True) for n in (HEADS, heads, heads)
    )
    for mask in (None, torch.ones(64, 64, dtype=torch.bool, device="cuda").tril()):
        chosen = torch._fused_sdp_choice(query, key, value, mask, 0.0, mask is None, enable_gqa=grouped)
        call = sdpa.call_of(query, key, value, masked=mask is not None, causal=mask is None, dropout=0.0)
        names = {torch.nn.attention.SDPBackend.CUDNN_ATTENTION.value: None, 0: MATH, 1: FLASH, 2: EFFICIENT}
        assert names[chosen] in (None, kernel_of(call, capability))


@pytest.mark.gpu
def test_fp32_attention_with_grouped_keys_keeps_no_scores():
    inputs = tensors(FP32, "cuda", tokens=1024)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before_bytes = torch.cuda.memory_allocated()
    sdpa.attend(Grouped(), *inputs, None, scaling=0.1)[0].sum().backward()
    assert torch.cuda.max_memory_allocated() - before_bytes < ROWS * HEADS * 1024**2 * 4
