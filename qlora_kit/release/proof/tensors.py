"""The proof of each tensor: what was written is read back and compared with what it should be.

While the pieces of a tensor are made, those that are cast must be the exact ones within half a unit in the last place
of the release's dtype: changed where an adapter was, the base as it was cast where none was. After the last tensor the
files are read back from the disk: nothing missing, nothing extra, and every byte as it was written.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_kit.errors import UserError, named
from qlora_kit.release.files.read import BadFileError, Checkpoint, TensorEntry, read_bytes
from qlora_kit.release.files.write import Shard

if TYPE_CHECKING:
    import torch

SETTING = "out"
CHECKED_BYTES = 1 << 20  # read back at once
REMEDY = "Merge again; if it happens again, the disk or the memory is faulty, or this is a bug: please report it."


@dataclass(frozen=True, kw_only=True)
class TensorProof:
    """What was found about one tensor of the release; norms are Frobenius norms."""

    name: str
    elements: int
    changed: bool
    delta_norm: float  # of the exact change
    lost_norm: float  # of what rounding to the dtype took from, or added to, the exact merged weight

    @property
    def lost(self) -> float:
        """Rounding as a share of the change: at 1 it is as large as what was trained."""
        return self.lost_norm / self.delta_norm if self.delta_norm else 0.0


class TensorCheck:
    """Compares the pieces of one tensor of `numel` elements with what they should be, as they are made."""

    def __init__(self, name: str, dtype: torch.dtype, numel: int, must_change: bool) -> None:
        self.name, self.dtype, self.numel, self.must_change = name, dtype, numel, must_change
        self.elements, self.changed = 0, False
        self.delta_squares = self.lost_squares = 0.0

    def look_at(self, seen: torch.Tensor, merged: torch.Tensor, cast: torch.Tensor) -> None:
        """Compare a piece: the base's weights (fp32), the exact merged ones (fp32), and those in the release's dtype.

        Raises `UserError` where they are not the exact ones within rounding.
        """
        import torch

        lost = cast.float() - merged
        self.lost_squares += float(torch.linalg.vector_norm(lost)) ** 2
        beyond = lost.abs_().sub_(merged.abs(), alpha=rounding(self.dtype))
        if not float(beyond.max()) <= smallest(self.dtype):
            raise self._wrong(merged, cast)
        self.elements += merged.numel()
        if merged is seen:
            return
        self.delta_squares += float(torch.linalg.vector_norm(merged - seen)) ** 2
        self.changed = self.changed or not torch.equal(cast, seen.to(self.dtype))

    def look_at_copy(self, own: torch.Tensor) -> None:
        """Check a piece that is copied as it is. Raises `UserError` if it has values that are not finite."""
        if own.is_floating_point() and not bool(own.isfinite().all()):
            raise self._wrong(own, own)
        self.elements += own.numel()

    def _wrong(self, merged: torch.Tensor, cast: torch.Tensor) -> UserError:
        if not bool(merged.isfinite().all()):
            rule = f"has values that are not finite in {self.name}"
            return UserError.of("base", "", rule, "Fetch or convert the model again.")
        if not bool(cast.isfinite().all()):
            return self._does_not_fit(merged)
        return broken(f"{self.name} is not what was computed, rounded to {self.dtype}")

    def _does_not_fit(self, merged: torch.Tensor) -> UserError:
        rule = f"cannot hold {self.name}, which has weights up to {float(merged.abs().max()):g}"
        return UserError.of("dtype", short_name(self.dtype), rule, f"Use {named('dtype', 'bf16')} or fp32.")

    def result(self) -> TensorProof:
        """The proof. Raises `UserError` if an adapter changed nothing, or nothing that survives rounding."""
        assert self.elements == self.numel, f"{self.name}: {self.elements} of {self.numel} elements"
        if self.must_change and not self.delta_squares:
            raise broken(f"the adapter changes nothing in {self.name}")
        if self.must_change and not self.changed:
            rule = f"rounds away everything that the adapter changed in {self.name}"
            raise UserError.of("dtype", short_name(self.dtype), rule, f"Use {named('dtype', 'fp32')}.")
        return TensorProof(
            name=self.name,
            elements=self.elements,
            changed=self.changed,
            delta_norm=self.delta_squares**0.5,
            lost_norm=self.lost_squares**0.5,
        )


def short_name(dtype: torch.dtype) -> str:
    """The name of a dtype in the setting `dtype`."""
    name = str(dtype).removeprefix("torch.")
    return {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}.get(name, name)


def rounding(dtype: torch.dtype) -> float:
    """The largest relative error of rounding fp32 to `dtype`: half its epsilon, and a little more."""
    import torch

    return 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2 * (1 + 2**-12)


def smallest(dtype: torch.dtype) -> float:
    """The largest absolute error of rounding to `dtype` where numbers are too small for its full precision."""
    import torch

    return 0.0 if dtype == torch.float32 else torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps


def check_files(folder: Path, shards: Sequence[Shard], checksums: Mapping[str, int]) -> None:
    """Check that the finished files hold every planned tensor in its shape and dtype, and nothing else.

    They are opened again, by this package and by the safetensors library, and read again from the disk: every tensor
    must have its CRC-32 in `checksums`. Raises `UserError`.
    """
    from safetensors import SafetensorError, safe_open

    try:
        found = Checkpoint.open([folder / shard.name for shard in shards]).entries
    except BadFileError as error:
        raise broken(str(error)) from None
    planned = {name: plan for shard in shards for name, (plan, _) in shard.tensors.items()}
    wrong = planned.keys() ^ found.keys()
    wrong |= {n for n in planned.keys() & found.keys() if (planned[n].dtype, planned[n].shape) != _kind(found[n])}
    if wrong:
        raise broken(
            f"these tensors are missing, unexpected or of another shape or dtype: {', '.join(sorted(wrong)[:3])}"
        )
    for shard in shards:
        try:
            with safe_open(folder / shard.name, framework="pt") as file:
                if set(file.keys()) != set(shard.tensors):
                    raise broken(f"the safetensors library finds other tensors in {shard.name}")
        except SafetensorError as error:
            raise broken(f"the safetensors library cannot open {shard.name} ({error})") from None
        _forget_cached(folder / shard.name)
    for name, entry in found.items():
        if _checksum(entry) != checksums[name]:
            raise broken(f"{entry.file.name} does not hold what was written for {name}")


def _forget_cached(file: Path) -> None:
    """Make the system read `file` from the disk again, if it can; the file must be on the disk already."""
    if not hasattr(os, "posix_fadvise"):
        return
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _checksum(entry: TensorEntry) -> int:
    """The CRC-32 of a tensor's bytes."""
    found = 0
    try:
        for start in range(0, entry.n_bytes, CHECKED_BYTES):
            piece = read_bytes(entry, start, min(CHECKED_BYTES, entry.n_bytes - start))
            found = zlib.crc32(memoryview(piece.numpy()), found)  # type: ignore[arg-type]  # numpy's stubs
    except (BadFileError, OSError) as error:
        raise broken(f"{entry.file.name} cannot be read back ({error})") from None
    return found


def _kind(entry: TensorEntry) -> tuple[str, tuple[int, ...]]:
    return entry.dtype, entry.shape


def broken(what: str) -> UserError:
    """The error of a release that fails its proof."""
    return UserError.of(SETTING, "", f"the release failed its proof: {what}", REMEDY)


def summary(proofs: Iterable[TensorProof]) -> dict[str, object]:
    """The figures of all tensors for the report."""
    every = list(proofs)
    changed = [proof for proof in every if proof.changed]
    worst = max(changed, key=lambda proof: proof.lost, default=None)
    return {
        "tensors": len(every),
        "elements": sum(proof.elements for proof in every),
        "changed": len(changed),
        "changed_elements": sum(proof.elements for proof in changed),
        "rounding_to_change": {"worst": worst.lost, "tensor": worst.name} if worst is not None else None,
    }
