"""Two sets of logits against each other, a few tokens at a time: differences, KL, losses, agreement."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_kit.data.encode import IGNORED
from qlora_kit.release.files.read import Checkpoint

if TYPE_CHECKING:
    import torch

PIECE_ELEMENTS = 1 << 20  # logits compared at once


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How the logits of a model differ from those of a reference, over `tokens` tokens.

    The logits' scale is their standard deviation in the reference. `where` is (row, token) of the largest difference.
    """

    tokens: int
    scale: float
    max_difference: float
    mean_difference: float
    norm_ratio: float  # ‖difference‖ / ‖reference‖
    where: tuple[int, int]
    kl: float  # of the model from the reference, nats a token
    supervised: int  # tokens
    reference_loss: float | None  # nats a supervised token; None where nothing is supervised
    loss: float | None
    loss_error: float | None  # the standard error of `loss` over the supervised tokens
    agreement: float  # the share of tokens whose most likely successor is the same

    @property
    def is_finite(self) -> bool:
        """Whether every logit of both was a number."""
        return all(math.isfinite(value) for value in (self.scale, self.max_difference, self.kl, self.norm_ratio))

    @property
    def relative_max(self) -> float:
        """The largest difference in units of the logits' scale."""
        return self.max_difference / self.scale

    @property
    def relative_mean(self) -> float:
        """The mean absolute difference in units of the logits' scale."""
        return self.mean_difference / self.scale


class _Totals:
    """What is added up over the pieces, in Python's double precision."""

    def __init__(self) -> None:
        self.tokens = self.elements = self.agreeing = self.supervised = 0
        self.reference = self.reference_squares = self.absolute = self.squares = self.kl = 0.0
        self.reference_loss = self.loss = self.loss_squares = 0.0
        self.largest, self.where = 0.0, (0, 0)


def compare(reference: Path, model: Path, labels: Sequence[Sequence[int]]) -> Comparison:
    """Compare the logits in two safetensors files (`row.0`, … of T × V, fp32) on rows with `labels` (−100: none)."""
    sums = _Totals()
    files = Checkpoint.open([reference]), Checkpoint.open([model])
    for number, marks in enumerate(labels):
        for start, ours, theirs in _pieces(f"row.{number}", *files):
            _add(sums, number, start, ours, theirs, marks)
    mean, n = sums.reference / sums.elements, sums.supervised
    loss = sums.loss / n if n else None
    spread = max(sums.loss_squares / n - loss**2, 0.0) if loss is not None else 0.0
    return Comparison(
        tokens=sums.tokens,
        scale=max(sums.reference_squares / sums.elements - mean**2, 0.0) ** 0.5 or 1.0,
        max_difference=sums.largest,
        mean_difference=sums.absolute / sums.elements,
        norm_ratio=(sums.squares / sums.reference_squares) ** 0.5 if sums.reference_squares else 0.0,
        where=sums.where,
        kl=sums.kl / sums.tokens,
        supervised=n,
        reference_loss=sums.reference_loss / n if n else None,
        loss=loss,
        loss_error=(spread / n) ** 0.5 if n else None,
        agreement=sums.agreeing / sums.tokens,
    )


def _pieces(name: str, reference: Checkpoint, model: Checkpoint) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    tokens, vocabulary = reference.entries[name].shape
    assert model.entries[name].shape == (tokens, vocabulary), f"{name}: logits of different shapes"
    step = max(1, PIECE_ELEMENTS // vocabulary)
    for start in range(0, tokens, step):
        count = min(step, tokens - start)
        pair = [file.read_elements(name, start * vocabulary, count * vocabulary) for file in (reference, model)]
        yield start, pair[0].reshape(count, -1), pair[1].reshape(count, -1)


def _add(
    sums: _Totals, row: int, start: int, reference_TV: torch.Tensor, model_TV: torch.Tensor, marks: Sequence[int]
) -> None:
    import torch

    difference = (model_TV - reference_TV).abs()
    sums.tokens += len(reference_TV)
    sums.elements += reference_TV.numel()
    sums.reference += float(reference_TV.sum(dtype=torch.float64))
    sums.reference_squares += float(reference_TV.square().sum(dtype=torch.float64))
    sums.absolute += float(difference.sum(dtype=torch.float64))
    sums.squares += float(difference.square().sum(dtype=torch.float64))
    largest, token = difference.max(dim=1).values.max(dim=0)
    if math.isfinite(sums.largest) and not float(largest) <= sums.largest:  # what is no number stays the largest
        sums.largest, sums.where = float(largest), (row, start + int(token))
    sums.agreeing += int((reference_TV.argmax(dim=1) == model_TV.argmax(dim=1)).sum())
    p, q = reference_TV.log_softmax(dim=1), model_TV.log_softmax(dim=1)
    sums.kl += float((p.exp() * (p - q)).sum(dtype=torch.float64))
    for place in range(len(reference_TV)):
        label = marks[start + place + 1] if start + place + 1 < len(marks) else IGNORED
        if label != IGNORED:
            sums.supervised += 1
            sums.reference_loss -= float(p[place, label])
            sums.loss -= float(q[place, label])
            sums.loss_squares += float(q[place, label]) ** 2
