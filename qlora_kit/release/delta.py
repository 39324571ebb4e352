"""The merged weight in fp32, row by row.

    W′ = W + Σᵢ wᵢ · sᵢ · Bᵢ · Aᵢ                       over the adapters
    W′ = m · (W + s·B·A) / ‖W + s·B·A‖                  with DoRA; the norm is that of each row

W, W′: (out, in), W the base as the adapter saw it; B: (out, r), A: (r, in); m: (out,); s = α/r or α/√r; w the weight of
an adapter in the merge.
Sources: LoRA (arXiv 2106.09685), rsLoRA (2312.03732), DoRA (2402.09353, eq. 5), each as PEFT's forward computes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qlora_kit.release.factors import Adapter, Factor

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class LowRankChange:
    """One adapter's change of one weight of `rows` × `columns`: scale · left · right, in fp32.

    With DoRA `magnitude` (rows) is set; such an adapter is merged alone and with weight 1.
    """

    left: torch.Tensor  # rows × r
    right: torch.Tensor  # r × columns
    scale: float
    magnitude: torch.Tensor | None = None


def read_change(adapter: Adapter, factor: Factor) -> LowRankChange:
    """The change of `factor`, its tensors read from the adapter's file."""
    a, b = adapter.read(factor.a), adapter.read(factor.b)
    if factor.embedding:  # W is vocabulary × hidden, and B·A hidden × vocabulary
        return LowRankChange(left=a.T.contiguous(), right=b.T.contiguous(), scale=factor.scaling * adapter.weight)
    if factor.magnitude is None:
        return LowRankChange(left=b, right=a, scale=factor.scaling * adapter.weight)
    return LowRankChange(left=b, right=a, scale=factor.scaling, magnitude=adapter.read(factor.magnitude))


def merged_rows(seen: torch.Tensor, rows: slice, changes: Sequence[LowRankChange]) -> torch.Tensor:
    """The rows `rows` of the merged weight, from those of the base (`seen`, fp32), which stay as they are."""
    import torch

    merged = seen
    for change in changes:
        if change.magnitude is None:
            merged = torch.addmm(merged, change.left[rows], change.right, alpha=change.scale)
        else:
            merged = _dora_rows(seen, rows, change)
    return merged


def _dora_rows(seen: torch.Tensor, rows: slice, change: LowRankChange) -> torch.Tensor:
    """Rows of the weight whose directions are those of W + s·B·A and whose lengths are the trained magnitudes."""
    import torch

    assert change.magnitude is not None
    turned = torch.addmm(seen, change.left[rows], change.right, alpha=change.scale)
    lengths = torch.linalg.norm(turned, dim=1)
    lengthened: torch.Tensor = (change.magnitude[rows] / lengths)[:, None] * turned
    return lengthened


def replaced(seen: torch.Tensor, whole: torch.Tensor, share: float) -> torch.Tensor:
    """What a tensor that was trained whole becomes: itself, or with a share in the merge W + share · (W' − W)."""
    return whole if share == 1.0 else seen + share * (whole - seen)
