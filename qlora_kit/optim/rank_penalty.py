"""A penalty on the rank of what the factors change.

    λ · Σ ‖s·B·A‖⁎                                        over the layers; ‖·‖⁎ is the sum of the singular values
    B = Q_B R_B,  Aᵀ = Q_A R_A,  R_B R_Aᵀ = U Σ Vᵀ        so ‖B·A‖⁎ = Σ σ_i, from an r × r matrix

B: (N, r), A: (r, K), s the scaling; R_B, R_A: (r, r).

The nuclear norm is the convex stand-in for the rank (Fazel, Hindi and Boyd, 2001, "A rank minimization heuristic with
application to minimum order system approximation"; Recht, Fazel and Parrilo, arXiv 0706.4138). The change itself,
(N, K), is never formed: the penalty costs a few products of N × r and r × K a layer and a step, and memory for the
decompositions of one layer at a time.
"""

from __future__ import annotations

from typing import Any

import torch

from qlora_kit.adapters.initialization import NAME, lora_layers

RELATIVE_ZERO = 1e-6  # of ‖B‖·‖A‖: a singular value below it is rounding, and is not pushed


def nuclear_norm(b_Nr: torch.Tensor, a_rK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """‖B·A‖⁎, a subgradient of it for B (N, r), and one for A (r, K), in fp32.

    With B·A = U·Σ·Vᵀ they are U·Vᵀ·Aᵀ and Bᵀ·U·Vᵀ, over the singular values that are not zero.
    """
    q_Nr, b_rr = torch.linalg.qr(b_Nr.float())
    q_Kr, a_rr = torch.linalg.qr(a_rK.float().T)
    left_rr, values_r, right_rr = torch.linalg.svd(b_rr @ a_rr.T, full_matrices=False)
    counts_r = values_r > RELATIVE_ZERO * b_rr.norm() * a_rr.norm()
    turn_rr = (left_rr * counts_r) @ right_rr
    return values_r.sum(), q_Nr @ (turn_rr @ a_rr), (b_rr.T @ turn_rr) @ q_Kr.T


def add_gradients(model: Any, weight: float) -> torch.Tensor:
    """Add the gradient of `weight` · Σ ‖s·B·A‖⁎, over all layers, to those that are there; gives the sum of norms."""
    total = torch.zeros((), device=next(model.parameters()).device)
    for layer in lora_layers(model).values():
        a_rK, b_Nr, scale = layer.lora_A[NAME].weight, layer.lora_B[NAME].weight, layer.scaling[NAME]
        with torch.no_grad():
            norm, grad_b, grad_a = nuclear_norm(b_Nr, a_rK)
            total += scale * norm
        pairs = [(b_Nr, grad_b), (a_rK, grad_a)]
        training = [(f, (weight * scale * g).to(f.dtype)) for f, g in pairs if f.requires_grad]
        torch.autograd.backward([f for f, _ in training], [g for _, g in training])
    return total
