"""Attention and MLP of a block checkpointed apart: in the backward pass only one of them is there at a time.

    h = x + attention_half(x)        recomputed from x
    y = h + mlp_half(h)              recomputed from h

x, h, y: (B, T, D), for B rows, T positions and D features.

Saves, while a block is recomputed, what the other half keeps; costs h, one (B, T, D) more for each block, which
`offload` keeps on the host.
Exact: each function below says for one kind of block what transformers' own forward pass says;
`tests/lean/test_half_blocks.py` holds the two together. The additions stay outside the checkpoints: they keep nothing,
and a recomputation that need not go as far as the sum stops before the last product of its half.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from qlora_kit.lean.piece import Outcome

Checkpoint = Callable[[Callable[[torch.Tensor], Any], torch.Tensor], torch.Tensor]
Given = dict[str, Any]  # what a block is called with beside its input, by name
Halves = Callable[[Any, torch.Tensor, Given, Checkpoint], torch.Tensor]


def put_on(model: Any) -> Outcome:
    """Let every block of a known class that has its checkpoint on keep one for each of its halves instead."""
    blocks = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer) and m.gradient_checkpointing]
    if not blocks:
        return Outcome(left="checkpointing is off")
    known = [block for block in blocks if _halves_of(type(block)) is not None]
    for block in known:
        block.forward = MethodType(_forward, block)
        block.gradient_checkpointing = False  # transformers would put a checkpoint around the two
    others = sorted({type(block).__name__ for block in blocks} - {type(block).__name__ for block in known})
    done = f"{len(known)} blocks: attention and MLP apart" if known else ""
    return Outcome(done=done, left=f"{', '.join(others)}: whole blocks" if others else "")


def _forward(block: Any, *args: Any, **kwargs: Any) -> Any:
    given = _by_name(type(block), args, kwargs)
    if not (block.training and torch.is_grad_enabled() and _is_plain(given)):
        return type(block).forward(block, *args, **kwargs)
    halves = _halves_of(type(block))
    assert halves is not None, "only blocks of known classes were given this forward pass"
    return halves(block, given.pop("hidden_states"), given, block._gradient_checkpointing_func)


def _is_plain(given: Given) -> bool:
    """Whether a block only turns its input into its output: no cache is filled, no other model is looked at."""
    absent = ("past_key_values", "layer_past", "encoder_hidden_states")
    off = ("use_cache", "output_attentions")
    return all(given.get(name) is None for name in absent) and not any(given.get(name) for name in off)


def _by_name(kind: Any, args: tuple[Any, ...], kwargs: Given) -> Given:
    bound = _signature(kind).bind(None, *args, **kwargs)  # None: the block itself
    bound.apply_defaults()
    given = dict(bound.arguments)
    del given["self"]
    return {**given, **given.pop("kwargs")}


@functools.cache
def _signature(kind: type) -> inspect.Signature:
    return inspect.signature(kind.forward)  # type: ignore[attr-defined]


def _halves_of(kind: type) -> Halves | None:
    """The halves of blocks of class `kind`; None for a class unknown here, or of that name but not transformers'."""
    return _HALVES.get(kind.__name__) if kind.__module__.startswith("transformers.models.") else None


# The half functions must not refer to x or h by another way than their argument: what a checkpoint's function holds
# stays on the device until the backward pass.


def _llama(block: Any, x_BTD: torch.Tensor, given: Given, checkpoint: Checkpoint) -> torch.Tensor:
    def attention(x_BTD: torch.Tensor) -> Any:
        return block.self_attn(hidden_states=block.input_layernorm(x_BTD), **given)[0]

    def mlp(h_BTD: torch.Tensor) -> Any:
        return block.mlp(block.post_attention_layernorm(h_BTD))

    h_BTD = x_BTD + checkpoint(attention, x_BTD)
    return h_BTD + checkpoint(mlp, h_BTD)


def _gemma2(block: Any, x_BTD: torch.Tensor, given: Given, checkpoint: Checkpoint) -> torch.Tensor:
    def attention(x_BTD: torch.Tensor) -> Any:
        out_BTD = block.self_attn(hidden_states=block.input_layernorm(x_BTD), **given)[0]
        return block.post_attention_layernorm(out_BTD)

    def mlp(h_BTD: torch.Tensor) -> Any:
        out_BTD = block.mlp(block.pre_feedforward_layernorm(h_BTD))
        return block.post_feedforward_layernorm(out_BTD)

    h_BTD = x_BTD + checkpoint(attention, x_BTD)
    return h_BTD + checkpoint(mlp, h_BTD)


def _gpt2(block: Any, x_BTD: torch.Tensor, given: Given, checkpoint: Checkpoint) -> torch.Tensor:
    def attention(x_BTD: torch.Tensor) -> Any:
        return block.attn(block.ln_1(x_BTD), **given)[0]

    def mlp(h_BTD: torch.Tensor) -> Any:
        return block.mlp(block.ln_2(h_BTD))

    del given["encoder_hidden_states"], given["encoder_attention_mask"]  # there is no encoder
    h_BTD = checkpoint(attention, x_BTD) + x_BTD
    return h_BTD + checkpoint(mlp, h_BTD)


def _opt(block: Any, x_BTD: torch.Tensor, given: Given, checkpoint: Checkpoint) -> torch.Tensor:
    """Norms before the halves, or (in the 350m model) after the sums: those need the sums recomputed as well."""
    norm_first = block.do_layer_norm_before

    def attention(x_BTD: torch.Tensor) -> Any:
        normed_BTD = block.self_attn_layer_norm(x_BTD) if norm_first else x_BTD
        out_BTD = _dropout(block, block.self_attn(hidden_states=normed_BTD, **given)[0])
        return out_BTD if norm_first else block.self_attn_layer_norm(x_BTD + out_BTD)

    def mlp(h_BTD: torch.Tensor) -> Any:
        h_ND = h_BTD.reshape(-1, h_BTD.shape[-1])  # N = B · T
        normed_ND = block.final_layer_norm(h_ND) if norm_first else h_ND
        out_ND = _dropout(block, block.fc2(block.activation_fn(block.fc1(normed_ND))))
        return (out_ND if norm_first else block.final_layer_norm(h_ND + out_ND)).view(h_BTD.shape)

    del given["use_cache"]  # transformers gives it to the block only
    if not norm_first:
        return checkpoint(mlp, checkpoint(attention, x_BTD))
    h_BTD = x_BTD + checkpoint(attention, x_BTD)
    return h_BTD + checkpoint(mlp, h_BTD)


def _dropout(block: Any, out: torch.Tensor) -> torch.Tensor:
    return nn.functional.dropout(out, p=block.dropout, training=block.training)


def _gpt_neox(block: Any, x_BTD: torch.Tensor, given: Given, checkpoint: Checkpoint) -> torch.Tensor:
    def attention(x_BTD: torch.Tensor) -> Any:
        out_BTD = block.attention(block.input_layernorm(x_BTD), **given)[0]
        return block.post_attention_dropout(out_BTD)

    def mlp(h_BTD: torch.Tensor) -> Any:
        return block.post_mlp_dropout(block.mlp(block.post_attention_layernorm(h_BTD)))

    attended_BTD = checkpoint(attention, x_BTD)
    if block.use_parallel_residual:
        return checkpoint(mlp, x_BTD) + attended_BTD + x_BTD
    h_BTD = attended_BTD + x_BTD
    return checkpoint(mlp, h_BTD) + h_BTD


def _phi(block: Any, x_BTD: torch.Tensor, given: Given, checkpoint: Checkpoint) -> torch.Tensor:
    """Both halves begin with the one norm of the block, which each computes for itself."""

    def attention(x_BTD: torch.Tensor) -> Any:
        out_BTD = block.self_attn(hidden_states=block.input_layernorm(x_BTD), **given)[0]
        return block.resid_dropout(out_BTD)

    def mlp(x_BTD: torch.Tensor) -> Any:
        return block.resid_dropout(block.mlp(block.input_layernorm(x_BTD)))

    attended_BTD = checkpoint(attention, x_BTD)
    return attended_BTD + checkpoint(mlp, x_BTD) + x_BTD


_HALVES: dict[str, Halves] = {
    "LlamaDecoderLayer": _llama,
    "MistralDecoderLayer": _llama,
    "Qwen2DecoderLayer": _llama,
    "Qwen3DecoderLayer": _llama,
    "GemmaDecoderLayer": _llama,
    "Gemma2DecoderLayer": _gemma2,
    "GPT2Block": _gpt2,
    "OPTDecoderLayer": _opt,
    "GPTNeoXLayer": _gpt_neox,
    "PhiDecoderLayer": _phi,
}
