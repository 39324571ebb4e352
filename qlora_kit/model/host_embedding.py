"""The input embedding in host memory: lookups happen there, and only the looked-up rows are copied to the device.

V tokens of the vocabulary, D features, B batch, T tokens, N = B · T.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def why_not(model: Any, embedding: Any) -> str:
    """The reason why the input embedding of `model` must stay on its device; "" if it need not.

    The weights may be on `meta`, as they are before a model is loaded.
    """
    if not isinstance(embedding, nn.Embedding) or not (_is_plain(embedding) or _is_scaled(embedding)):
        return f"a {type(embedding).__name__} is not a plain lookup"
    owners = [m for m in model.modules() if any(p is embedding.weight for p in m.parameters(recurse=False))]
    reasons = {"it is tied to the head": len(owners) > 1, "it rescales its rows": embedding.max_norm is not None}
    return next((reason for reason, holds in reasons.items() if holds), "")


def host_weight(structure: Any) -> str | None:
    """The name of the embedding weight that a model like `structure` (with tied weights) can keep on the host.

    None if all its weights must be on the device.
    """
    embedding = structure.get_input_embeddings()
    if why_not(structure, embedding):
        return None
    return next(f"{name}.weight" for name, module in structure.named_modules() if module is embedding)


def _is_plain(embedding: nn.Embedding) -> bool:
    return type(embedding).forward is nn.Embedding.forward


def _is_scaled(embedding: nn.Embedding) -> bool:
    """Whether it is transformers' lookup whose rows are multiplied by a buffer, cast to the dtype of the weight."""
    return type(embedding).__name__.endswith("TextScaledWordEmbedding") and "embed_scale" in embedding._buffers


def move_to_host(embedding: nn.Embedding, device: torch.device | None = None) -> None:
    """Make `embedding` a `HostEmbedding` of a model on `device` (by default the device of its weight).

    It stays the same object, so that references to it and its hooks stay valid.
    """
    weight_VD = embedding.weight.detach()
    device = weight_VD.device if device is None else device
    one = torch.full((1, 1), float("nan"), dtype=weight_VD.dtype, device=device)
    embedding.weight = nn.Parameter(one.expand(weight_VD.shape), requires_grad=False)
    embedding.__class__ = HostEmbedding
    assert isinstance(embedding, HostEmbedding), "it has just become one"
    embedding.on_host = None if weight_VD.is_meta else weight_VD.cpu()


class HostEmbedding(nn.Embedding):
    """An embedding in host memory, whatever device the model is on; its results are on the device of the tokens.

    Its `weight` is a stand-in on the model's device, one NaN expanded to V × D: shape, dtype and device are right, and
    any use of the values shows. The real weight is `on_host` (V, D; None on `meta`), which `state_dict` also gives.
    The lookup waits for the device once, to read the tokens.
    """

    on_host: torch.Tensor | None

    def forward(self, ids_BT: torch.Tensor) -> torch.Tensor:
        """The rows (B, T, D) of the tokens."""
        rows_BTD = self._rows(ids_BT)
        scale = self._buffers.get("embed_scale")  # see `_is_scaled`
        return rows_BTD if scale is None else rows_BTD * scale.to(rows_BTD.dtype)

    def _rows(self, ids_BT: torch.Tensor) -> torch.Tensor:
        if self.on_host is None:
            return torch.empty((*ids_BT.shape, self.embedding_dim), dtype=self.weight.dtype, device=ids_BT.device)
        shape = (ids_BT.numel(), self.embedding_dim)
        # Pinned, so that its copy waits for nothing; torch uses the memory again when that is over.
        rows_ND = torch.empty(shape, dtype=self.on_host.dtype, pin_memory=ids_BT.is_cuda)
        torch.index_select(self.on_host, 0, ids_BT.flatten().cpu(), out=rows_ND)
        return rows_ND.to(ids_BT.device, non_blocking=True).view(*ids_BT.shape, self.embedding_dim)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> HostEmbedding:
        """Move and cast everything but the weight, which follows in dtype only."""
        one = fn(self.weight.detach()[:1, :1].clone())
        del self.weight
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.weight = nn.Parameter(one.expand(self.num_embeddings, self.embedding_dim), requires_grad=False)
        if self.on_host is not None:
            self.on_host = self.on_host.to(one.dtype)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.on_host is not None:
            destination[prefix + "weight"] = self.on_host
