"""Linear layers with factors that run the factors first, compute in one dtype, and keep nothing dequantized.

    h  = s · dropout(x) Aᵀ                              kept, with x
    y  = h Bᵀ + bias,    then y += x Wᵀ in place
    ∂x = ∂y W + s · (∂y B) A,    ∂A = s · (∂y B)ᵀ x,    ∂B = ∂yᵀ h        (x as the dropout left it)

x: (M, K), y: (M, N), W: (N, K) frozen, in 4, 8, 16 or 32 bits; A: (r, K), B: (N, r), h: (M, r); for M tokens (all
leading dimensions), K inputs, N outputs, rank r, scaling s.

Saves what PEFT's layer keeps beside x (x after the dropout, and in the factors' dtype), the sum of the two branches as
a tensor of its own, and the last product of each block when a checkpoint recomputes it. W is dequantized for each
product and let go.
Exact: the sum of the same terms, with the same gradients; only the rounding differs, where terms are added in another
order.

PEFT injects, saves and loads the factors; only the forward pass of its layers changes. The order matters: a
non-reentrant checkpoint ends the recomputation of a block when the last saved tensor is back, and what an autograd
function saves is back only after its own forward pass. So `LoraBranch` saves the input, and the base product, which
needs nothing saved, is added to its result afterwards: that of a block's last layer is never recomputed.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft.tuners import lora
from peft.tuners.lora import bnb as lora_bnb
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from qlora_kit.lean.piece import Outcome, is_output_unread
from qlora_kit.model.quantize import dense_weight


class LoraBranch(torch.autograd.Function):
    """`scale · dropout(x) Aᵀ Bᵀ + bias`, to which the caller adds `x Wᵀ`; its gradients are those of the sum.

    Saves x, h = `scale · dropout(x) Aᵀ`, the factors, and under dropout the mask. The frozen layer is kept by
    reference: as a saved tensor, a checkpoint would run everything before it again to get it back. Factors of
    another dtype are cast to that of x, as autocast does, and get their gradients in their own.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        a_rK: torch.Tensor,
        b_Nr: torch.Tensor,
        base: nn.Module,
        scale: float,
        dropout: float,
    ) -> torch.Tensor:
        """The branch (..., N) of x (..., K), in the dtype of x."""
        # the kernel that dropout runs on CUDA too: PEFT's mask from the same random state
        seen, kept = torch.native_dropout(x, dropout, True) if dropout else (x, None)
        h_Mr = _scaled_product(_rows(seen), a_rK.to(x.dtype).T, scale)
        branch = x.new_empty((*x.shape[:-1], b_Nr.shape[0]))
        # the int8 product brings its own bias
        bias_N: Any = None if isinstance(base, Linear8bitLt) else base.bias
        if bias_N is None:
            torch.mm(h_Mr, b_Nr.to(x.dtype).T, out=_rows(branch))
        else:
            torch.addmm(bias_N.to(x.dtype), h_Mr, b_Nr.to(x.dtype).T, out=_rows(branch))
        # the mask turned round, to fill with: on a CPU a product with it would make a copy in the dtype of x
        ctx.save_for_backward(x, h_Mr, a_rK, b_Nr, None if kept is None else kept.logical_not_())
        ctx.base, ctx.scale = base, scale / (1 - dropout)
        return branch

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: torch.Tensor) -> tuple[Any, ...]:
        """The gradients of x, A and B, each where it is needed."""
        x, h_Mr, a_rK, b_Nr, dropped = ctx.saved_tensors
        grad_MN = _rows(grad_y)
        grad_h_Mr = _scaled_product(grad_MN, b_Nr.to(x.dtype), ctx.scale)
        grad_a = grad_b = grad_x = None
        if ctx.needs_input_grad[1]:
            seen = x if dropped is None else x.masked_fill(dropped, 0)  # the rest of the dropout is in the scale
            grad_a = (grad_h_Mr.T @ _rows(seen)).to(a_rK.dtype)
            del seen
        if ctx.needs_input_grad[2]:
            grad_b = (h_Mr.T @ grad_MN).T.to(b_Nr.dtype)  # on a CPU faster than the transposed product
        shape = x.shape
        del x  # a checkpoint's last reference: its memory is free for the gradient
        if ctx.needs_input_grad[0]:
            grad_MK = grad_MN @ frozen_weight(ctx.base, grad_MN.dtype)
            if dropped is None:
                grad_MK.addmm_(grad_h_Mr, a_rK.to(grad_MK.dtype))
            else:
                grad_MK.add_((grad_h_Mr @ a_rK.to(grad_MK.dtype)).masked_fill_(_rows(dropped), 0))
            grad_x = grad_MK.view(shape)
        return grad_x, grad_a, grad_b, None, None, None


@torch.no_grad()
def add_frozen_product(branch: torch.Tensor, x: torch.Tensor, base: nn.Module) -> None:
    """Add the product of a frozen layer with x (..., K) to `branch` (..., N) in place; autograd does not see it.

    The dequantized weight is gone when this returns; `LoraBranch` makes it anew for the gradient of x.
    """
    if isinstance(base, Linear8bitLt):
        branch.add_(base(x))  # without gradients bitsandbytes' product keeps nothing of x
    else:
        _rows(branch).addmm_(_rows(x), frozen_weight(base, x.dtype).T)


def frozen_weight(base: nn.Module, dtype: torch.dtype) -> torch.Tensor:
    """The weight (N, K) of a frozen layer in `dtype`, dequantized where it is quantized.

    That of an 8-bit layer is there once it has run; it is made in `dtype`, as bitsandbytes' own backward pass makes it.
    """
    if isinstance(base, Linear8bitLt):
        scales_N1 = base.state.SCB.unsqueeze(1).mul(1.0 / 127.0)
        return base.state.CB.to(dtype).mul_(scales_N1)  # type: ignore[no-any-return]
    return dense_weight(base).to(dtype)


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def _scaled_product(left: torch.Tensor, right: torch.Tensor, scale: float) -> torch.Tensor:
    """`scale · left @ right`, rounded once."""
    result = left.new_empty((left.shape[0], right.shape[1]))
    return result.addmm_(left, right, beta=0, alpha=scale)


class _LoraFirst:
    """Runs the factors first where it can, and PEFT's own forward pass where it cannot."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args or kwargs or _why_now(self):
            return super().forward(x, *args, **kwargs)  # type: ignore[misc,no-any-return]
        return _train(self, x) if torch.is_grad_enabled() else _infer(self, x)


class LoraFirstLinear(_LoraFirst, lora.Linear):  # type: ignore[misc]
    """PEFT's layer on an unquantized base."""


class LoraFirstLinear4bit(_LoraFirst, lora_bnb.Linear4bit):  # type: ignore[misc]
    """PEFT's layer on a 4-bit base."""


class LoraFirstLinear8bit(_LoraFirst, lora_bnb.Linear8bitLt):  # type: ignore[misc]
    """PEFT's layer on an 8-bit base."""


LORA_FIRST: dict[type, type] = {
    lora.Linear: LoraFirstLinear,
    lora_bnb.Linear4bit: LoraFirstLinear4bit,
    lora_bnb.Linear8bitLt: LoraFirstLinear8bit,
}


def put_on(model: Any) -> Outcome:
    """Let the LoRA layers of `model` run their factors first; parameters, names and files stay as they are.

    The base must stay frozen. The class of a layer changes, not its `forward` attribute: that would make the layer a
    cycle of references, whose memory comes back late.
    """
    n_done, left = 0, Counter[str]()
    for layer in model.modules():
        if not isinstance(layer, lora.LoraLayer):
            continue
        why = why_left(layer) if type(layer) in LORA_FIRST else f"lora.{type(layer).__name__}"
        if why:
            left[why] += 1
        else:
            if isinstance(layer.base_layer, Linear4bit):
                layer.base_layer.support_avx512bf16_for_cpu = False  # an evaluation would repack what we dequantize
            layer.__class__ = LORA_FIRST[type(layer)]
            n_done += 1
    done = f"{n_done} linear layers" if n_done else ""
    return Outcome(done=done, left="; ".join(f"{why}: PEFT's own forward on {n}" for why, n in left.items()))


def why_left(layer: Any) -> str:
    """Why the LoRA layer must run PEFT's own forward pass; "" where it need not."""
    return _why_now(layer) or _why_always(layer)


def _why_now(layer: Any) -> str:
    """What may change from call to call. It runs in each: no attribute that a module looks up among its children."""
    if layer.disable_adapters or layer.merged:
        return "adapters disabled or merged"
    active = layer.active_adapters
    if len(active) != 1 or active[0] not in layer.scaling:
        return f"{len(active)} active adapters"
    if active[0] in layer.lora_variant:
        return "DoRA" if layer.use_dora[active[0]] else type(layer.lora_variant[active[0]]).__name__
    if layer.lora_bias[active[0]]:
        return "factors with a bias"
    base = layer._modules["base_layer"]
    hooked = base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks
    return "hooks on the base" if hooked else ""


def _why_always(layer: Any) -> str:
    """What the layer is, whatever its state."""
    base = layer.base_layer
    if type(base) not in (nn.Linear, Conv1D) and not isinstance(base, (Linear4bit, Linear8bitLt)):
        return type(base).__name__
    if isinstance(base, Linear4bit) and getattr(base.weight, "quant_state", None) is None:
        return "weights not quantized yet"
    if getattr(getattr(base.weight, "quant_state", None), "packing_format_for_cpu", False):
        return "weights repacked by an evaluation"
    if any(p.requires_grad for p in base.parameters()):
        return "the base trains"
    if "forward" in vars(base):
        return "another library's forward on the base"
    dropout = layer.lora_dropout[layer.active_adapters[0]]
    unknown = type(dropout) not in (nn.Identity, nn.Dropout) or getattr(dropout, "p", 0) >= 1
    return f"dropout {dropout}" if unknown else ""


def _train(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """The layer's output with its graph."""
    [name] = layer.active_adapters
    base, dropout = layer.base_layer, layer.lora_dropout[name]
    x_cast = x.to(_compute_dtype(base, x))
    y: torch.Tensor = LoraBranch.apply(  # type: ignore[no-untyped-call]
        x_cast,
        layer.lora_A[name].weight,
        layer.lora_B[name].weight,
        base,
        layer.scaling[name],
        dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0,
    )
    if not is_output_unread(layer):
        add_frozen_product(y, x_cast, base)
    quantized = isinstance(base, (Linear4bit, Linear8bitLt))
    return y.to(x.dtype) if quantized else y  # as their own forward passes do


def _infer(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """The layer's output without a graph: the base runs as it is, with bitsandbytes' fused kernel for a few tokens."""
    [name] = layer.active_adapters
    y: torch.Tensor = layer.base_layer(x)
    a_rK, b_Nr = layer.lora_A[name].weight, layer.lora_B[name].weight
    seen = layer.lora_dropout[name](x).to(y.dtype)
    h_Mr = _scaled_product(_rows(seen), a_rK.to(y.dtype).T, layer.scaling[name])
    y.view(-1, y.shape[-1]).addmm_(h_Mr, b_Nr.to(y.dtype).T)
    return y


def _compute_dtype(base: nn.Module, x: torch.Tensor) -> torch.dtype:
    if isinstance(base, Linear4bit) and base.compute_dtype is not None:
        return base.compute_dtype  # type: ignore[no-any-return]
    if torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype
