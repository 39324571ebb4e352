"""The base exactly as the adapter saw it: each weight quantized and dequantized as loading and running it does.

    4 bits:   W ≈ code[q] · a            q: 4-bit numbers, code: (16,); a: the largest |w| of each 64 weights
              a ≈ code₈[c] · a₂ + mean(a)  with double quantization; a₂: one for each 256 scales
    8 bits:   W ≈ q · a / 127            q: int8; a: the largest |w| of each row
    16, 32:   W in the dtype that loading casts it to

W: (out, in). bitsandbytes' own functions do it, a few rows at a time: blocks of 64 weights are independent of each
other, and only double quantization looks at the scales of the whole tensor. The result equals that of
`model.load.load_base` bit for bit, on the same kind of device (a GPU sums the scales in another order).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

BLOCK = 64  # weights that share a scale: bitsandbytes' default, which is never changed here
SCALES_BLOCK = 256  # scales that share a scale, with double quantization
PIECE_BYTES = 1 << 19  # fp32 bytes of the rows worked on at once: they stay in the cache, and in malloc's own memory


@dataclass(frozen=True)
class Quantization:
    """How a base is held: in 4 or 8 bits, or (16, 32) as it is."""

    bits: int
    quant_type: str = "nf4"
    double_quant: bool = True


def row_pieces(rows: int, columns: int) -> Iterator[slice]:
    """The rows of a matrix a few at a time, so that every piece but the last holds whole blocks."""
    step = BLOCK // math.gcd(columns, BLOCK)
    step *= max(1, PIECE_BYTES // (4 * max(columns, 1)) // step)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def as_seen(weight: torch.Tensor, dtype: torch.dtype, how: Quantization | None) -> Iterator[tuple[slice, torch.Tensor]]:
    """The rows of `weight` (out × in) as the live layer computes with them, in fp32, piece by piece.

    `weight` is first cast to `dtype`, as loading does; `how` is None for a layer that is not quantized.
    """
    if how is None or how.bits > 8:
        for rows in row_pieces(*weight.shape):
            yield rows, weight[rows].to(dtype).float()
    elif how.bits == 8:
        yield from _as_seen_in_8_bits(weight, dtype)
    else:
        yield from dequantized(PackedWeight.of(weight, dtype, how))


def _as_seen_in_8_bits(weight: torch.Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, torch.Tensor]]:
    """LLM.int8: each row has a scale of its own. The product with the scales stays in fp32, as in bitsandbytes."""
    import torch
    from bitsandbytes import functional

    for rows in row_pieces(*weight.shape):
        values, scales, _ = functional.int8_vectorwise_quant(weight[rows].to(dtype).contiguous().to(torch.float16))
        yield rows, functional.int8_vectorwise_dequant(values, scales)


@dataclass(frozen=True)
class PackedWeight:
    """A 4-bit weight: two values in each byte of `packed` (n × 1), and its scales in `state`."""

    packed: torch.Tensor
    state: Any  # bitsandbytes' QuantState

    @classmethod
    def of(cls, weight: torch.Tensor, dtype: torch.dtype, how: Quantization) -> PackedWeight:
        """Quantize `weight` (out × in) after a cast to `dtype`."""
        builder = PackedWeightBuilder(tuple(weight.shape), dtype, how)
        for rows in row_pieces(*weight.shape):
            builder.add(weight[rows])
        return builder.build()


class PackedWeightBuilder:
    """Quantizes a weight to 4 bits as its rows come in, in the pieces of `row_pieces`."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, how: Quantization) -> None:
        import torch

        numel = math.prod(shape)
        self.shape, self.dtype, self.how = shape, dtype, how
        self.packed = torch.empty(((numel + 1) // 2, 1), dtype=torch.uint8)
        self.scales = torch.empty(-(-numel // BLOCK), dtype=torch.float32)
        self.done = 0  # weights so far

    def add(self, rows: torch.Tensor) -> None:
        """Quantize the next rows."""
        from bitsandbytes import functional

        values = rows.to(self.dtype).contiguous()
        packed, state = functional.quantize_4bit(values, blocksize=BLOCK, quant_type=self.how.quant_type)
        first_block = self.done // BLOCK
        self.packed[self.done // 2 : self.done // 2 + packed.shape[0]] = packed
        self.scales[first_block : first_block + state.absmax.shape[0]] = state.absmax
        self.done += values.numel()

    def build(self) -> PackedWeight:
        """The whole weight; with double quantization its scales are quantized as `functional.quantize_4bit` does."""
        import torch
        from bitsandbytes import functional

        assert self.done == math.prod(self.shape), "rows are missing"
        fields: dict[str, Any] = {"absmax": self.scales}
        if self.how.double_quant:
            offset = self.scales.mean()
            scales, scales_state = functional.quantize_blockwise(self.scales - offset, blocksize=SCALES_BLOCK)
            fields = {"absmax": scales, "offset": offset, "state2": scales_state}
        state = functional.QuantState(
            shape=torch.Size(self.shape),
            dtype=self.dtype,
            blocksize=BLOCK,
            code=functional.get_4bit_type(self.how.quant_type, device="cpu"),
            quant_type=self.how.quant_type,
            **fields,
        )
        return PackedWeight(self.packed, state)


def dequantized(weight: PackedWeight) -> Iterator[tuple[slice, torch.Tensor]]:
    """The rows of a 4-bit weight in fp32, each value rounded to the dtype it was quantized from, as the layer does."""
    import torch
    from bitsandbytes import functional

    state = weight.state
    scales = state.absmax
    if state.nested:
        scales = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    out_features, in_features = state.shape
    for rows in row_pieces(out_features, in_features):
        first, end = rows.start * in_features, rows.stop * in_features
        piece = functional.QuantState(
            absmax=scales[first // BLOCK : -(-end // BLOCK)],
            shape=torch.Size((rows.stop - rows.start, in_features)),
            dtype=state.dtype,
            blocksize=BLOCK,
            quant_type=state.quant_type,
        )
        yield rows, functional.dequantize_4bit(weight.packed[first // 2 : -(-end // 2)], piece).float()
