"""The tensors of a model's safetensors files: found, checked, and read one at a time.

The files are read with plain reads rather than mapped: pages of a mapped file count as this process's memory.
The format: 8 bytes with the length of a JSON header, the header, the data (safetensors, "Format").
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from qlora_kit.config.settings import BaseConfig
from qlora_kit.errors import Fault, UserError
from qlora_kit.model import hub, source

if TYPE_CHECKING:
    import torch

SINGLE_FILE, INDEX_FILE = source.WEIGHT_FILES
SIDE_PATTERNS = ("*.json", "*.txt", "*.model", "*.jinja", "*.py", "*.tiktoken", "README.md", *source.LICENCE_PATTERNS)
MAX_HEADER_BYTES = 100_000_000  # as in the safetensors library
READ_BYTES = 1 << 28  # the most in one system call
# the names of dtypes in a header, as torch calls them
DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
FETCH_REMEDY = "Fetch or convert the model again."


@dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """Where a tensor is stored: `n_bytes` from `start` (counted from the beginning of the file)."""

    file: Path
    dtype: str  # a key of `DTYPES`
    shape: tuple[int, ...]
    start: int
    n_bytes: int

    @property
    def numel(self) -> int:
        """The number of elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch knows it."""
        import torch

        dtype: torch.dtype = getattr(torch, DTYPES[self.dtype])
        return dtype


class BadFileError(Exception):
    """A safetensors file, or an index of some, that cannot be trusted; the message says what is wrong with it."""

    def __init__(self, message: str, file: Path | None = None) -> None:
        super().__init__(message)
        self.file = file  # the one that could not be read although its header was right


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of one model or adapter by their names in its files, in the order of the files."""

    entries: Mapping[str, TensorEntry]

    @classmethod
    def open(cls, files: Iterable[Path]) -> Checkpoint:
        """Read and check the headers of `files`. Raises `BadFileError`."""
        entries: dict[str, TensorEntry] = {}
        for file in files:
            for name, entry in read_header(file).items():
                if name in entries:
                    raise BadFileError(f"{name} is in both {entries[name].file.name} and {file.name}")
                entries[name] = entry
        return cls(entries)

    def read(self, name: str) -> torch.Tensor:
        """The tensor `name`, in memory of its own."""
        entry = self.entries[name]
        return read_bytes(entry, 0, entry.n_bytes).view(entry.torch_dtype).reshape(entry.shape)

    def read_elements(self, name: str, start: int, count: int) -> torch.Tensor:
        """`count` elements of the flattened tensor `name` from `start` on."""
        entry = self.entries[name]
        size = entry.torch_dtype.itemsize
        return read_bytes(entry, start * size, count * size).view(entry.torch_dtype)


def read_bytes(entry: TensorEntry, offset: int, count: int) -> torch.Tensor:
    """`count` bytes of a tensor from `offset` on, as a uint8 tensor. Raises `BadFileError`."""
    import torch

    buffer = torch.empty(count, dtype=torch.uint8)
    try:
        _fill(memoryview(buffer.numpy()), entry, offset)  # type: ignore[arg-type]  # numpy's stubs
    except OSError as error:
        raise BadFileError(f"{entry.file.name} cannot be read ({error.strerror})", entry.file) from None
    return buffer


def _fill(view: memoryview, entry: TensorEntry, offset: int) -> None:
    count = len(view)
    with entry.file.open("rb", buffering=0) as stream:
        stream.seek(entry.start + offset)
        done = 0
        while done < count:
            got = stream.readinto(view[done : done + READ_BYTES])
            if not got:
                raise BadFileError(f"{entry.file.name} ended early", entry.file)
            done += got


def read_header(file: Path) -> dict[str, TensorEntry]:
    """The place of each tensor in a safetensors file. Raises `BadFileError` if the file is damaged or cut off."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise BadFileError(f"{file.name} is not a safetensors file, or was cut off in its header")
        text = stream.read(length)
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        raise BadFileError(f"{file.name} is not a safetensors file: its header is not JSON") from None
    if not isinstance(header, dict):
        raise BadFileError(f"{file.name} is not a safetensors file: its header is not a mapping")
    header.pop("__metadata__", None)
    entries = {name: _entry(file, name, fields, 8 + length) for name, fields in header.items()}
    _check_extent(file, entries, 8 + length, size)
    return dict(sorted(entries.items(), key=lambda item: item[1].start))


def _entry(file: Path, name: str, fields: Any, data_start: int) -> TensorEntry:
    if not isinstance(fields, dict):
        raise BadFileError(f"{file.name}: the header entry of {name} is malformed")
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if dtype not in DTYPES:
        raise BadFileError(f"{file.name}: {name} has the dtype {dtype!r}, which cannot be merged")
    if not (_are_sizes(shape) and _are_sizes(offsets) and len(offsets) == 2 and offsets[0] <= offsets[1]):
        raise BadFileError(f"{file.name}: the header gives {name} an impossible shape or place")
    entry = TensorEntry(
        file=file, dtype=dtype, shape=tuple(shape), start=data_start + offsets[0], n_bytes=offsets[1] - offsets[0]
    )
    if entry.n_bytes != entry.numel * entry.torch_dtype.itemsize:
        raise BadFileError(f"{file.name}: the size of {name} does not fit its shape")
    return entry


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)


def _check_extent(file: Path, entries: Mapping[str, TensorEntry], data_start: int, size: int) -> None:
    """Check that the tensors fill the file, one after the other."""
    end = data_start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].n_bytes)):
        if entry.start != end:
            raise BadFileError(f"{file.name}: {name} does not begin where the tensor before it ends")
        end += entry.n_bytes
    if end > size:
        raise BadFileError(f"{file.name} was cut off: it has {size:,} bytes, but its header describes {end:,}")
    if end < size:
        raise BadFileError(f"{file.name} has {size - end:,} bytes more than its header describes")


def open_base(config: BaseConfig, setting: str = "base") -> tuple[Path, Checkpoint]:
    """The local folder of the base, and its tensors; a hub model is downloaded if need be.

    Raises `UserError` for a model that is random, quantized on disk, pickled, incomplete or damaged.
    """
    if config.weights == "random":
        rule = "has random weights, which are not in any file"
        raise UserError.of(setting, config.model, rule, "Train on a published model to release one.")
    folder = Path(source.model_source(config))
    if not folder.exists():
        folder = _fetch(config, setting)
    try:
        checkpoint = Checkpoint.open(weight_files(folder))
    except (BadFileError, OSError) as error:
        raise UserError.of(setting, config.model, f"its weights cannot be read ({error})", FETCH_REMEDY) from None
    _check_unquantized(config, folder, setting)
    return folder, checkpoint


def _fetch(config: BaseConfig, setting: str) -> Path:
    """The local folder of a hub model, downloaded if need be: of several sets of weights only the one that is used."""
    folder = hub.fetch_model_folder(config.model, config.revision, (SINGLE_FILE, *SIDE_PATTERNS), setting)
    parts = tuple(sorted(source.weight_names(folder)))
    if parts:
        hub.fetch_model_folder(config.model, config.revision, parts, setting)
    return folder


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, as transformers chooses them, checked. Raises `BadFileError`."""
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    if (folder / INDEX_FILE).is_file():
        return _indexed_files(folder)
    if any(folder.glob("*.bin")):
        raise BadFileError("they are pickle files (.bin), which can run code when opened; convert them to safetensors")
    raise BadFileError(f"the folder has no {SINGLE_FILE}")


def _indexed_files(folder: Path) -> list[Path]:
    """The files that the index names, each checked to be in the folder and to hold what it should."""
    try:
        places = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise BadFileError(f"{INDEX_FILE} is not an index of tensors") from None
    check_index(places)
    files = [folder / name for name in sorted(set(places.values()))]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise BadFileError(f"the index names files that are missing: {', '.join(missing[:3])}")
    held = {file.name: read_header(file).keys() for file in files}
    astray = [f"{tensor} ({file})" for tensor, file in places.items() if tensor not in held[file]]
    if astray:
        raise BadFileError(f"tensors are not in the files that the index names: {', '.join(astray[:3])}")
    return files


def check_index(places: Any) -> None:
    """Check that an index maps names of tensors to names of files, never to paths. Raises `BadFileError`."""
    if not isinstance(places, dict) or not places:
        raise BadFileError(f"{INDEX_FILE} is not an index of tensors")
    for name in places.values():
        if not isinstance(name, str) or not _is_plain_name(name):
            raise BadFileError(f"the index names {name!r}, which is not a safetensors file in its folder")


def _is_plain_name(name: str) -> bool:
    separators = {"/", "\\", "\0", os.sep}
    return name.endswith(".safetensors") and not name.startswith(".") and not separators & set(name)


def _check_unquantized(config: BaseConfig, folder: Path, setting: str) -> None:
    """Check that the weights on disk are the original ones. Raises `UserError`."""
    content = read_json(folder / "config.json", setting, config.model)
    if "quantization_config" in content:
        rule = "is quantized on disk, and its original weights cannot be recovered"
        raise UserError.of(setting, config.model, rule, "Give the 16-bit model that it was made from.")


def read_json(file: Path, setting: str, value: object) -> dict[str, Any]:
    """The mapping in a JSON file. Raises `UserError` for `setting`."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError.of(setting, value, f"has no {file.name}", "Give a complete folder.") from None
    except RecursionError:
        raise UserError.of(setting, value, f"its {file.name} is nested too deeply", FETCH_REMEDY) from None
    except (OSError, ValueError) as error:
        raise UserError.of(setting, value, f"its {file.name} cannot be read ({error})", FETCH_REMEDY) from None
    if not isinstance(content, dict):
        raise UserError([Fault(setting, value, f"its {file.name} is not a mapping", FETCH_REMEDY)])
    return content
