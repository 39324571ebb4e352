"""Tiny models with factors, batches of every kind, and the gradients of a step, for the tests of checkpoints."""

from __future__ import annotations

from typing import Any

import torch
from families import FAMILIES, POSITIONS, VOCAB
from transformers import AutoModelForCausalLM

from qlora_kit import build
from qlora_kit.adapters import inject
from qlora_kit.config.settings import AdapterConfig, LeanConfig
from qlora_kit.data import Collator

SETTINGS = LeanConfig(half_blocks="on", offload_activations="on", offload_embedding="on")
DROPOUTS = ("attention_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop", "hidden_dropout", "dropout", "embd_pdrop")
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in FAMILIES},
    "opt, norms last": ("opt", {"do_layer_norm_before": False}),
    "gpt_neox, one after the other": ("gpt_neox", {"use_parallel_residual": False}),
}

Gradients = dict[str, torch.Tensor]


def adapted(
    variant: str,
    dropout: float = 0.0,
    dtype: torch.dtype = torch.float32,
    targets: tuple[str, ...] | None = None,
    checkpointing: bool = True,
    **changes: Any,
) -> Any:
    """A model in training mode, checkpointed by transformers; the same call gives the same one. No factor is zero."""
    family, of_variant = VARIANTS[variant]
    config = FAMILIES[family]()
    for name, value in {**of_variant, **changes}.items():
        setattr(config, name, value)
    for name in DROPOUTS:
        if hasattr(config, name):
            setattr(config, name, dropout)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).requires_grad_(False)
    model.config.use_cache = False
    settings = AdapterConfig(r=4, dropout=dropout, targets=targets, adapter_dtype="fp32")
    model = inject.inject(model, settings)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, dtype=torch.float32).to(dtype)
    for _, factor in inject.trainable(model):
        factor.data = factor.data.to(dtype)
    if checkpointing:
        build.enable_checkpointing(model)
    return model.train()


def plain_batch(rows: int = 2, tokens: int = 24, seed: int = 0) -> dict[str, torch.Tensor]:
    """Rows without padding or mask."""
    ids = torch.randint(0, VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids.clone()}


def padded_batch() -> dict[str, torch.Tensor]:
    """Rows of different lengths, the end of the shorter one masked."""
    rows = [list(range(3, 23)), list(range(40, 47))]
    return Collator(0)([{"input_ids": row, "labels": [-100, *row[1:]]} for row in rows])


def packed_batch() -> dict[str, torch.Tensor]:
    """Two examples in a row: restarting positions and a mask of four dimensions."""
    rows = [(list(range(5, 24)), [12, 7]), (list(range(60, 70)), [4, 6])]
    features = [{"input_ids": row, "labels": row, "segment_lengths": lengths} for row, lengths in rows]
    return Collator(0, packed=True, max_tokens=POSITIONS)(features)


BATCHES = (plain_batch, padded_batch, packed_batch)


def gradients(model: Any, *batches: dict[str, torch.Tensor], seed: int = 0) -> tuple[list[float], Gradients]:
    """The loss of each batch, and the gradients of all of them together."""
    torch.manual_seed(seed)
    losses = []
    for batch in batches:
        outputs = model(**batch)
        loss = outputs.loss if batch["input_ids"].shape[1] > 1 else outputs.logits.square().mean()
        loss.backward()
        losses.append(float(loss.detach()))
    found = {name: p.grad for name, p in inject.trainable(model)}
    model.zero_grad(set_to_none=True)
    return losses, found


def assert_same(ours: tuple[list[float], Gradients], theirs: tuple[list[float], Gradients]) -> None:
    """The losses and every gradient are equal in every bit; none is missing or zero."""
    assert ours[0] == theirs[0]
    assert ours[1].keys() == theirs[1].keys()
    for name, gradient in theirs[1].items():
        assert bool(gradient.any()), name
        assert torch.equal(ours[1][name], gradient), name
