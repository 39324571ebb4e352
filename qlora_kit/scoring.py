"""How well a model does on held-out data: its loss, its answers, their exact match.

Scoring leaves no trace: mode and random state are put back, so that a run with evaluations equals one without.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedTokenizerBase

ANSWER_BATCH = 32  # prompts answered at once


@dataclass(frozen=True)
class Loss:
    """Mean cross-entropy over `tokens` supervised tokens, in nats."""

    mean: float
    tokens: int


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards the mode and every random state are as before."""
    import numpy as np
    import torch

    was_training = model.training
    python_state, numpy_state = random.getstate(), np.random.get_state()
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
        model.eval()
        try:
            yield
        finally:
            model.train(was_training)
            random.setstate(python_state)
            np.random.set_state(numpy_state)


def mean_loss(model: nn.Module, batches: Iterable[dict[str, torch.Tensor]]) -> Loss:
    """The loss over every supervised token of `batches` (each token counts the same, whatever its batch).

    `batches` hold `input_ids_BT`, `labels_BT` (−100 where unsupervised) and masks, on the model's device.
    """
    total, tokens = 0.0, 0
    with undisturbed(model):
        for batch in batches:
            count = int((batch["labels"][:, 1:] != -100).sum())
            if count:
                total += float(model(**batch).loss) * count
                tokens += count
    return Loss(total / max(tokens, 1), tokens)


def answer(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[list[int]], max_new_tokens: int
) -> list[str]:
    """The greedy answers to `prompts` (token ids), each ended by end-of-text or after `max_new_tokens`.

    An answer also ends where the model's positions do; a prompt that fills them gets an empty one.
    """
    positions = getattr(model.config, "max_position_embeddings", None) or sys.maxsize
    rooms = [max(0, min(max_new_tokens, positions - len(prompt))) for prompt in prompts]
    answers = [""] * len(prompts)
    with undisturbed(model):
        for room in sorted(set(rooms) - {0}):  # prompts with the same room go together, so that none shortens another
            members = [index for index, own in enumerate(rooms) if own == room]
            for start in range(0, len(members), ANSWER_BATCH):
                part = members[start : start + ANSWER_BATCH]
                for index, text in zip(
                    part, _generate(model, tokenizer, [prompts[i] for i in part], room), strict=True
                ):
                    answers[index] = text
    return answers


def _generate(model: Any, tokenizer: PreTrainedTokenizerBase, part: list[list[int]], max_new_tokens: int) -> list[str]:
    import torch
    from transformers import GenerationConfig

    pad = tokenizer.pad_token_id
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        use_cache=True,
        pad_token_id=pad,
        eos_token_id=tokenizer.eos_token_id,
    )
    width = max(len(prompt) for prompt in part)
    ids_BT = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in part], device=model.device)
    mask_BT = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in part], device=model.device)
    out_BT = model.generate(input_ids=ids_BT, attention_mask=mask_BT, generation_config=settings)
    texts: list[str] = tokenizer.batch_decode(out_BT[:, width:], skip_special_tokens=True)
    return texts


def exact_match(answers: Sequence[str], expected: Sequence[str]) -> float:
    """The share of `answers` equal to `expected`, apart from white space at the ends."""
    assert len(answers) == len(expected), "one answer for each expected text"
    return sum(a.strip() == e.strip() for a, e in zip(answers, expected, strict=True)) / max(len(answers), 1)
