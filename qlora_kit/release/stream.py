"""The merge itself: each weight of the release computed from the base's tensor and written, a few rows at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qlora_kit.release import delta, outputs, quantize
from qlora_kit.release.files.read import Checkpoint
from qlora_kit.release.files.write import ShardWriter, TensorPlan, dtype_name
from qlora_kit.release.outputs import Output
from qlora_kit.release.proof.tensors import TensorCheck, TensorProof
from qlora_kit.release.quantize import Quantization
from qlora_kit.release.threads import Room, in_threads

if TYPE_CHECKING:
    import torch

COPY_ELEMENTS = 1 << 17  # of a tensor that is only cast
LARGEST_AT_ONCE = 2  # weights in work at once take at most this many times the largest one in fp32
STATE_BYTES = 512  # room for the numbers of a packed weight's state, whose JSON is padded with spaces


@dataclass(frozen=True, kw_only=True)
class WeightRecipe:
    """What decides the weights: how the adapter saw the base, and how the release holds them."""

    how: Quantization | None  # None: the base's own weights (`into` "original")
    original: bool
    dtype: torch.dtype
    pack: Quantization | None  # how to quantize the merged weights; None: not at all
    packed_names: frozenset[str]  # the live names of the weights that are then packed

    def packs(self, output: Output) -> bool:
        """Whether the release holds this weight quantized."""
        return self.pack is not None and output.weight is not None and output.weight.name in self.packed_names


def plans_of(output: Output, checkpoint: Checkpoint, recipe: WeightRecipe) -> list[TensorPlan]:
    """The tensors of the release's files that hold `output`: one, or with packing a weight and its state."""
    shape = checkpoint.entries[output.source].shape
    if not recipe.packs(output):
        return [TensorPlan(output.name, dtype_name(outputs.written_dtype(output, checkpoint, recipe.dtype)), shape)]
    assert recipe.pack is not None
    numel = checkpoint.entries[output.source].numel
    scales = -(-numel // quantize.BLOCK)
    plans = [
        TensorPlan(output.name, "U8", ((numel + 1) // 2, 1)),
        TensorPlan(f"{output.name}.absmax", "U8" if recipe.pack.double_quant else "F32", (scales,)),
        TensorPlan(f"{output.name}.quant_map", "F32", (16,)),
        TensorPlan(_state_name(output, recipe.pack), "U8", (STATE_BYTES,)),
    ]
    if recipe.pack.double_quant:
        nested = -(-scales // quantize.SCALES_BLOCK)
        plans.append(TensorPlan(f"{output.name}.nested_absmax", "F32", (nested,)))
        plans.append(TensorPlan(f"{output.name}.nested_quant_map", "F32", (256,)))
    return plans


def _state_name(output: Output, pack: Quantization) -> str:
    return f"{output.name}.quant_state.bitsandbytes__{pack.quant_type}"


def write_all(
    planned: Sequence[Output],
    checkpoint: Checkpoint,
    recipe: WeightRecipe,
    writer: ShardWriter,
    advance: Callable[[str, int], None],
) -> Iterator[TensorProof]:
    """Write every weight and yield its proof; `advance` is called with the name and the bytes read of each.

    As many are worked on at once as torch has threads and `LARGEST_AT_ONCE` allows. Raises `UserError` if one is
    wrong, or cannot be represented in the dtype.
    """
    largest = max((checkpoint.entries[output.source].numel for output in planned), default=0)
    room = Room(LARGEST_AT_ONCE * 4 * largest)

    def work(output: Output) -> TensorProof:
        with room.taken(_held_bytes(output, checkpoint, recipe)):
            return _write(output, checkpoint, recipe, writer)

    for output, found in zip(planned, in_threads(work, planned), strict=True):
        yield found
        advance(output.name, checkpoint.entries[output.source].n_bytes)


def _write(output: Output, checkpoint: Checkpoint, recipe: WeightRecipe, writer: ShardWriter) -> TensorProof:
    if recipe.packs(output):
        return _write_packed(output, checkpoint, recipe, writer)
    if output.adapted or _is_quantized(output, recipe):
        return _write_matrix(output, checkpoint, recipe, writer)
    return _write_copy(output, checkpoint, recipe, writer)


def _held_bytes(output: Output, checkpoint: Checkpoint, recipe: WeightRecipe) -> int:
    """About what working on a weight holds in memory, beside pieces of rows."""
    entry = checkpoint.entries[output.source]
    if not (output.adapted or _is_quantized(output, recipe) or recipe.packs(output)):
        return 0
    turned = entry.n_bytes + entry.numel * recipe.dtype.itemsize if _is_transposed(output) else 0
    whole = entry.n_bytes if turned or _is_quantized(output, recipe) else 0
    return whole + turned + entry.numel


def _is_quantized(output: Output, recipe: WeightRecipe) -> bool:
    return recipe.how is not None and recipe.how.bits <= 8 and output.weight is not None and output.weight.quantized


def _write_copy(output: Output, checkpoint: Checkpoint, recipe: WeightRecipe, writer: ShardWriter) -> TensorProof:
    """A weight without factors on a layer that is not quantized: the base's, cast as loading casts it."""
    dtype = outputs.written_dtype(output, checkpoint, recipe.dtype)
    seen_dtype = outputs.seen_dtype(output, checkpoint, recipe.original)
    numel = checkpoint.entries[output.source].numel
    check = TensorCheck(output.name, dtype, numel, must_change=False)
    for start in range(0, numel, COPY_ELEMENTS):
        own = checkpoint.read_elements(output.source, start, min(COPY_ELEMENTS, numel - start))
        cast = own.to(seen_dtype).to(dtype)
        writer.write(output.name, cast, start)
        if dtype.is_floating_point and not own.dtype == seen_dtype == dtype:
            seen = own.to(seen_dtype).float()
            check.look_at(seen, seen, cast)
        else:
            check.look_at_copy(own)
    return check.result()


def _write_matrix(output: Output, checkpoint: Checkpoint, recipe: WeightRecipe, writer: ShardWriter) -> TensorProof:
    """A weight that changes: computed in fp32 row by row, out × in, and written in the files' own orientation."""
    import torch

    dtype = outputs.written_dtype(output, checkpoint, recipe.dtype)
    entry = writer.entry(output.name)
    check = TensorCheck(output.name, dtype, entry.numel, output.must_change)
    transposed = _is_transposed(output)
    turned = torch.empty(entry.shape, dtype=dtype) if transposed else None
    columns = entry.shape[-1]
    for rows, seen, merged in merged_pieces(output, checkpoint, recipe):
        cast = merged.to(dtype)
        check.look_at(seen, merged, cast)
        if turned is not None:
            turned[:, rows] = cast.T
        else:
            writer.write(output.name, cast, rows.start * columns)
    if turned is not None:
        writer.write(output.name, turned)
    return check.result()


def _write_packed(output: Output, checkpoint: Checkpoint, recipe: WeightRecipe, writer: ShardWriter) -> TensorProof:
    """A weight that is merged first and quantized then, in the form that transformers loads: out × in, packed."""
    import torch

    assert recipe.pack is not None
    shape = checkpoint.entries[output.source].shape
    check = TensorCheck(output.name, recipe.dtype, math.prod(shape), output.must_change)
    shape = tuple(reversed(shape)) if _is_transposed(output) else shape
    builder = quantize.PackedWeightBuilder(shape, recipe.dtype, recipe.pack)
    for _, seen, merged in merged_pieces(output, checkpoint, recipe):
        cast = merged.to(recipe.dtype)
        check.look_at(seen, merged, cast)
        builder.add(cast)
    packed = builder.build()
    tensors = {output.name: packed.packed}
    tensors |= {f"{output.name}.{key}": value for key, value in packed.state.as_dict(packed=True).items()}
    state_name = _state_name(output, recipe.pack)
    room = torch.full((STATE_BYTES,), ord(" "), dtype=torch.uint8)
    room[: len(tensors[state_name])] = tensors[state_name]
    tensors[state_name] = room
    for name, value in tensors.items():
        writer.write(name, value)
    return check.result()


def _is_transposed(output: Output) -> bool:
    return output.weight is not None and output.weight.transposed


def merged_pieces(
    output: Output, checkpoint: Checkpoint, recipe: WeightRecipe
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Rows of a weight (out × in; a vector is one row): the base's as seen, and the merged ones, both in fp32."""
    changes = [delta.read_change(adapter, factor) for adapter, factor in output.factors]
    for rows, seen in _seen_pieces(output, checkpoint, recipe):
        merged = seen
        for adapter, key in output.whole:
            whole = _rows_of(adapter.checkpoint, key, rows, _is_transposed(output))
            merged = delta.replaced(merged, whole, adapter.weight)
        merged = delta.merged_rows(merged, rows, changes)
        for adapter, factor in output.biases:
            assert factor.bias is not None
            merged = merged + adapter.weight * factor.scaling * adapter.read(factor.bias)[None]
        yield rows, seen, merged


def _seen_pieces(output: Output, checkpoint: Checkpoint, recipe: WeightRecipe) -> Iterator[tuple[slice, torch.Tensor]]:
    dtype = outputs.seen_dtype(output, checkpoint, recipe.original)
    quantized = _is_quantized(output, recipe)
    if not quantized and not _is_transposed(output):
        for rows in quantize.row_pieces(*_matrix_shape(checkpoint.entries[output.source].shape)):
            yield rows, _rows_of(checkpoint, output.source, rows, transposed=False, dtype=dtype)
        return
    weight = checkpoint.read(output.source)
    if _is_transposed(output):
        weight = weight.T.contiguous()  # blocks of the quantization run along the inputs
    yield from quantize.as_seen(weight, dtype, recipe.how if quantized else None)


def _rows_of(
    checkpoint: Checkpoint, name: str, rows: slice, transposed: bool, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Rows of a matrix (a vector is one row) in fp32, cast to `dtype` first."""
    _, columns = _matrix_shape(checkpoint.entries[name].shape)
    if transposed:
        values = checkpoint.read(name).T[rows]
    else:
        values = checkpoint.read_elements(name, rows.start * columns, (rows.stop - rows.start) * columns)
        values = values.reshape(-1, columns)
    return (values if dtype is None else values.to(dtype)).float()


def _matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """`shape` as rows × columns; a vector is one row."""
    return (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))
