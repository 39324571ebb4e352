from __future__ import annotations

import gc
import weakref
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from checkpoint_cases import (
    BATCHES,
    VARIANTS,
    adapted,
    assert_same,
    gradients,
    padded_batch,
    plain_batch,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_cases import cpu_optimizer, real_batch, small_config
from memory_cases import settings as run_settings

from qlora_kit import build
from qlora_kit.build import Built
from qlora_kit.errors import UserError
from qlora_kit.lean import half_blocks, offload
from qlora_kit.memory import kernels
from qlora_kit.memory.shortcut import MetaResults
from qlora_kit.memory.simulate import Simulation, make_batch, run_step, simulate
from qlora_kit.memory.track import MemoryTracker, peaks_by_region
from qlora_kit.memory.watch import watch
from qlora_kit.optim.kind import PlannedDevice

CPU, META = torch.device("cpu"), torch.device("meta")


class LateTransport(offload.Transport):
    """Copies as late as a stream may: in order, and not before somebody waits. What it has not copied is NaN."""

    def __init__(self):
        super().__init__(CPU)
        self.pending = []  # (ticket, the tensor on the device, whether it comes back)
        self.sent, self.brought, self.forgotten = [], [], []

    def to_host(self, x):
        ticket = self._ticket(x)
        offload.write(ticket, torch.full_like(x, float("nan")))
        self.pending.append((ticket, weakref.ref(x), False))
        self.sent.append(ticket)
        return ticket

    def to_device(self, ticket):
        x = torch.full(ticket.shape, float("nan"), dtype=ticket.dtype)
        self.pending.append((ticket, weakref.ref(x), True))
        self.brought.append(ticket)
        return x

    def wait(self, ticket):
        while any(waiting is ticket for waiting, _, _ in self.pending):
            first, reference, back = self.pending.pop(0)
            x = reference()
            if x is None:
                assert first in self.forgotten, "a tensor died before its copy, and somebody may ask for it"
            elif back:
                offload.read(first, x.data)
            else:
                offload.write(first, x)

    def forget(self, ticket, arriving):
        self.forgotten.append(ticket)
        super().forget(ticket, arriving)


def offloaded(model, transport):
    """The model with a keeper, as `put_on` would give it one on a GPU; gives the model."""
    keeper = offload.Keeper(transport)
    for module in model.modules():
        if "_gradient_checkpointing_func" in vars(module):
            module._gradient_checkpointing_func = keeper.checkpoint
    return model


def halved(model):
    half_blocks.put_on(model)
    return model


@contextmanager
def no_collections():
    """What dies here dies because nobody refers to it, as in a training step."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("variant", "halves"), [*((variant, True) for variant in VARIANTS), ("gpt2", False), ("phi", False)]
)
def test_gradients_are_the_same_in_every_bit(variant, halves):
    model, batches = adapted(variant, dropout=0.1), [make() for make in BATCHES]
    model = halved(model) if halves else model
    expected = gradients(model, *batches)
    transport = LateTransport()
    assert_same(gradients(offloaded(model, transport), *batches), expected)
    parallel = variant in ("gpt_neox", "phi")
    n_kept = 2 * (1 if parallel or not halves else 2)  # of two blocks
    assert len(transport.sent) == n_kept * len(batches)
    assert len(transport.brought) == (n_kept - 1) * len(batches)  # the last is still there


@pytest.mark.parametrize("halves", [False, True], ids=["whole", "halves"])
def test_every_buffer_is_free_again_after_a_step_and_serves_the_next(halves):
    model = adapted("llama")
    transport = LateTransport()
    offloaded(halved(model) if halves else model, transport)
    with no_collections():
        seen = set()
        for _ in range(3):
            gradients(model, plain_batch())
            assert set(transport.sent) == set(transport.forgotten)
            seen.add((transport.pool.allotted_bytes, free_bytes(transport.pool)))
        ((allotted_bytes, free),) = seen
        assert allotted_bytes == free


def test_several_forward_passes_before_a_backward_pass():
    batches = [plain_batch(seed=1), padded_batch(), plain_batch(3, 5)]

    def at_once(model, order):
        losses = [model(**batch).loss for batch in batches]
        if order is None:
            sum(losses).backward()
        else:
            for index in order:
                losses[index].backward()
        found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        model.zero_grad(set_to_none=True)
        return [float(loss.detach()) for loss in losses], found

    for order in (None, (0, 1, 2), (2, 1, 0), (1, 2, 0)):
        model = halved(adapted("gpt2"))
        expected = at_once(model, order)
        transport = LateTransport()
        assert_same(at_once(offloaded(model, transport), order), expected)
        assert set(transport.sent) == set(transport.forgotten)


@pytest.mark.parametrize("variant", ["llama", "phi"])
def test_a_second_backward_pass_over_the_same_graph(variant):
    def twice(model):
        loss = model(**plain_batch()).loss
        loss.backward(retain_graph=True)
        loss.backward()
        found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        model.zero_grad(set_to_none=True)
        return [float(loss.detach())], found

    model = halved(adapted(variant))
    expected = twice(model)
    transport = LateTransport()
    assert_same(twice(offloaded(model, transport)), expected)
    assert set(transport.sent) == set(transport.forgotten)


def test_evaluation_keeps_nothing():
    model, transport = halved(adapted("llama")), LateTransport()
    offloaded(model, transport)
    ids = plain_batch()["input_ids"]
    with torch.no_grad():
        model(ids)
    with torch.inference_mode():
        model(ids)
    model.eval()(ids)
    assert transport.sent == []


@pytest.mark.parametrize("fails_in_backward", [False, True], ids=["forward", "backward"])
def test_a_step_after_one_that_failed(fails_in_backward):
    model = halved(adapted("llama"))
    expected = gradients(model, plain_batch())
    transport = LateTransport()
    offloaded(model, transport)

    def fail(*_):
        raise ZeroDivisionError

    loss = model(**plain_batch()).loss if fails_in_backward else None
    hook = model.base_model.model.model.layers[1].mlp.register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError):
        loss.backward() if fails_in_backward else model(**plain_batch())
    hook.remove()
    model.zero_grad(set_to_none=True)
    del loss
    for _ in range(2):
        assert_same(gradients(model, plain_batch()), expected)
    gc.collect()  # the failed graph lives on in its traceback
    assert set(transport.sent) == set(transport.forgotten)


def test_an_input_that_is_changed_in_place_is_an_error_not_a_wrong_gradient():
    keeper = offload.Keeper(LateTransport())
    weight = torch.randn(3, 3, requires_grad=True)

    def step(change_first, change_last):
        first = weight * 1.0
        second = keeper.checkpoint(torch.sin, first).clone()
        if change_first:
            first.add_(1.0)
        third = keeper.checkpoint(torch.sin, second)
        if change_last:
            second.add_(1.0)
        third.sum().backward()

    step(False, False)
    for changes in ((True, False), (False, True)):
        with pytest.raises(RuntimeError, match="changed in place"):
            step(*changes)


def test_what_it_cannot_carry_is_checkpointed_as_ever():
    transport = LateTransport()
    keeper = offload.Keeper(transport)
    x = torch.randn(4, 6, requires_grad=True)
    for given_x in (x.T, torch.empty(0, requires_grad=True)):
        keeper.checkpoint(torch.sin, given_x).sum().backward()
    assert torch.equal(x.grad, x.detach().cos())
    assert keeper.checkpoint(lambda: 3) == 3
    assert transport.sent == []


def test_other_arguments_stay_where_they_are_and_get_their_gradients():
    transport = LateTransport()
    x, y = (torch.randn(3, requires_grad=True) for _ in range(2))
    out = offload.Keeper(transport).checkpoint(lambda x, y, power: x * y**power, x, y, 2)
    out.sum().backward()
    assert torch.equal(x.grad, y.detach() ** 2)
    assert torch.allclose(y.grad, 2 * (x * y).detach())
    assert len(transport.sent) == 1


def free_bytes(pool):
    return sum(end - first for _, first, end in [*pool._free, *pool._returned]) * offload.CHUNK_BYTES


@settings(max_examples=60, deadline=None)
@given(steps=st.lists(st.lists(st.integers(1, 5000), min_size=1, max_size=9), min_size=1, max_size=5))
def test_the_pool_allots_what_was_taken_at_one_time_and_no_more(steps):
    with mock.patch.object(offload, "CHUNK_BYTES", 512):
        pool, counted = offload.HostPool(pinned=False), offload.CountedPool(pinned=False)
        for sizes in steps:
            taken = [pool.take(size) for size in sizes]
            pieces = [pool.pieces(ranges, size) for ranges, size in zip(taken, sizes, strict=True)]
            assert [sum(piece.nbytes for piece in own) for own in pieces] == sizes
            for index, own in enumerate(pieces):
                for piece in own:
                    piece.fill_(index)
            assert all(bool((p == index).all()) for index, own in enumerate(pieces) for p in own)  # none overlaps
            for ranges in [counted.take(size) for size in sizes]:
                counted.give_back(ranges)
            for ranges in taken:
                pool.give_back(ranges)
        needed = [sum(-(-size // 512) * 512 for size in sizes) for sizes in steps]
        assert pool.allotted_bytes == free_bytes(pool) == max(needed)
        slabs = [slab.nbytes for slab in pool._slabs]
    assert sum(slabs) == pool.allotted_bytes
    assert all(n_bytes & (n_bytes - 1) == 0 for n_bytes in slabs), "which torch does not round up"
    assert counted.allotted_bytes <= pool.allotted_bytes


def test_a_long_sequence_takes_what_it_needs():
    """33,280 tokens of an 8B in halves: 16.25 GiB, for which slabs of 2 GiB were 20."""
    pool = offload.CountedPool(pinned=True)
    for _ in range(2 * 32):
        pool.take(33_280 * 4096 * 2)
    assert pool.allotted_bytes == 64 * 260 * 2**20


def test_a_host_without_room_is_a_user_error():
    with pytest.raises(UserError, match=r"offload_activations.*has no room"):
        offload.HostPool(pinned=False).take(1 << 55)
    pool = offload.HostPool(pinned=False)
    pool.give_back(pool.take(1))
    with pytest.raises(UserError):
        pool.take(1 << 55)
    assert free_bytes(pool) == pool.allotted_bytes == offload.CHUNK_BYTES


def on_meta(layers=2, **changes):
    architecture = small_config("llama", layers=layers)
    return build.build_model(
        run_settings(bits=4, lean="off", adapter_dtype="bf16", **changes), META, architecture
    ).model


def test_put_on_says_what_it_did():
    assert offload.put_on(adapted("llama")).left == "the model is on the host already"
    assert offload.put_on(on_meta(gradient_checkpointing=False)).left == "checkpointing is off"
    for first, second in ((offload, half_blocks), (half_blocks, offload)):
        model = on_meta()
        outcomes = {piece: piece.put_on(model) for piece in (first, second)}
        assert outcomes[offload].done == "what 2 blocks keep for the recomputation"
        assert outcomes[half_blocks].done == "2 blocks: attention and MLP apart"


BATCH, TOKENS, LAYERS = 4, 96, 3
KEPT_BYTES = BATCH * TOKENS * 128 * 2  # one input of a block in bf16


@pytest.fixture(scope="module")
def plans():
    """The plan of a step with whole blocks, with whole blocks offloaded, with halves, with halves offloaded."""
    results = MetaResults()
    return [planned(p, results) for p in ((), (offload,), (half_blocks,), (half_blocks, offload))]


def planned(pieces, results):
    """The peak of each region of a step on `meta`: by phase, block, and whether that is recomputed."""
    config = run_settings(bits=4, batch_size=BATCH, seq_len=TOKENS)
    model = on_meta(LAYERS).train()
    model.get_base_model().disable_input_require_grads()  # else autograd keeps the first input as a leaf
    for piece in pieces:
        piece.put_on(model)
    tracker = MemoryTracker("meta", stand_ins=kernels.stand_ins(), run=results.run)
    built = Built(model=model)
    optimizer = built.plan_optimizer(config.optim, "adamw", PlannedDevice(type="cuda"))
    with no_collections(), watch(tracker, model, optimizer), kernels.CudaChoices((8, 0)), tracker:
        tracker.begin_step()
        run_step(tracker, built, optimizer, [make_batch(config, TOKENS, model.config)], 1.0)
    tracker.stop()
    regions = peaks_by_region(tracker.events)
    return {(r.phase, r.block, r.recomputes): p.n_bytes for r, p in regions.items()}


def test_what_is_kept_on_the_device_is_the_newest_and_then_the_one_in_use_and_the_next(plans):
    whole, away, halves, both = plans
    loss, recomputing = ("loss", None, False), ("backward", LAYERS - 1, True)
    assert whole[loss] - away[loss] == (LAYERS - 1) * KEPT_BYTES
    assert halves[loss] - both[loss] == (2 * LAYERS - 1) * KEPT_BYTES
    assert whole[recomputing] - away[recomputing] == (LAYERS - 2) * KEPT_BYTES
    assert halves[recomputing] - both[recomputing] == (2 * LAYERS - 2) * KEPT_BYTES
    # Forward, too, the inputs of earlier blocks are gone.
    forward = ("forward", LAYERS - 1, False)
    assert away[forward] == away["forward", 1, False] == both[forward]


def test_halves_and_offload_each_lower_the_peak_of_the_backward_pass(plans):
    whole, away, halves, both = (max(n for (phase, *_), n in p.items() if phase == "backward") for p in plans)
    assert both < away < whole
    assert both < halves


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gpt2"])
@pytest.mark.parametrize("changes", [{}, {"half_blocks": "off"}, {"grad_accum": 2}], ids=str)
def test_the_plan_says_the_hosts_bytes_that_a_step_takes(family, changes, monkeypatch):
    """The step is real, on the CPU; the plan is that of a GPU."""
    monkeypatch.setattr(offload, "CHUNK_BYTES", 512)
    pieces = {"offload_activations": "on", "half_blocks": "on", **changes}
    config = run_settings(bits=16, batch_size=BATCH, seq_len=TOKENS, **pieces)
    architecture = small_config(family, layers=7)
    planned = simulate(config, Simulation(seq_len=TOKENS, optim="adamw"), small_config(family, layers=7))

    built, transport = build.build_model(config, CPU, architecture), offload.Transport(CPU)
    offloaded(built.model.train(), transport)
    for _ in range(2):
        batches = [real_batch(config, architecture.vocab_size) for _ in range(config.optim.grad_accum)]
        run_step(MemoryTracker("cpu"), built, cpu_optimizer(built, config), batches, 1.0)
    assert planned.host_bytes == transport.pool.allotted_bytes >= 7 * KEPT_BYTES


@pytest.mark.gpu
@pytest.mark.parametrize("halves", [False, True], ids=["whole", "halves"])
def test_on_a_gpu_gradients_are_the_same_and_memory_is_less(halves):
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 8, "max_position_embeddings": 1024}
    model = adapted("llama", dropout=0.1, **sizes)
    model.set_attn_implementation("eager")  # torch's fused ones may sum in another order each time
    model = (halved(model) if halves else model).to("cuda")
    batch = {name: tensor.to("cuda") for name, tensor in plain_batch(4, 512).items()}

    def step():
        torch.cuda.reset_peak_memory_stats()
        found = gradients(model, batch)
        return found, torch.cuda.max_memory_allocated()

    step()
    expected, without_bytes = step()
    assert offload.put_on(model).done
    for _ in range(4):  # later steps use the buffers of earlier ones
        found, with_bytes = step()
        assert_same(found, expected)
    assert with_bytes < without_bytes


@pytest.mark.gpu
def test_on_a_gpu_torch_pins_what_the_pool_allots_and_no_more():
    pool = offload.HostPool(pinned=True)

    def pinned_bytes():
        return torch.cuda.host_memory_stats()["active_bytes.current"]

    before_bytes = pinned_bytes()
    pieces = pool.pieces(pool.take(37 << 20), 37 << 20)
    assert all(piece.is_pinned() for piece in pieces)
    assert pinned_bytes() - before_bytes == pool.allotted_bytes == 37 << 20
