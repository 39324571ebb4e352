"""The MLP of each block on one tile of tokens at a time, so that its wide activations exist for a tile only.

    y[i:i+n] = mlp(x[i:i+n])                             for i = 0, n, 2n, …
    ∂x[i:i+n], ∂θ_i = the gradients of that tile,    ∂θ = Σ_i ∂θ_i in fp32

x, y: (N, D), for N tokens (rows × positions) and D features of the model; θ are the factors in the MLP.

Saves the wide activations, (N, I) each for I intermediate features: for the backward pass only x is kept, and each tile
is computed again and differentiated.
Exact: an MLP works on each token by itself; the sum over tiles rounds no more than one product over all tokens.

It is done in two autograd functions, because a checkpoint around the block stops its recomputation as soon as it
has the last tensor that was kept: the first one keeps the input before anything of the MLP runs, so the checkpoint
stops there and does not run the MLP a second time only to have it run a third time, tile by tile. A dropout at the
end of the MLP is drawn for all tokens, before either, for the same reason; the draw is the one of the stock step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import bitsandbytes as bnb
import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from qlora_kit.lean.gated import Gated, known_activation
from qlora_kit.lean.piece import Outcome, output_unread

WIDEST_BYTES = 64 << 20
"""The widest activation of a tile takes at most so many bytes (but for the next)."""

MIN_TILE_TOKENS = 1024
"""A tile has at least so many tokens: below, dequantizing the weights for each tile takes a part of its time."""

GATED = (
    "LlamaMLP",
    "MistralMLP",
    "Qwen2MLP",
    "Qwen3MLP",
    "GemmaMLP",
    "Gemma2MLP",
    "Gemma3MLP",
    "GraniteMLP",
    "CohereMLP",
    "Cohere2MLP",
    "OlmoMLP",
    "Olmo2MLP",
    "SmolLM3MLP",
    "HeliumMLP",
)
"""Classes of transformers that compute down(act(gate(x)) · up(x)) and nothing else."""

LAST = {
    **dict.fromkeys((*GATED, "Phi3MLP", "GlmMLP", "Glm4MLP"), "down_proj"),
    "GPT2MLP": "c_proj",
    "GPTNeoXMLP": "dense_4h_to_h",
    "PhiMLP": "fc2",
}
"""The classes of transformers that work on each token by itself, and which layer gives the output (but for GPT-2's
dropout). Others of the same layers clamp, scale or drop in between, so a class is known by its name alone."""


def put_on(model: Any) -> Outcome:
    """Let each MLP of `model` run on tiles of tokens; those that a tile would change are left."""
    blocks = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    mlps = [m for block in blocks for m in block.modules() if type(m).__name__.lower().endswith("mlp")]
    if not mlps:
        return Outcome(left="no MLP as a module of its own in this model")
    reasons = [_reason_to_leave(mlp) for mlp in mlps]
    tiled = [mlp for mlp, reason in zip(mlps, reasons, strict=True) if not reason]
    classes = {type(mlp): _tiled_class(mlp) for mlp in tiled}
    for mlp in tiled:
        mlp.__class__ = classes[type(mlp)]  # not `mlp.forward = …`: a cycle, whose memory would come back late
    left = "; ".join(f"{reasons.count(reason)} MLPs: {reason}" for reason in dict.fromkeys(filter(None, reasons)))
    done = f"{len(tiled)} MLPs, activations of at most {WIDEST_BYTES >> 20} MiB" if tiled else ""
    return Outcome(done=done, left=left)


def _reason_to_leave(mlp: nn.Module) -> str:
    kind = type(mlp)
    if kind.__name__ not in LAST or not kind.__module__.startswith("transformers.models."):
        return f"{kind.__name__} is not known"
    last = getattr(mlp, "dropout", None)
    for module in mlp.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0 and module is not last:
            return "a dropout inside draws for all tokens at once"
        if isinstance(module, bnb.nn.Linear8bitLt) and module.state.threshold > 0:
            return "8 bits look for outliers among all tokens at once"
    return ""


def tile_tokens(n_tokens: int, bytes_per_token: int) -> int:
    """The tokens of a tile, where a token's widest activation has so many bytes; `n_tokens` where one tile is enough.

    It is a power of two, so that usual batches fall into even tiles. More tokens never have smaller tiles: cut into
    even ones, a few more of them would need less memory, and a shorter batch more than the plan of the longest one.
    """
    fitting = max(MIN_TILE_TOKENS, WIDEST_BYTES // bytes_per_token)
    return min(n_tokens, 1 << (fitting.bit_length() - 1))


def _tiled_class(mlp: nn.Module) -> type[nn.Module]:
    kind = type(mlp)
    bases = (_Tiled, _Gated, kind) if kind.__name__ in GATED else (_Tiled, kind)
    return type(f"Tiled{kind.__name__}", bases, {"last_layer": LAST[kind.__name__]})


class _Tiled(nn.Module):
    """Before the class of an MLP: runs it as that class does, from (…, D) to (…, D), tile by tile for many tokens."""

    last_layer: str

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The MLP of `x`, (…, D)."""
        whole: Callable[[torch.Tensor], torch.Tensor] = super().forward
        n_tokens = x.numel() // x.shape[-1]
        tile = tile_tokens(n_tokens, max(_width(module) for module in self.modules()) * x.element_size())
        if tile >= n_tokens:
            return whole(x)
        dropout = getattr(self, "dropout", None)
        share = dropout.p if dropout is not None and dropout.training else 0.0
        inside = whole if dropout is None else functools.partial(_before_dropout, self)
        call = _MlpRun(
            inside=inside,
            last=self.get_submodule(self.last_layer),
            tile=tile,
            dropout_share=share,
            context=_like_now(x.device.type),
        )
        mask = _draw(x, share) if share else None
        parameters = [p for p in self.parameters() if p.requires_grad]
        kept = _KeepInput.apply(call, x, mask, *parameters)  # type: ignore[no-untyped-call]
        return _Compute.apply(call, x.detach(), mask, kept)  # type: ignore[no-any-return, no-untyped-call]


class _Gated(nn.Module):
    """Before the class of a gated MLP: keeps one wide activation less."""

    act_fn: nn.Module
    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The MLP of `x`, (…, D)."""
        activation = known_activation(self.act_fn)
        if activation is None:
            return super().forward(x)  # type: ignore[no-any-return]
        product = Gated.apply(self.gate_proj(x), self.up_proj(x), activation)  # type: ignore[no-untyped-call]
        return self.down_proj(product)  # type: ignore[no-any-return]


@dataclass(frozen=True, kw_only=True)
class _MlpRun:
    """One run of an MLP over a batch: what a tile goes through, in which context, and the dropout after it."""

    inside: Callable[[torch.Tensor], torch.Tensor]
    last: nn.Module  # whose output is that of `inside`
    tile: int
    dropout_share: float
    context: AbstractContextManager[Any]

    def tiles(self, *tensors: torch.Tensor | None) -> Iterator[tuple[Any, ...]]:
        """Each tile of the tensors, (n, D); None for a tensor that is None."""
        flat = [None if tensor is None else _flat(tensor) for tensor in tensors]
        n_tokens = next(tensor.shape[0] for tensor in flat if tensor is not None)
        for start in range(0, n_tokens, self.tile):
            rows = slice(start, start + self.tile)
            yield tuple(None if tensor is None else tensor[rows] for tensor in flat)

    def dropped(self, tile: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """`tile` after dropout, or a gradient of it before: zero where `mask` is, the rest scaled up."""
        if mask is None:
            return tile
        return torch.ops.aten.native_dropout_backward(tile, mask, 1 / (1 - self.dropout_share))  # type: ignore[no-any-return]


class _KeepInput(torch.autograd.Function):
    """Keeps the input of an MLP; its backward pass is that of the whole MLP.

    Gives a tensor of the input's shape without contents, for `_Compute` to hang the output on.
    """

    @staticmethod
    def forward(
        ctx: Any, call: _MlpRun, x: torch.Tensor, mask: torch.Tensor | None, *parameters: torch.Tensor
    ) -> torch.Tensor:
        """Keep `x`, (…, D), and the `mask` of the dropout; `parameters` are those of the MLP that train."""
        ctx.call, ctx.parameters = call, parameters
        ctx.save_for_backward(x, mask)
        return x.new_empty(()).expand(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: torch.Tensor) -> tuple[Any, ...]:
        """The gradients of the input and of each parameter."""
        x, mask = ctx.saved_tensors
        _, wants_x, _, *wants_parameters = ctx.needs_input_grad
        parameters = [p for p, wants in zip(ctx.parameters, wants_parameters, strict=True) if wants]
        sums = _GradientSums(parameters)
        grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device) if wants_x else None
        for x_tile, mask_tile, grad_y_tile, grad_x_tile in ctx.call.tiles(x, mask, grad_y, grad_x):
            with torch.enable_grad(), ctx.call.context, output_unread(ctx.call.last):
                x_tile = x_tile.detach().requires_grad_(wants_x)
                y_tile = ctx.call.inside(x_tile)
            grad_y_tile = ctx.call.dropped(grad_y_tile.to(y_tile.dtype), mask_tile)
            y_edge = get_gradient_edge(y_tile)
            del y_tile  # its graph is needed, its values are not
            inputs = [x_tile, *parameters] if wants_x else parameters
            grads = list(torch.autograd.grad(y_edge, inputs, grad_y_tile, allow_unused=True))
            if wants_x:
                grad_x_tile.copy_(grads.pop(0))
            sums.add(grads)
        of_parameters = iter(sums.rounded())
        return None, grad_x, None, *(next(of_parameters) if wants else None for wants in wants_parameters)


class _Compute(torch.autograd.Function):
    """The output of an MLP, tile by tile; its gradient goes to `_KeepInput`."""

    @staticmethod
    def forward(
        ctx: Any, call: _MlpRun, x: torch.Tensor, mask: torch.Tensor | None, kept: torch.Tensor
    ) -> torch.Tensor:
        """The MLP of `x`, (…, D); `kept` is what `_KeepInput` gave."""
        y: torch.Tensor | None = None
        done = 0
        with call.context:
            for x_tile, mask_tile in call.tiles(x, mask):
                y_tile = call.dropped(call.inside(x_tile), mask_tile)
                if y is None:
                    y = torch.empty(x.shape, dtype=y_tile.dtype, device=x.device)
                _flat(y)[done : done + call.tile] = y_tile
                done += call.tile
        assert y is not None, "there is a tile"
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: torch.Tensor) -> tuple[None, None, None, torch.Tensor]:
        """The gradient of the output, as it is."""
        return None, None, None, grad_y


def _before_dropout(mlp: Any, x: torch.Tensor) -> torch.Tensor:
    """The MLP of GPT-2 without the dropout at its end."""
    return mlp.c_proj(mlp.act(mlp.c_fc(x)))  # type: ignore[no-any-return]


def _draw(x: torch.Tensor, share: float) -> torch.Tensor:
    """What a dropout of `share` keeps, by the random numbers that it would take for the output of the MLP of `x`."""
    dtype = _autocast_dtype(x.device.type) or x.dtype
    with torch.no_grad():
        return nn.functional.dropout(torch.ones_like(x, dtype=dtype), share) != 0


class _GradientSums:
    """Sums of the parameters' gradients over tiles, in fp32 so that many tiles round no more than one."""

    def __init__(self, parameters: Sequence[torch.Tensor]) -> None:
        self._dtypes = [p.dtype for p in parameters]
        self._sums: list[torch.Tensor | None] = [None for _ in parameters]

    def add(self, gradients: Sequence[torch.Tensor | None]) -> None:
        """Add a tile's; None for a parameter that the MLP does not use."""
        for i, gradient in enumerate(gradients):
            if gradient is None:
                continue
            before = self._sums[i]
            wide = gradient.float() if gradient.element_size() < 4 else gradient
            self._sums[i] = wide if before is None else before + wide

    def rounded(self) -> list[torch.Tensor | None]:
        """The sums, each in the dtype of its parameter."""
        return [None if total is None else total.to(d) for total, d in zip(self._sums, self._dtypes, strict=True)]


def _flat(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, x.shape[-1])


def _width(module: nn.Module) -> int:
    """The features of a linear layer, in or out, whichever are more; 0 for any other module."""
    if isinstance(module, nn.Linear):
        return max(module.in_features, module.out_features)
    return max(module.nx, module.nf) if isinstance(module, Conv1D) else 0


def _autocast_dtype(device_type: str) -> torch.dtype | None:
    if not torch.amp.is_autocast_available(device_type) or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def _like_now(device_type: str) -> AbstractContextManager[Any]:
    """Autocast as it is at this moment, to be entered again in the backward pass.

    Without its cache: a cast made where gradients are off would be taken where they are on.
    """
    if not torch.amp.is_autocast_available(device_type):
        return nullcontext()
    dtype = _autocast_dtype(device_type)
    return torch.autocast(device_type, dtype=dtype, enabled=dtype is not None, cache_enabled=False)
