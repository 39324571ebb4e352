"""Safetensors files written as a stream: the places of all tensors are planned first, then filled in any order.

The format: 8 bytes with the length of a JSON header, the header, the data without gaps (safetensors, "Format").
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.release.files.read import DTYPES, INDEX_FILE, SINGLE_FILE, TensorEntry
from qlora_kit.system import files

if TYPE_CHECKING:
    import torch

SHARD_BYTES = 5_000_000_000  # a file holds so much at most, unless one tensor is larger
METADATA = {"format": "pt"}  # what transformers looks for
DTYPE_NAMES = {torch_name: name for name, torch_name in DTYPES.items()}
ITEM_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


@dataclass(frozen=True)
class TensorPlan:
    """A tensor to be written: its name, dtype as the format spells it, and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        """Its size."""
        size = ITEM_BYTES[self.dtype]
        for length in self.shape:
            size *= length
        return size


def dtype_name(dtype: torch.dtype) -> str:
    """`dtype` as the format spells it."""
    return DTYPE_NAMES[str(dtype).removeprefix("torch.")]


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One file: its name, the tensors in it with their places, and what comes before the data."""

    name: str
    tensors: Mapping[str, tuple[TensorPlan, int]]  # the offset counts from the beginning of the file
    header: bytes  # with the length in front of it
    n_bytes: int


def plan_shards(tensors: Sequence[TensorPlan], limit_bytes: int = SHARD_BYTES) -> list[Shard]:
    """Share `tensors` out, in their order, among files of at most `limit_bytes` of data."""
    groups: list[list[TensorPlan]] = [[]]
    held = 0
    for tensor in tensors:
        if groups[-1] and held + tensor.n_bytes > limit_bytes:
            groups.append([])
            held = 0
        groups[-1].append(tensor)
        held += tensor.n_bytes
    if len(groups) == 1:
        return [_plan_file(SINGLE_FILE, groups[0])]
    count = len(groups)
    return [_plan_file(f"model-{i:05d}-of-{count:05d}.safetensors", group) for i, group in enumerate(groups, 1)]


def _plan_file(name: str, tensors: Iterable[TensorPlan]) -> Shard:
    """The widest dtypes come first, so that every tensor is aligned as its dtype wants it."""
    ordered = sorted(tensors, key=lambda tensor: -ITEM_BYTES[tensor.dtype])
    fields: dict[str, object] = {"__metadata__": METADATA}
    offsets, end = {}, 0
    for tensor in ordered:
        offsets[tensor.name] = end
        end += tensor.n_bytes
        place = [offsets[tensor.name], end]
        fields[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": place}
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8
    header = len(text).to_bytes(8, "little") + text
    places = {tensor.name: (tensor, len(header) + offsets[tensor.name]) for tensor in ordered}
    return Shard(name=name, tensors=places, header=header, n_bytes=len(header) + end)


class ShardWriter:
    """Fills the planned files in a folder, and reads back what it wrote."""

    def __init__(self, folder: Path, shards: Sequence[Shard]) -> None:
        self.folder = folder
        self.shards = list(shards)
        self.shard_of = {name: shard for shard in shards for name in shard.tensors}
        self.files: dict[str, int] = {}
        self.written: dict[str, int] = dict.fromkeys(self.shard_of, 0)  # elements of each tensor
        self.checksums: dict[str, int] = dict.fromkeys(self.shard_of, 0)  # CRC-32 of each tensor's bytes so far

    def begin(self) -> None:
        """Make every file in its full size, with its header."""
        for shard in self.shards:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0)
            file = os.open(self.folder / shard.name, flags, 0o644)
            self.files[shard.name] = file
            os.pwrite(file, shard.header, 0)
            os.ftruncate(file, shard.n_bytes)

    def write(self, name: str, values: torch.Tensor, start: int = 0) -> None:
        """Write `values` as the elements of the tensor `name` from element `start` on, where the last ones ended.

        Threads may write different tensors at once.
        """
        plan, place = self.shard_of[name].tensors[name]
        assert dtype_name(values.dtype) == plan.dtype, f"{name}: {values.dtype} for {plan.dtype}"
        assert start == self.written[name], f"{name}: element {start} after {self.written[name]}"
        offset = place + start * ITEM_BYTES[plan.dtype]
        content = memoryview(_as_bytes(values))
        assert start * ITEM_BYTES[plan.dtype] + len(content) <= plan.n_bytes, f"{name} is longer than planned"
        self.written[name] += values.numel()
        self.checksums[name] = zlib.crc32(content, self.checksums[name])
        while content:
            written = os.pwrite(self.files[self.shard_of[name].name], content[: 1 << 30], offset)
            content, offset = content[written:], offset + written

    def entry(self, name: str) -> TensorEntry:
        """The place of the tensor `name`, to read it back."""
        shard = self.shard_of[name]
        plan, place = shard.tensors[name]
        return TensorEntry(
            file=self.folder / shard.name, dtype=plan.dtype, shape=plan.shape, start=place, n_bytes=plan.n_bytes
        )

    def finish(self) -> None:
        """Put all that was written on the disk, and with several files their index beside them."""
        for name, shard in self.shard_of.items():
            plan, _ = shard.tensors[name]
            assert self.written[name] * ITEM_BYTES[plan.dtype] == plan.n_bytes, f"{name} is not all written"
        for file in self.files.values():
            os.fsync(file)
        if len(self.shards) > 1:
            files.write_json(self.folder / INDEX_FILE, index_of(self.shards))

    def close(self) -> None:
        """Close the files."""
        while self.files:
            os.close(self.files.popitem()[1])


@contextmanager
def writing(folder: Path, shards: Sequence[Shard]) -> Iterator[ShardWriter]:
    """A writer of `shards` in `folder`; what it wrote is on the disk at the end."""
    writer = ShardWriter(folder, shards)
    try:
        writer.begin()
        yield writer
        writer.finish()
    finally:
        writer.close()


def index_of(shards: Sequence[Shard]) -> dict[str, object]:
    """The content of the index file: which file holds which tensor."""
    total = sum(plan.n_bytes for shard in shards for plan, _ in shard.tensors.values())
    places = {name: shard.name for shard in shards for name in shard.tensors}
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}


def _as_bytes(values: torch.Tensor) -> Any:
    import torch

    return values.contiguous().reshape(-1).view(torch.uint8).numpy()
