"""No attention mask for padding on the right.

    softmax(q[t] k[:t+1]ᵀ) v[:t+1]        for each token t; padding, on the right, is at no place up to t

q, k, v: (B, H, T, D); the mask that is left out: (B, 1, T, T); for B rows, H heads, T positions, D features of a head.

Saves the mask, and lets torch take flash attention, which it leaves where there is a mask.
Exact: causal attention never looks to the right, so no token sees the padding behind it, and what the padding itself
gives is not supervised.
"""

from __future__ import annotations

from typing import Any

from qlora_kit.lean.piece import Outcome
from qlora_kit.model import heads
from qlora_kit.tasks.task_model import reads_both_ways

# their attention is not causal everywhere, or they count the tokens that the mask shows
NOT_CAUSAL = ("prefix_lm", "is_encoder_decoder", "use_bidirectional_attention")
COUNTS_TOKENS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def put_on(model: Any) -> Outcome:
    """Let `model` drop the mask of every batch with labels; such batches must be padded on the right.

    `data.Collator` pads so. Batches without labels (prompts to answer, padded on the left) keep theirs.
    """
    config = model.config
    if not _is_causal(model):
        return Outcome(left="attention is not causal everywhere")
    if any(getattr(config, name, None) for name in COUNTS_TOKENS):
        return Outcome(left="experts are balanced over the tokens that the mask shows")
    if heads.is_over_tokens(model):
        return Outcome(left="the answer is chosen among the tokens that the mask shows")
    model.register_forward_pre_hook(_drop_mask, with_kwargs=True)
    return Outcome(done="padded rows attend causally, without a mask")


def is_on(model: Any) -> bool:
    """Whether `put_on` has changed `model`."""
    return any(hook is _drop_mask for hook in model._forward_pre_hooks.values())


def _is_causal(model: Any) -> bool:
    config = model.config
    if any(getattr(config, name, None) for name in NOT_CAUSAL) or reads_both_ways(config):
        return False
    parts = [config, *model.modules()]
    return all(getattr(part, "is_causal", True) for part in parts)


def _drop_mask(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    mask = kwargs.get("attention_mask")
    if mask is None or mask.dim() != 2 or kwargs.get("labels") is None:
        return args, kwargs
    return args, {**kwargs, "attention_mask": None}
