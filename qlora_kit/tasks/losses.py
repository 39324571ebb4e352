"""Losses on logits that several tasks have, summed in fp32. In the shapes: B rows of a batch, L labels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def classification_loss(
    logits_BL: torch.Tensor, labels: torch.Tensor, n_items: Any, weights_L: torch.Tensor | None
) -> torch.Tensor:
    """The summed cross-entropy over `n_items`, in fp32.

    Labels of shape (B,) are numbers of classes: softmax, each example's loss times the weight of its class. Labels of
    shape (B, L) are 0 or 1 for each label: a sigmoid each, the loss of a 1 times the weight of its label.
    """
    from torch.nn import functional

    logits_BL = logits_BL.float()
    if labels.dim() == 1:
        loss = functional.cross_entropy(logits_BL, labels, weights_L, reduction="sum")
    else:
        loss = functional.binary_cross_entropy_with_logits(
            logits_BL, labels.float(), reduction="sum", pos_weight=weights_L
        )
    scaled: torch.Tensor = loss / n_items
    return scaled
