"""bitsandbytes' paged states, which are paged again after a resumption and go when their optimizer goes.

States of many elements lie in managed memory, which the driver moves between the GPU and the host. bitsandbytes loads
saved ones as ordinary tensors of the GPU, still marked as paged, and its prefetch then ends the process; and it never
frees managed memory, so that a search would leak it run by run.
"""

from __future__ import annotations

import ctypes
import weakref
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes import functional
from bitsandbytes.cextension import lib

MIN_ELEMENTS = 100_000
"""Of a parameter whose states page. Source: bitsandbytes 0.50 `optim/optimizer.py`, `get_state_buffer`."""

STATES = ("state1", "state2")

_unused: dict[int, list[int]] = {}
"""Addresses of managed memory that could not be freed, by its bytes: they are used again."""


def take_over(optimizer: Any) -> None:
    """Let `optimizer` keep its states as described above, if it is one of bitsandbytes' that pages; any other stays."""
    if type(optimizer) is bnb.optim.AdamW and optimizer.is_paged:
        optimizer.__class__ = PagedAdamW


class PagedAdamW(bnb.optim.AdamW):  # type: ignore[misc]  # bitsandbytes is untyped
    """bitsandbytes' AdamW with states in managed memory of ours."""

    def get_state_buffer(self, p: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """A state of zeros for the parameter `p`."""
        if pages(p):
            return managed_zeros(p, dtype)
        return super().get_state_buffer(p, dtype)  # type: ignore[no-any-return]

    def load_state_dict(self, state_dict: dict[str, Any], move_to_device: bool = True) -> None:
        """Take over saved states; those that page here do so again. Raises `ValueError` for those of others."""
        super().load_state_dict(state_dict, move_to_device)
        for group in self.param_groups:
            for p in group["params"]:
                states = self.state.get(p, {})
                for name in STATES:
                    if name in states:
                        states[name] = _placed(p, states[name])


def pages(p: torch.Tensor) -> bool:
    """Whether the states of `p` lie in managed memory."""
    return p.device.type == "cuda" and p.numel() >= MIN_ELEMENTS


def paged_bytes(optimizer: Any) -> int:
    """The bytes of the states of `optimizer` that lie in managed memory: the marked ones that are none of the GPU's.

    0 of a run that took no step in this process, and so has none (None).
    """
    states = [] if optimizer is None else optimizer.state.values()
    values = (value for state in states for value in state.values())
    return sum(v.nbytes for v in values if getattr(v, "is_paged", False) and v.device.type == "cpu")


def _placed(p: torch.Tensor, saved: torch.Tensor) -> torch.Tensor:
    """The state `saved` where that of `p` belongs. Raises `ValueError` for one of another shape."""
    plain = saved.detach()  # without the marks that it was saved with, which may not be true here
    if not pages(p):
        return plain
    if plain.shape != p.shape:
        raise ValueError(f"a state of shape {tuple(plain.shape)} for a parameter of shape {tuple(p.shape)}")
    state = managed_zeros(p, plain.dtype)
    return state.copy_(plain)


def managed_zeros(p: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Zeros of the shape of `p` in managed memory, marked as bitsandbytes marks its own, and freed with the tensor.

    It is a CPU tensor to torch, whose address both the host and the GPU can use.
    """
    n_bytes = p.numel() * dtype.itemsize
    addresses = _unused.get(n_bytes)
    address = addresses.pop() if addresses else _allocate(n_bytes)
    memory = (ctypes.c_uint8 * n_bytes).from_address(address)
    weakref.finalize(memory, _release, address, n_bytes).atexit = False  # every tensor over it holds it
    state: Any = torch.frombuffer(memory, dtype=dtype).view(p.shape)
    state.is_paged, state.page_deviceid = True, p.device.index
    _fill_with_zeros(state)
    return state  # type: ignore[no-any-return]


def _allocate(n_bytes: int) -> int:
    address = lib.cget_managed_ptr(ctypes.c_size_t(n_bytes))
    if not address:
        raise torch.OutOfMemoryError(f"the driver gives no {n_bytes} bytes of managed memory")
    return int(address)


def _fill_with_zeros(state: torch.Tensor) -> None:
    functional.fill(state, 0)


def _release(address: int, n_bytes: int) -> None:
    """Free managed memory; where that cannot be done, keep it for another state of the same size."""
    free = getattr(lib._lib, "cudaFree", None)  # of the CUDA runtime that bitsandbytes' library is linked with
    if free is None or free(ctypes.c_void_p(address)) != 0:
        _unused.setdefault(n_bytes, []).append(address)
