"""What the pieces of the lean step compute, in the plainest way and in full precision."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners import lora
from torch import nn
from torch.nn import functional

from qlora_kit.lean.linear import frozen_weight

IGNORED = -100


def linear_cross_entropy(hidden_MD, targets_M, weight_VD, bias_V=None, scale=1.0, soft_cap=None):
    """The summed cross-entropy of the rows with a target, in the dtype of the arguments."""
    total = hidden_MD.new_zeros(())
    for hidden_D, target in zip(hidden_MD, targets_M.tolist(), strict=True):
        if target == IGNORED:
            continue
        logits_V = weight_VD @ hidden_D
        if bias_V is not None:
            logits_V = logits_V + bias_V
        logits_V = logits_V * scale
        if soft_cap is not None:
            logits_V = soft_cap * torch.tanh(logits_V / soft_cap)
        total = total + torch.logsumexp(logits_V, 0) - logits_V[target]
    return total


def token_losses(logits_BTV, labels_BT):
    """The cross-entropy of each supervised token (N,), in fp32 or, for fp64 logits, in fp64."""
    exact = logits_BTV if logits_BTV.dtype == torch.float64 else logits_BTV.float()
    logits_MV, targets_M = exact[:, :-1].flatten(0, 1), labels_BT[:, 1:].flatten()
    losses_M = functional.cross_entropy(logits_MV, targets_M, reduction="none", ignore_index=IGNORED)
    return losses_M[targets_M != IGNORED]


def gelu_new(x: torch.Tensor) -> torch.Tensor:
    """0.5 x (1 + tanh(√(2/π) (x + 0.044715 x³))), in the dtype of `x`."""
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def rms_norm(x: torch.Tensor, scale: torch.Tensor, eps: float) -> torch.Tensor:
    """`scale` · x / √(mean(x²) + eps) over the last dimension, in the dtype of `x`."""
    return scale * x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()


def gradient_norm(gradients: Sequence[torch.Tensor]) -> float:
    """The norm of all gradients as one vector, in fp64."""
    return sum(float(g.double().square().sum()) for g in gradients) ** 0.5


@torch.no_grad()
def adamw_step(
    parameter: torch.Tensor,
    gradient: torch.Tensor,
    moments: tuple[torch.Tensor, torch.Tensor],
    step: int,
    lr: float,
    weight_decay: float,
) -> None:
    """One step of AdamW as its paper writes it, with torch's default constants; `moments` change in place."""
    beta1, beta2, eps = 0.9, 0.999, 1e-8
    first, second = moments
    first.copy_(beta1 * first + (1 - beta1) * gradient)
    second.copy_(beta2 * second + (1 - beta2) * gradient**2)
    unbiased = first / (1 - beta1**step)
    scale = (second / (1 - beta2**step)).sqrt() + eps
    parameter.copy_(parameter - lr * weight_decay * parameter - lr * unbiased / scale)


class NaiveLora(nn.Module):
    """One LoRA layer: `x Wᵀ + bias + scale · x Aᵀ Bᵀ`, with the weight that the layer's own dtype holds."""

    def __init__(self, layer: Any, dtype: torch.dtype) -> None:
        super().__init__()
        [self.name] = layer.active_adapters
        base, self.scale = layer.base_layer, layer.scaling[self.name]
        if hasattr(base, "state") and base.state.SCB is None:  # an 8-bit layer that has not run yet
            base.init_8bit_state()
        self.register_buffer("weight_NK", frozen_weight(base, dtype).detach().clone())
        self.register_buffer("bias_N", None if base.bias is None else base.bias.detach().clone())
        self.lora_A, self.lora_B = copy.deepcopy(layer.lora_A), copy.deepcopy(layer.lora_B)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x @ self.weight_NK.T
        if self.bias_N is not None:
            y = y + self.bias_N
        return y + self.scale * (x @ self.lora_A[self.name].weight.T) @ self.lora_B[self.name].weight.T


def naive_lora_model(model: Any, weight_dtype: torch.dtype, dtype: torch.dtype) -> Any:
    """A copy of a PEFT model in `dtype`, every LoRA layer naive; the parameters that train keep their names."""
    oracle = copy.deepcopy(model)
    for parent in list(oracle.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, lora.LoraLayer):
                setattr(parent, name, NaiveLora(layer, weight_dtype))
    return oracle.to(dtype)
