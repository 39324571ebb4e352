"""The heads that the chunked loss understands: where the decoder of an architecture is, and how logits are made.

    z = cap(scale · (h Wᵀ + b))        cap(x) = soft_cap · tanh(x / soft_cap), or x

h: (N, D) last hidden states; W: (V, D); b: (V,) or none; z: (N, V) logits; for N rows, D features, V tokens of the
vocabulary.

Saves nothing by itself. An architecture that is not in `KINDS` keeps its stock loss, so no formula is ever guessed.
Source: the `forward` of each architecture's causal language model in transformers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.loss.loss_utils import ForCausalLMLoss


@dataclass(frozen=True, kw_only=True)
class HeadKind:
    """Where the decoder is below the causal language model, and which settings of the model act on its logits."""

    decoder: str = "model"
    multiplier: str = ""  # each the name of a field of the model's config, "" for none
    divisor: str = ""
    soft_cap: str = ""


_PLAIN = HeadKind()
_CAPPED = HeadKind(soft_cap="final_logit_softcapping")
_SCALED = HeadKind(multiplier="logit_scale")

KINDS: dict[str, HeadKind] = {  # by `model_type`; mixtures of experts are left out: their routers add to the loss
    "arcee": _PLAIN,
    "cohere": _SCALED,
    "cohere2": _SCALED,
    "gemma": _PLAIN,
    "gemma2": _CAPPED,
    "gemma3_text": _CAPPED,
    "glm": _PLAIN,
    "glm4": _PLAIN,
    "gpt2": HeadKind(decoder="transformer"),
    "gpt_neox": HeadKind(decoder="gpt_neox"),
    "granite": HeadKind(divisor="logits_scaling"),
    "helium": _PLAIN,
    "llama": _PLAIN,
    "mistral": _PLAIN,
    "olmo": _PLAIN,
    "olmo2": _PLAIN,
    "opt": HeadKind(decoder="model.decoder"),
    "phi": _PLAIN,
    "phi3": _PLAIN,
    "qwen2": _PLAIN,
    "qwen3": _PLAIN,
    "smollm3": _PLAIN,
    "stablelm": _PLAIN,
    "starcoder2": _PLAIN,
}


@dataclass(frozen=True, kw_only=True)
class Head:
    """A frozen head: logits = cap(scale · (hidden @ weight.T + bias)), where cap(x) = soft_cap · tanh(x / soft_cap).

    `weight` (V, D), `bias` (V,) or None: V vocabulary, D hidden size. `soft_cap` is None where there is none.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    scale: float = 1.0
    soft_cap: float | None = None


def why_not(causal: Any) -> str:
    """Why the head of `causal` (a causal language model without PEFT's wrapper) is not understood; "" if it is."""
    linear = causal.get_output_embeddings()
    if linear is None:
        return "there is no head over the vocabulary"
    if causal.config.model_type not in KINDS:
        return f"the head of {causal.config.model_type!r} is not known"
    if "forward" in vars(causal) or causal.loss_function is not ForCausalLMLoss:
        return "the model's loss is not its class's own"
    if type(linear) is not nn.Linear:
        return f"the head is a {type(linear).__name__}, not a plain linear layer"
    if any(p.requires_grad for p in linear.parameters()):
        return "the head trains"
    if "forward" in vars(linear) or linear._forward_hooks or linear._forward_pre_hooks:
        return "something else acts on the head"
    return ""


def head_of(causal: Any) -> Head:
    """The head of `causal` as it is now; one that `why_not` has nothing against."""
    kind, linear = KINDS[causal.config.model_type], causal.get_output_embeddings()
    scale = _setting(causal, kind.multiplier, 1.0) / _setting(causal, kind.divisor, 1.0)
    return Head(weight=linear.weight, bias=linear.bias, scale=scale, soft_cap=_setting(causal, kind.soft_cap, None))


def decoder_of(causal: Any) -> nn.Module:
    """What is below the head: token ids to the last hidden state."""
    decoder: nn.Module = causal.get_submodule(KINDS[causal.config.model_type].decoder)
    return decoder


def _setting(causal: Any, name: str, default: Any) -> Any:
    return getattr(causal.config, name) if name else default
