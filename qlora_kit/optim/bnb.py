"""bitsandbytes' optimizers, with states of 8 or 32 bits, which may page."""

from __future__ import annotations

from dataclasses import dataclass
from types import MethodType
from typing import Any

import bitsandbytes
import torch

from qlora_kit.optim import paged_states
from qlora_kit.optim.kind import BETAS, EPS, Groups, OptimizerKind, PlannedDevice


@dataclass(frozen=True, kw_only=True)
class _Bitsandbytes(OptimizerKind):
    """`kind` with states of so many `bits`, in managed memory where `pages`."""

    kind: type
    bits: int
    pages: bool = False

    def make(self, model: Any, groups: Groups, lr: float) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = self._made(model, groups, lr)
        paged_states.take_over(optimizer)
        return optimizer

    def on_meta(self, model: Any, groups: Groups, lr: float, device: PlannedDevice) -> torch.optim.Optimizer:
        """Its states are made, and its kernels, which allocate nothing, are left out."""
        optimizer: torch.optim.Optimizer = self._made(model, groups, lr)
        page_from = round(paged_states.MIN_ELEMENTS / device.growth)
        _without_kernels(optimizer, device.paged, page_from if self.pages and device.type == "cuda" else None)
        return optimizer

    def _made(self, model: Any, groups: Groups, lr: float) -> Any:
        options = {"betas": BETAS} if self.kind is bitsandbytes.optim.Lion else {"betas": BETAS, "eps": EPS}
        optimizer = self.kind(groups, lr=lr, optim_bits=self.bits, is_paged=self.pages, **options)
        embeddings = [m.weight for m in model.modules() if isinstance(m, torch.nn.Embedding)]
        trained = {id(weight) for weight in embeddings if weight.requires_grad}
        if self.bits == 8 and trained:
            _keep_fp32_states(optimizer, trained)
        return optimizer


PAGED_ADAMW_8BIT = _Bitsandbytes(kind=bitsandbytes.optim.AdamW, bits=8, pages=True)
PAGED_ADAMW_32BIT = _Bitsandbytes(kind=bitsandbytes.optim.AdamW, bits=32, pages=True)
ADAMW_8BIT = _Bitsandbytes(kind=bitsandbytes.optim.AdamW, bits=8)
LION_8BIT = _Bitsandbytes(kind=bitsandbytes.optim.Lion, bits=8)


def _keep_fp32_states(optimizer: Any, ids: set[int]) -> None:
    """Keep the states of the parameters with these ids in fp32, as transformers' Trainer does those of embeddings.

    bitsandbytes' own register for this belongs to the process: it would outlive the optimizer and its model.
    """
    get_config = optimizer.get_config

    def config_of(self: Any, gindex: int, pindex: int, group: Any) -> Any:
        parameter = self.param_groups[gindex]["params"][pindex]
        return {**get_config(gindex, pindex, group), **({"optim_bits": 32} if id(parameter) in ids else {})}

    optimizer.get_config = MethodType(config_of, optimizer)


def _without_kernels(optimizer: Any, paged: list[torch.Tensor], page_from: int | None) -> None:
    """Let `optimizer` make its states on `meta` and skip its kernels.

    Those of parameters of at least `page_from` elements go to `paged`; None: of no parameter.
    """

    def state_buffer(self: Any, p: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        if page_from is None or p.numel() < page_from:
            return torch.zeros_like(p, dtype=dtype)
        with torch.utils._python_dispatch._disable_current_modes():
            buffer: Any = torch.empty(p.shape, dtype=dtype, device=p.device)
        buffer.is_paged = True  # as bitsandbytes marks its own
        paged.append(buffer)
        return buffer  # type: ignore[no-any-return]

    def update_step(self: Any, group: Any, p: torch.Tensor, gindex: int, pindex: int) -> None:
        p.data, p.grad = p.data.contiguous(), p.grad.contiguous()  # type: ignore[union-attr]

    optimizer.get_state_buffer = MethodType(state_buffer, optimizer)
    optimizer.update_step = MethodType(update_step, optimizer)
    optimizer.prefetch_state = MethodType(lambda self, p: None, optimizer)
