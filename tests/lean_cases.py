"""Models with factors, one step of them, and how far the stock step itself is from the exact one."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import oracles
import torch
from families import VOCAB, tiny_model

from qlora_kit import build
from qlora_kit.adapters import inject
from qlora_kit.config.settings import AdapterConfig, LeanConfig

LEAN = LeanConfig().resolved("cpu")
ADAPTER_DTYPES = {torch.bfloat16: "bf16", torch.float32: "fp32"}


def with_factors(base: Any, **settings: Any) -> Any:
    """The PEFT model of `base` in training mode: factors in its dtype, B drawn too, so that every factor matters."""
    dtype = base.get_output_embeddings().weight.dtype
    draw = torch.Generator().manual_seed(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = inject.inject(base, AdapterConfig(**{"r": 4, "adapter_dtype": ADAPTER_DTYPES[dtype], **settings}))
    with torch.no_grad():
        for name, factor in inject.trainable(model):
            if "lora_B" in name:
                factor.copy_(torch.randn(factor.shape, generator=draw) * 0.05)
    return model.train()


def tiny_peft_model(family: str, dtype: torch.dtype = torch.float32) -> Any:
    """A tiny model of `family` with factors on every linear layer."""
    return with_factors(tiny_model(family, dtype=dtype))


def adapted(
    family: str, dtype: torch.dtype = torch.float32, *, dropout: float = 0.0, checkpointing: bool = False
) -> Any:
    """A tiny model in training mode, both factors off zero; the same values in every dtype."""
    model = tiny_model(family, dtype=dtype)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout
    if checkpointing:
        build.enable_checkpointing(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = inject.inject(model, AdapterConfig(r=4))
    draw = torch.Generator().manual_seed(1)
    for name, factor in inject.trainable(model):
        values = torch.randn(factor.shape, generator=draw) * (0.05 if "lora_B" in name else 0.2)
        factor.data = values.bfloat16().to(dtype)
    return model.train()


def batch(rows: int = 3, tokens: int = 17, supervised: float = 0.7, vocab: int = VOCAB) -> dict[str, torch.Tensor]:
    """Random tokens, of which a share is supervised, anywhere."""
    draw = torch.Generator().manual_seed(rows * 1000 + tokens)
    ids_BT = torch.randint(0, vocab, (rows, tokens), generator=draw)
    masked_BT = torch.rand(ids_BT.shape, generator=draw) >= supervised
    return {
        "input_ids": ids_BT,
        "attention_mask": torch.ones_like(ids_BT),
        "labels": ids_BT.masked_fill(masked_BT, -100),
    }


@dataclass
class Step:
    """A forward and backward pass: the loss, that of each token (where there were logits), every factor's gradient."""

    loss: torch.Tensor
    token_losses: torch.Tensor | None
    gradients: dict[str, torch.Tensor]


def take_step(model: Any, inputs: dict[str, torch.Tensor], n_items: Any = None) -> Step:
    """One step of `model` as it is; its gradients are taken off it."""
    outputs = model(**inputs, **({} if n_items is None else {"num_items_in_batch": n_items}))
    outputs.loss.backward()
    token_losses = None if outputs.logits is None else oracles.token_losses(outputs.logits, inputs["labels"]).detach()
    return Step(outputs.loss.detach(), token_losses, _take_gradients(model))


def exact_step(model: Any, inputs: dict[str, torch.Tensor], n_items: Any = None) -> Step:
    """The step of a copy of `model` (which is stock) in fp64."""
    model = copy.deepcopy(model).double()
    logits_BTV = model(**{name: value for name, value in inputs.items() if name != "labels"}).logits
    token_losses = oracles.token_losses(logits_BTV, inputs["labels"])
    loss = token_losses.mean() if n_items is None else token_losses.sum() / n_items
    loss.backward()
    return Step(loss.detach(), token_losses.detach(), _take_gradients(model))


def _take_gradients(model: Any) -> dict[str, torch.Tensor]:
    gradients = {name: factor.grad.double() for name, factor in inject.trainable(model)}
    model.zero_grad(set_to_none=True)
    return gradients


def assert_within_stock_error(lean: Step, stock: Step, exact: Step) -> None:
    """Two steps that are each as far from the exact one as the stock step is are at most twice that apart.

    Checked for the gradient of every factor, whose error is its own or, where that is small by luck, the share of it
    that all factors together are off; one that cancels to zero keeps the rounding of what cancels. For the loss that
    error is the mean one of a token, and the rounding of the figure itself.
    """
    eps = torch.finfo(torch.float32).eps
    share = float(exact.loss / exact.token_losses.mean())
    token_error = float((stock.token_losses - exact.token_losses).abs().mean()) * share
    assert lean.loss.dtype == stock.loss.dtype == torch.float32
    assert abs(float(lean.loss - stock.loss)) <= 2 * token_error + eps * float(exact.loss)
    assert lean.gradients.keys() == stock.gradients.keys()
    sizes = {name: float(gradient.norm()) for name, gradient in exact.gradients.items()}
    errors = {name: float((stock.gradients[name] - exact.gradients[name]).norm()) for name in sizes}
    typical = math.hypot(*errors.values()) / max(math.hypot(*sizes.values()), 1e-30)  # of a factor's size
    rounding = eps * math.hypot(*sizes.values())
    for name, gradient in lean.gradients.items():
        bound = 2 * max(errors[name], typical * sizes[name]) + rounding
        assert float((gradient - stock.gradients[name]).norm()) <= bound, name
