"""What checkpoints keep for the recomputation, in the host's memory between the forward and the backward pass.

    forward:   y_i = block_i(x_i),    host_i ← x_i
    backward:  x_i ← host_i, asked for while block i+1 runs;    block_i(x_i) again, and its gradients

x_i, y_i: (B, T, D), for B rows, T positions and D features; a block may be half a block.

Saves B · T · D numbers on the device for each checkpoint but two or three. Exact: a copy there and back changes no bit.

A `Keeper` stands in the place of torch's checkpoint function. On the device there are, beside what runs: in the forward
pass the input kept last, until the next one comes; in the backward pass the input in use and the one that is on its way
for the checkpoint before it. The copies run on a stream of their own. What they read or write is freed only after the
device was told to wait for them, so memory is reused in the order of the device's work, and the host never waits. The
input kept last of all is still there when the backward pass begins, and does not come back.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint as torch_checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from qlora_kit.errors import UserError, named
from qlora_kit.lean.piece import Outcome

CHUNK_BYTES = 1 << 20  # of the host's memory; a checkpoint takes whole ones

Range = tuple[int, int, int]  # which slab, and its chunks from the first to the one before the last


def put_on(model: Any) -> Outcome:
    """Let the checkpoints of `model` keep their inputs on the host. On `meta` only their bytes there are counted."""
    if not any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        return Outcome(left="checkpointing is off")
    device = next(model.parameters()).device
    if device.type == "cpu":
        return Outcome(left="the model is on the host already")
    keeper = Keeper(transport_for(device))
    for module in model.modules():
        if "_gradient_checkpointing_func" in vars(module):
            module._gradient_checkpointing_func = keeper.checkpoint
    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    return Outcome(done=f"what {len(blocks)} blocks keep for the recomputation", made=keeper.transport.pool)


def host_bytes(outcomes: Mapping[str, Outcome]) -> int:
    """What checkpoints have had allotted of the host's memory, by the outcomes of `make_lean`; on `meta` would have."""
    pools = (outcome.made for outcome in outcomes.values() if isinstance(outcome.made, HostPool))
    return sum(pool.allotted_bytes for pool in pools)


class HostPool:
    """The host's memory for checkpoints, used again from step to step, for pinning it is slow.

    It holds as many chunks as were taken at one time, and no more: torch rounds what it pins up to a power of two, so
    every slab is one, of as many chunks as are missing or the next power of two below. A tensor may lie in several.
    """

    def __init__(self, pinned: bool) -> None:
        self.pinned = pinned
        self.allotted_bytes = 0
        self._slabs: list[torch.Tensor] = []
        self._free: list[Range] = []
        self._returned: list[Range] = []

    def take(self, n_bytes: int) -> list[Range]:
        """Room for `n_bytes`. Raises `UserError` where the host has no more; then nothing is taken."""
        self._merge()
        missing = -(-n_bytes // CHUNK_BYTES)
        taken: list[Range] = []
        while missing:
            if not self._free:
                try:
                    self._free.append(self._more(missing))
                except UserError:
                    self.give_back(taken)
                    raise
            slab, first, end = self._free.pop(0)
            middle = min(end, first + missing)
            taken.append((slab, first, middle))
            if middle < end:
                self._free.insert(0, (slab, middle, end))
            missing -= middle - first
        return taken

    def give_back(self, ranges: list[Range]) -> None:
        """Take back what nobody uses any more; a collection of garbage may do so at any time."""
        self._returned.extend(ranges)

    def _merge(self) -> None:
        """Join what was given back to what is free."""
        returned, self._returned = self._returned, []
        merged: list[Range] = []
        for slab, first, end in sorted([*self._free, *returned]):
            if merged and merged[-1][0] == slab and merged[-1][2] == first:
                merged[-1] = (slab, merged[-1][1], end)
            else:
                merged.append((slab, first, end))
        self._free = merged

    def pieces(self, ranges: list[Range], n_bytes: int) -> list[torch.Tensor]:
        """The memory of `ranges`, of dtype uint8, `n_bytes` in all."""
        found = []
        for slab, first, end in ranges:
            piece = self._slabs[slab][first * CHUNK_BYTES : min(end * CHUNK_BYTES, first * CHUNK_BYTES + n_bytes)]
            n_bytes -= piece.nbytes
            found.append(piece)
        return found

    def _more(self, missing: int) -> Range:
        """A slab of at most `missing` chunks."""
        n_chunks = 1 << (missing.bit_length() - 1)
        n_bytes = n_chunks * CHUNK_BYTES
        try:
            self._slabs.append(self._slab(n_bytes))
        except RuntimeError as error:
            rule = f"host memory has no room for another {n_bytes / 2**20:,.0f} MiB of checkpoints"
            remedy = f"Use {named('offload_activations', 'off')}."
            raise UserError.of("offload_activations", "on", rule, remedy) from error
        self.allotted_bytes += n_bytes
        return len(self._slabs) - 1, 0, n_chunks

    def _slab(self, n_bytes: int) -> torch.Tensor:
        return torch.empty(n_bytes, dtype=torch.uint8, pin_memory=self.pinned)


class CountedPool(HostPool):
    """The same without any memory, for plans: `allotted_bytes` is what the run will allot."""

    def _slab(self, n_bytes: int) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8, device="cpu")


@dataclass(eq=False, kw_only=True)
class Ticket:
    """A tensor that was sent to the host: what it was, where it lies, and the end of its last copy."""

    shape: torch.Size
    dtype: torch.dtype
    ranges: list[Range]
    on_host: list[torch.Tensor]  # pieces of its bytes, in their order
    copied: Any = None  # a CUDA event


class Transport:
    """Carries tensors to the host and back; this one at once, for tensors that are there already (for the tests)."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pool = HostPool(pinned=device.type == "cuda")

    def to_host(self, x: torch.Tensor) -> Ticket:
        """Begin to copy `x`, which must stay as it is until `wait`."""
        ticket = self._ticket(x)
        write(ticket, x)
        return ticket

    def to_device(self, ticket: Ticket) -> torch.Tensor:
        """Begin to copy back; the tensor may be used after `wait`."""
        x = torch.empty(ticket.shape, dtype=ticket.dtype, device=self.device)
        read(ticket, x)
        return x

    def wait(self, ticket: Ticket) -> None:
        """Let all further work on the device come after the last copy."""

    def forget(self, ticket: Ticket, arriving: torch.Tensor | None) -> None:
        """Nobody will ask for this tensor again, nor for the copy that may be on its way."""
        self.pool.give_back(ticket.ranges)

    def _ticket(self, x: torch.Tensor) -> Ticket:
        ranges = self.pool.take(x.nbytes)
        return Ticket(shape=x.shape, dtype=x.dtype, ranges=ranges, on_host=self.pool.pieces(ranges, x.nbytes))


def write(ticket: Ticket, x: torch.Tensor) -> None:
    """Copy the contiguous `x` to the host; on CUDA in the order of the current stream."""
    for piece, bytes_N in _pairs(ticket, x):
        piece.copy_(bytes_N, non_blocking=True)


def read(ticket: Ticket, x: torch.Tensor) -> None:
    """Copy from the host into the contiguous `x`; on CUDA in the order of the current stream."""
    for piece, bytes_N in _pairs(ticket, x):
        bytes_N.copy_(piece, non_blocking=True)


def _pairs(ticket: Ticket, x: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Each piece on the host, and the bytes of `x` that belong there."""
    bytes_N, begin = x.detach().view(-1).view(torch.uint8), 0
    for piece in ticket.on_host:
        yield piece, bytes_N[begin : begin + piece.nbytes]
        begin += piece.nbytes


class CudaTransport(Transport):
    """Copies on a stream of its own, so that buffers are read and written in the order in which that was asked for."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def to_host(self, x: torch.Tensor) -> Ticket:
        """Begin to copy `x`, which must stay as it is until `wait`."""
        ticket = self._ticket(x)
        self._copy(write, ticket, x)
        return ticket

    def to_device(self, ticket: Ticket) -> torch.Tensor:
        """Begin to copy back; the tensor may be used after `wait`."""
        # Of the stream that computes, in whose order it will be freed.
        x = torch.empty(ticket.shape, dtype=ticket.dtype, device=self.device)
        self._copy(read, ticket, x)
        return x

    def _copy(self, way: Callable[[Ticket, torch.Tensor], None], ticket: Ticket, x: torch.Tensor) -> None:
        self.stream.wait_stream(torch.cuda.current_stream(self.device))  # it made `x`, or freed what lay there
        with torch.cuda.stream(self.stream):
            way(ticket, x)
        ticket.copied = self.stream.record_event()

    def wait(self, ticket: Ticket) -> None:
        """Let all further work on the device come after the last copy."""
        torch.cuda.current_stream(self.device).wait_event(ticket.copied)

    def forget(self, ticket: Ticket, arriving: torch.Tensor | None) -> None:
        """Nobody will ask for this tensor again, nor for the copy that may be on its way."""
        if arriving is not None:  # a backward pass ended early: nothing waits for this copy but the allocator
            arriving.record_stream(self.stream)
        super().forget(ticket, arriving)


class MetaTransport(Transport):
    """Carries nothing: on `meta` tensors stand for those of a GPU, and of the host's memory the bytes are counted."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.pool = CountedPool(pinned=False)

    def to_host(self, x: torch.Tensor) -> Ticket:
        """Remember what `x` was."""
        return Ticket(shape=x.shape, dtype=x.dtype, ranges=self.pool.take(x.nbytes), on_host=[])

    def to_device(self, ticket: Ticket) -> torch.Tensor:
        """Give a tensor like the one sent."""
        return torch.empty(ticket.shape, dtype=ticket.dtype, device=self.device)


def transport_for(device: torch.device) -> Transport:
    """The transport between the host and `device`: CUDA, `meta` or the CPU itself."""
    return {"cuda": CudaTransport, "meta": MetaTransport}.get(device.type, Transport)(device)


class Kept:
    """The input of a checkpoint, on the host and (first, and when it is needed again) on the device."""

    def __init__(self, x: torch.Tensor, ticket: Ticket, transport: Transport, before: Kept | None) -> None:
        self.transport = transport
        self.ticket = ticket
        self.before = None if before is None else weakref.ref(before)  # it lives as long as its own checkpoint
        self.on_device: torch.Tensor | None = x
        self.version = x._version
        self.users = 1  # checkpoints that will ask for it
        self.asked = 0  # how often they did

    def __del__(self) -> None:
        self.transport.forget(self.ticket, self.on_device)

    def leave_device(self) -> None:
        """Drop the tensor on the device; its memory is used again after the copies of it."""
        if self.on_device is not None:
            self._here()
            self.on_device = None

    def prefetch(self) -> None:
        """Let it come, if it is not there."""
        if self.on_device is None:
            self.on_device = self.transport.to_device(self.ticket)
            self.version = self.on_device._version

    def fetch(self) -> torch.Tensor:
        """The tensor, for one of the users; the last of them takes it along. After that it can be asked for again.

        Raises `RuntimeError` where it was changed in place.
        """
        self.prefetch()
        x = self._here()
        self.asked += 1
        if self.asked % self.users == 0:
            self.on_device = None
        before = self.before() if self.before is not None else None
        if before is not None:
            before.prefetch()
        return x

    def _here(self) -> torch.Tensor:
        assert self.on_device is not None, "it is there, or on its way"
        if self.on_device._version != self.version:
            raise RuntimeError("the input of a checkpoint was changed in place, so it cannot be recomputed from")
        self.transport.wait(self.ticket)
        return self.on_device


class Keeper:
    """A checkpoint function whose inputs wait on the host; one for all checkpoints of a model."""

    def __init__(self, transport: Transport) -> None:
        self.transport = transport
        self._newest: weakref.ref[Kept] | None = None

    def checkpoint(self, function: Callable[..., Any], *args: Any) -> Any:
        """`function(*args)`; without its intermediate results, which the backward pass computes again.

        The first of `args` waits on the host; the others, and what `function` holds, stay where they are.
        """
        if not torch.is_grad_enabled():
            return function(*args)
        if not (args and self._carries(args[0])):
            return torch_checkpoint(function, *args, use_reentrant=False)
        kept, needs_grad, others = self._keep(args[0]), args[0].requires_grad, args[1:]
        given = [args[0]]  # for the forward pass alone: what `run` holds stays on the device until the backward pass

        def run(_: torch.Tensor) -> Any:
            x = given.pop() if given else kept.fetch().detach().requires_grad_(needs_grad)
            return function(x, *others)

        # The empty tensor says to torch on which device the random state is to be kept.
        return torch_checkpoint(run, args[0].new_empty(0), use_reentrant=False)

    def _carries(self, x: Any) -> bool:
        if not isinstance(x, torch.Tensor) or x.device.type != self.transport.device.type:
            return False
        return x.is_contiguous() and x.numel() > 0

    def _keep(self, x: torch.Tensor) -> Kept:
        newest = self._newest() if self._newest is not None else None
        if newest is not None and newest.on_device is x:  # the two halves of a block with a parallel residual
            newest.users += 1
            return newest
        if newest is not None:
            newest.leave_device()
        kept = Kept(x, self.transport.to_host(x), self.transport, newest)
        self._newest = weakref.ref(kept)
        return kept
