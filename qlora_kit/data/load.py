"""From a `data` setting to examples, and from those to a held-out share."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import TypeVar

from qlora_kit.data.columns import Example, examples_from, prompts_from
from qlora_kit.data.fields import Fields, Reads
from qlora_kit.data.headerless import with_all_rows
from qlora_kit.data.read import Record, read_records
from qlora_kit.errors import UserError


def read_examples(source: str, columns: Mapping[str, str], setting: str = "data") -> list[Example]:
    """Every example of `source` ('demo', a file, a folder or a hub data set), in the order of the source.

    `columns` maps text, prompt, completion, messages or system to a column; empty: recognised by their names.
    Errors name `setting`; "eval_data" also selects the held-out part of a source that has one.

    Raises `UserError` for a source that is missing, empty, unreadable (file and line) or in no known shape.
    """
    return examples_from(read_rows(source, columns, setting), columns, source, setting)


def read_rows(source: str, columns: Mapping[str, str], setting: str = "data") -> list[Record]:
    """Every record of `source`; columns of a csv or tsv file without a header are named by position, or text and label.

    Which fields a reader looks up is recorded: see `unread_fields`. Raises `UserError` as `read_records` does.
    """
    reads: defaultdict[str, Reads] = defaultdict(dict)
    records = with_all_rows(read_records(source, setting), columns)
    return [Record(record.file, record.origin, Fields(record.values, reads[record.file])) for record in records]


def unread_fields(records: Sequence[Record]) -> dict[str, int]:
    """The fields of `records` that no reader looked up, each with the number of records where it is not empty.

    The most frequent first. Call it after the examples are read.
    """
    counts = Counter(name for record in records if isinstance(record.values, Fields) for name in record.values.unread())
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def read_prompts(source: str, columns: Mapping[str, str], setting: str = "data") -> list[Example]:
    """Every prompt of `source` without its answer, which may be missing; otherwise as `read_examples`."""
    return prompts_from(read_rows(source, columns, setting), columns, source, setting)


T = TypeVar("T")


def split_examples(examples: Sequence[T], fraction: float, seed: int) -> tuple[list[T], list[T]]:
    """The examples to train on and the share `fraction` of them to hold out, at least one; both keep their order.

    Drawn by `seed` alone, so the same data gives the same split. Raises `UserError` if nothing is left to train on.
    """
    if not fraction:
        return list(examples), []
    held_out_count = max(1, round(fraction * len(examples)))
    if held_out_count >= len(examples):
        rule = f"leaves none of the {len(examples)} examples to train on"
        raise UserError.of("eval_fraction", fraction, rule, "Give more data or a smaller share.")
    held_out = set(random.Random(seed).sample(range(len(examples)), held_out_count))  # noqa: S311  # not a secret
    kept = [example for index, example in enumerate(examples) if index not in held_out]
    return kept, [examples[index] for index in sorted(held_out)]
