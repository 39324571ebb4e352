"""Reads any supported source into records: a mapping from column to value, and its place in the source.

Files are read into memory, without the disk cache of `datasets`: an edited file never gives its old content. Only hub
data sets go through that cache, which is keyed by the data set's commit.
"""

from __future__ import annotations

import csv
import difflib
import io
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_kit import demo
from qlora_kit.data import conll
from qlora_kit.data.fields import Fields
from qlora_kit.data.problems import Problems
from qlora_kit.data.values import BadValueError
from qlora_kit.errors import UserError, named

HUB_TIMEOUT_S = 5.0
HUB_NAME = re.compile(r"(?P<repo>[\w.-]+(/[\w.-]+)?)(:(?P<config>[\w.-]+))?")
TRAIN_WORDS = ("train", "training")
HELD_OUT_WORDS = (("validation", "valid", "val", "dev", "eval"), ("test",))  # the first group that occurs wins
FORMS = "'demo', a file (jsonl json csv tsv parquet txt conll), a folder of them, or a hub data set (owner/name)"
WORDS, TAGS = "tokens", "tags"  # the columns that a CoNLL file gives


@dataclass(frozen=True)
class Record:
    """One record of a source: its file, its place ("train.jsonl:17") and its values by column."""

    file: str
    origin: str
    values: Mapping[str, Any]

    def with_value(self, column: str, value: object) -> Record:
        """The same record with another value in `column`."""
        if isinstance(self.values, Fields):
            return Record(self.file, self.origin, self.values.with_value(column, value))
        return Record(self.file, self.origin, {**self.values, column: value})


def read_records(source: str, setting: str = "data") -> list[Record]:
    """Every record of `source`: 'demo', a file, a folder or a hub data set.

    With the setting "eval_data" the held-out part of a source is read, otherwise its training part: of the demo,
    of a folder whose files are named after their split (train.jsonl, test.jsonl), and of a hub data set.

    Raises `UserError` if there is no such source, if it is empty, and if lines cannot be read (each with file and
    line).
    """
    held_out = setting == "eval_data"
    path = Path(source).expanduser()
    if source == "demo":
        path = demo.eval_file() if held_out else demo.train_file()
    problems = Problems(setting, source, "Fix or remove it.")
    if path.is_dir():
        files = _files_of_folder(path, source, setting, held_out)
        records = [record for file in files for record in _read_file(file, problems)]
    elif path.is_file():
        if path.suffix.lower() not in READERS and not _is_conll(path):
            raise UserError.of(
                setting, source, f"is not a kind of file that can be read ({_suffixes()})", "Convert the file."
            )
        records = list(_read_file(path, problems))
    else:
        records = _read_hub(source, setting, held_out)
    problems.raise_if_any()
    if not records:
        raise UserError.of(setting, source, "has no examples", "Give data with at least one example.")
    return records


def _suffixes() -> str:
    return " ".join(suffix.removeprefix(".") for suffix in READERS)


# ---------------------------------------------------------------------------------------------------- folders


def _files_of_folder(folder: Path, source: str, setting: str, held_out: bool) -> list[Path]:
    files = sorted(path for path in folder.rglob("*") if _is_data_file(path, folder))
    if not files:
        raise UserError.of(setting, source, f"is a folder without data files ({_suffixes()})", "Give another folder.")
    words = {file: _words(file.relative_to(folder)) for file in files}
    groups = [[file for file in files if words[file] & set(group)] for group in HELD_OUT_WORDS]
    if held_out:
        return next((group for group in groups if group), files)
    train = [file for file in files if words[file] & set(TRAIN_WORDS)]
    return train or [file for file in files if file not in groups[0] + groups[1]] or files


def files_left_out(source: str) -> list[str]:
    """The data files of a folder that nothing reads: those not named after a split, beside others named train."""
    folder = Path(source)
    if not folder.is_dir():
        return []
    files = sorted(path for path in folder.rglob("*") if _is_data_file(path, folder))
    words = {file: _words(file.relative_to(folder)) for file in files}
    has_train = any(words[file] & set(TRAIN_WORDS) for file in files)
    known = {*TRAIN_WORDS, *(word for group in HELD_OUT_WORDS for word in group)}
    return [str(file.relative_to(folder)) for file in files if has_train and not words[file] & known]


def _is_data_file(path: Path, folder: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
    return path.is_file() and path.suffix.lower() in READERS and not hidden


def _words(path: Path) -> set[str]:
    """The words in a path: "data/test-00000-of-00001.parquet" has data, test, of and the numbers."""
    return set(re.split(r"[^a-z]+", str(path.with_suffix("")).lower()))


# ------------------------------------------------------------------------------------------------------ files


def _read_file(path: Path, problems: Problems) -> Iterator[Record]:
    try:
        data = path.read_bytes()
    except OSError as error:
        problems.add(str(path), f"cannot be read ({error.strerror})")
        return
    suffix = path.suffix.lower()
    reader = READERS.get(suffix, _read_conll)
    if suffix in MAYBE_CONLL and conll.looks_like_conll(data.decode("utf-8-sig", errors="replace")):
        reader = _read_conll
    yield from reader(path, data, problems)


def _is_conll(path: Path) -> bool:
    """Whether the content of a file, whatever it is called, is words with tags."""
    try:
        with path.open("rb") as file:
            beginning = file.read(CONLL_BEGINNING)
    except OSError:
        return False
    return b"\0" not in beginning and conll.looks_like_conll(beginning.decode("utf-8-sig", errors="replace"))


def _decode(path: Path, data: bytes, problems: Problems) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        problems.add(f"{path}:{line}", f"is not UTF-8 (byte 0x{data[error.start]:02x})")
        return ""


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """The lines that are not blank, numbered from 1; splits at newlines only, never at other Unicode separators."""
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, line.removesuffix("\r")


def _object_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise BadValueError(f"names {twice!r} more than once in one object")
    return values


JSON = json.JSONDecoder(object_pairs_hook=_object_once)


def _read_jsonl(path: Path, data: bytes, problems: Problems) -> Iterator[Record]:
    for number, line in _lines(_decode(path, data, problems)):
        origin = f"{path}:{number}"
        try:
            values = JSON.decode(line)
        except BadValueError as error:
            problems.add(origin, str(error))
            continue
        except (ValueError, RecursionError) as error:
            problems.add(origin, f"is not JSON ({error})")
            continue
        if isinstance(values, dict):
            yield Record(str(path), origin, values)
        else:
            problems.add(origin, f"must be a JSON object {{column: value}}, not {type(values).__name__}")


def _read_json(path: Path, data: bytes, problems: Problems) -> Iterator[Record]:
    """A list of objects, or an object that holds one such list; a file with one object a line is read as JSON lines."""
    text = _decode(path, data, problems)
    if not text.strip():
        return
    try:
        content = JSON.decode(text)
    except BadValueError as error:
        problems.add(str(path), str(error))
        return
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text.lstrip().startswith("{"):
            yield from _read_jsonl(path, data, problems)
        else:
            problems.add(f"{path}:{error.lineno}", f"is not JSON ({error})")
        return
    except (ValueError, RecursionError) as error:
        problems.add(str(path), f"is not JSON ({error})")
        return
    items = _list_in(content)
    if items is None:
        problems.add(str(path), "must be a list of objects, or an object that holds one such list")
        return
    for index, values in enumerate(items, start=1):
        origin = f"{path}: record {index}"
        if isinstance(values, dict):
            yield Record(str(path), origin, values)
        else:
            problems.add(origin, f"must be a JSON object {{column: value}}, not {type(values).__name__}")


def _list_in(content: object) -> list[object] | None:
    if isinstance(content, list):
        return content
    if isinstance(content, dict):
        lists = [value for value in content.values() if isinstance(value, list)]
        if len(lists) == 1:
            return lists[0]
    return None


@contextmanager
def _long_csv_fields() -> Iterator[None]:
    """The csv module refuses fields above 128 KiB by a process-wide limit; lift it while a file is read."""
    limit = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def _read_separated(path: Path, data: bytes, problems: Problems, delimiter: str) -> Iterator[Record]:
    text = _decode(path, data, problems)
    with _long_csv_fields():
        numbered_rows = list(_separated_rows(path, text, problems, delimiter))
    if not numbered_rows:
        return
    (header_line, header), *numbered_rows = numbered_rows
    if len(set(header)) != len(header):
        problems.add(f"{path}:{header_line}", f"names a column twice ({', '.join(header)})")
        return
    for line, row in numbered_rows:
        if len(row) == len(header):
            yield Record(str(path), f"{path}:{line}", dict(zip(header, row, strict=True)))
        else:
            problems.add(f"{path}:{line}", f"has {len(row)} fields, but the header names {len(header)}")


def _separated_rows(path: Path, text: str, problems: Problems, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """The rows that are not blank, each with the number of the line on which it begins."""
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    while True:
        line = rows.line_num + 1
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            problems.add(f"{path}:{line}", f"is not well-formed ({error}); a quote must close before the separator")
            continue
        if row:
            yield line, row


def _read_csv(path: Path, data: bytes, problems: Problems) -> Iterator[Record]:
    return _read_separated(path, data, problems, ",")


def _read_tsv(path: Path, data: bytes, problems: Problems) -> Iterator[Record]:
    return _read_separated(path, data, problems, "\t")


def _read_parquet(path: Path, data: bytes, problems: Problems) -> Iterator[Record]:
    import pyarrow  # here, since it is slow to import and most runs read no parquet
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(pyarrow.BufferReader(data)).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        problems.add(str(path), f"is not a readable parquet file ({error})")
        return
    for number, values in enumerate(rows, start=1):
        yield Record(str(path), f"{path}: row {number}", values)


def _read_txt(path: Path, data: bytes, problems: Problems) -> Iterator[Record]:
    """One line, one example, as `datasets` reads text files."""
    for number, line in _lines(_decode(path, data, problems)):
        yield Record(str(path), f"{path}:{number}", {"text": line})


def _read_conll(path: Path, data: bytes, problems: Problems) -> Iterator[Record]:
    """A sentence is a record: its words, and their tags where the file has some."""
    for sentence in conll.read_sentences(_decode(path, data, problems), str(path), problems):
        tags = {TAGS: sentence.tags} if sentence.tags else {}
        others = {f"column {number}": True for number in range(2, sentence.width)}  # reported as unread
        yield Record(str(path), f"{path}:{sentence.line}", {WORDS: sentence.words, **tags, **others})


READERS: dict[str, Callable[[Path, bytes, Problems], Iterator[Record]]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
    ".txt": _read_txt,
    **dict.fromkeys(conll.SUFFIXES, _read_conll),
}
MAYBE_CONLL = (".txt", ".tsv")  # by their content
CONLL_BEGINNING = 1 << 16  # bytes by which a file of another name is recognised


# -------------------------------------------------------------------------------------------------------- hub


def _read_hub(source: str, setting: str, held_out: bool) -> list[Record]:
    match = HUB_NAME.fullmatch(source)
    if match is None or source.startswith(".") or Path(match["repo"]).suffix.lower() in READERS:
        raise UserError.of(setting, source, "is no such file or folder", _near(source))
    repo, config = match["repo"], match["config"]
    _check_reachable(repo, source, setting)

    import datasets  # here, since it is slow to import and most runs read files
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # that of the HTTP client it uses

    try:
        splits = datasets.get_dataset_split_names(repo, config)
        split = _choose_split(splits, source, setting, held_out)
        rows = datasets.load_dataset(repo, config, split=split).to_list()
    except (OSError, ValueError, HTTPError, datasets.exceptions.DatasetsError) as error:
        remedy = f"Download it and give the folder, or name one of its configurations: {repo}:NAME."
        raise UserError.of(setting, source, f"cannot be loaded from the hub ({error})", remedy) from error
    return [Record(source, f"{source}: {split} row {number}", row) for number, row in enumerate(rows, start=1)]


def _check_reachable(repo: str, source: str, setting: str) -> None:
    """Ask the hub once, with a short timeout: `load_dataset` itself retries for half a minute."""
    from huggingface_hub import HfApi
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import (  # type: ignore[attr-defined]
        HfHubHTTPError,
        HFValidationError,
        HTTPError,
    )

    if HF_HUB_OFFLINE:
        return  # the user wants the cached copy, which `load_dataset` then finds at once or not at all
    try:
        HfApi().dataset_info(repo, timeout=HUB_TIMEOUT_S)
    except (HfHubHTTPError, HFValidationError) as error:
        reason = str(error).splitlines()[0]
        rule = f"is neither a file nor a folder, and the hub gives you no such data set ({reason})"
        raise UserError.of(setting, source, rule, _near(source)) from error
    except (HTTPError, OSError) as error:
        rule = f"is neither a file nor a folder, and the hub cannot be reached ({error})"
        remedy = f"{_near(source)} To use a cached hub data set, set HF_HUB_OFFLINE=1 in the environment."
        raise UserError.of(setting, source, rule, remedy) from error


def _choose_split(splits: list[str], source: str, setting: str, held_out: bool) -> str:
    groups = HELD_OUT_WORDS if held_out else (TRAIN_WORDS,)
    for group in groups:
        for split in splits:
            if split in group:
                return split
    if len(splits) == 1 and not held_out:
        return splits[0]
    wanted = "held-out" if held_out else "training"
    remedy = f"Use {named('eval_fraction')}, or download" if held_out else "Download"
    remedy += " it and give the file."
    raise UserError.of(setting, source, f"has no {wanted} split (it has {', '.join(splits)})", remedy)


def _near(source: str) -> str:
    """The remedy for a source that does not exist: the file with the nearest name, or all forms of a source."""
    path = Path(source).expanduser()
    names = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=1)
    return f"Did you mean {path.parent / near[0]}?" if near else f"Give {FORMS}."
