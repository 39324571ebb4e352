"""States that page do so again after a resumption, and go with their optimizer."""

from __future__ import annotations

import ctypes
import gc
import io

import bitsandbytes as bnb
import pytest
import torch

from qlora_kit.optim import paged_states

LARGE, SMALL = (300, 400), (90, 100)


def optimizer_of(*shapes, bits=32, device="cpu", **options):
    draw = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(shape, generator=draw).to(device)) for shape in shapes]
    optimizer = bnb.optim.AdamW(parameters, lr=1e-2, optim_bits=bits, is_paged=True, **options)
    paged_states.take_over(optimizer)
    return optimizer, parameters


def bear_states(optimizer):
    """The states of every parameter, with something in them."""
    for index, p in enumerate(optimizer.param_groups[0]["params"]):
        optimizer.init_state(optimizer.param_groups[0], p, 0, index)
        for name in paged_states.STATES:
            state = optimizer.state[p][name]
            state.copy_(torch.arange(state.numel()).view(state.shape) % 251)


def states_of(optimizer):
    return [optimizer.state[p][name] for p in optimizer.param_groups[0]["params"] for name in paged_states.STATES]


def saved_and_loaded(optimizer, into, device="cpu"):
    """As the Trainer saves the states, and loads them onto the device."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    into.load_state_dict(torch.load(file, map_location=device, weights_only=True))


@pytest.fixture
def blocks(monkeypatch):
    """Memory of this process, by address, in the place of managed memory, which only a GPU's driver gives."""
    blocks = {}

    def allocate(n_bytes):
        block = (ctypes.c_uint8 * n_bytes)()
        blocks[ctypes.addressof(block)] = block
        return ctypes.addressof(block)

    monkeypatch.setattr(paged_states, "pages", lambda p: p.numel() >= paged_states.MIN_ELEMENTS)
    monkeypatch.setattr(paged_states, "_allocate", allocate)
    monkeypatch.setattr(paged_states, "_fill_with_zeros", torch.Tensor.zero_)
    monkeypatch.setattr(paged_states, "_unused", {})
    yield blocks
    gc.collect()  # before the blocks go, so that no later test is given one of them


def test_what_pages_is_what_bitsandbytes_pages_on_a_gpu():
    assert not paged_states.pages(torch.empty(LARGE))
    assert not paged_states.pages(torch.empty(LARGE, device="meta"))
    for options, kind in (({"is_paged": True}, paged_states.PagedAdamW), ({}, bnb.optim.AdamW)):
        optimizer = bnb.optim.AdamW([torch.nn.Parameter(torch.empty(3))], **options)
        paged_states.take_over(optimizer)
        assert type(optimizer) is kind


@pytest.mark.parametrize("bits", [8, 32])
def test_loaded_states_page_as_the_saved_ones_did_with_equal_contents(blocks, bits):
    optimizer, _ = optimizer_of(LARGE, SMALL, bits=bits)
    bear_states(optimizer)
    assert [getattr(state, "is_paged", False) for state in states_of(optimizer)] == [True, True, False, False]
    assert paged_states.paged_bytes(optimizer) == sum(state.nbytes for state in states_of(optimizer)[:2])
    assert paged_states.paged_bytes(None) == 0
    assert len(blocks) == 2
    again, _ = optimizer_of(LARGE, SMALL, bits=bits)
    saved_and_loaded(optimizer, again)
    assert len(blocks) == 4
    for state, loaded in zip(states_of(optimizer), states_of(again), strict=True):
        assert torch.equal(state, loaded)
        assert (state.dtype, state.shape) == (loaded.dtype, loaded.shape)
        assert getattr(loaded, "is_paged", False) == (loaded.data_ptr() in blocks)
    assert [state.data_ptr() in blocks for state in states_of(again)] == [True, True, False, False]
    assert all(state.page_deviceid == p.device.index for state in states_of(again)[:2] for p in optimizer.state)


def test_states_that_were_saved_as_paged_are_not_taken_for_paged_elsewhere(blocks, monkeypatch):
    """The mark is saved with the tensor; with it bitsandbytes prefetches what is no managed memory, and ends."""
    optimizer, _ = optimizer_of(LARGE)
    bear_states(optimizer)
    monkeypatch.setattr(paged_states, "pages", lambda p: False)
    stock, ours = bnb.optim.AdamW([torch.nn.Parameter(torch.zeros(LARGE))], is_paged=True), optimizer_of(LARGE)[0]
    for other in (stock, ours):
        saved_and_loaded(optimizer, other)
    assert all(state.is_paged for state in states_of(stock)), "what bitsandbytes does"
    assert not any(hasattr(state, "is_paged") for state in states_of(ours))
    for p in ours.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    ours.step()


def test_the_memory_goes_with_the_optimizer_and_not_before(blocks, monkeypatch):
    monkeypatch.setattr(paged_states, "_release", lambda address, n_bytes: blocks.pop(address))
    for _ in range(3):
        optimizer, parameters = optimizer_of(LARGE)
        bear_states(optimizer)
        kept = states_of(optimizer)[0].view(-1)[7:9]
        assert len(blocks) == 2
        del optimizer, parameters
        gc.collect()
        assert len(blocks) == 1, "one tensor is still looked at"
        assert kept.tolist() == [7, 8]
        del kept
        assert blocks == {}


def test_memory_that_cannot_be_freed_serves_the_next_optimizer(blocks):
    """Here bitsandbytes is linked with no CUDA runtime, so nothing frees it."""
    for _ in range(4):
        for shape in (LARGE, (400, 500)):
            optimizer, parameters = optimizer_of(shape)
            bear_states(optimizer)
            del optimizer, parameters
            gc.collect()
    assert len(blocks) == 4, "two states of either size"


def test_a_function_of_the_libraries_that_bitsandbytes_is_linked_with_is_found_through_it():
    """As the CUDA runtime's `cudaFree` is, on a GPU machine; here it is one of the C library's."""
    assert paged_states.lib._lib.malloc is not None


# ------------------------------------------------------------------------------------------------------- on a GPU
# Managed memory is the driver's.


def step(optimizer):
    for group in optimizer.param_groups:
        for index, p in enumerate(group["params"]):
            p.grad = torch.full_like(p, 0.1 * (index + 1)) * p.detach().sign()
    optimizer.step()


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [8, 32])
def test_on_a_gpu_a_resumed_optimizer_pages_and_goes_on_bit_for_bit(bits):
    optimizer, parameters = optimizer_of(LARGE, SMALL, bits=bits, device="cuda")
    for _ in range(3):
        step(optimizer)
    again, others = optimizer_of(LARGE, SMALL, bits=bits, device="cuda")
    for p, other in zip(parameters, others, strict=True):
        other.data.copy_(p.data)
    allocated_bytes = torch.cuda.memory_allocated()
    saved_and_loaded(optimizer, again, "cuda")
    gc.collect()
    assert torch.cuda.memory_allocated() - allocated_bytes < LARGE[0] * LARGE[1], "the large states are not torch's"
    assert [getattr(state, "is_paged", False) for state in states_of(again)] == [True, True, False, False]
    for _ in range(3):
        step(optimizer)
        step(again)
    torch.cuda.synchronize()
    for p, other in zip(parameters, others, strict=True):
        assert torch.equal(p, other)
    for one, other in zip(states_of(optimizer), states_of(again), strict=True):
        assert torch.equal(one.cpu(), other.cpu())


@pytest.mark.gpu
def test_on_a_gpu_the_memory_of_paged_states_is_free_again():
    n_elements = 64 << 20

    def fold():
        optimizer, _ = optimizer_of((n_elements,), device="cuda")
        step(optimizer)
        torch.cuda.synchronize()
        del optimizer

    free = []
    for _ in range(4):
        fold()
        gc.collect()
        torch.cuda.empty_cache()
        free.append(torch.cuda.mem_get_info()[0])
    assert paged_states._unused == {}, "the runtime frees it"
    assert max(free) - min(free[1:]) < 4 * n_elements, "less than one state"
