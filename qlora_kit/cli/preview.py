"""`qlora-kit preview`: what the model will be fed, token by token, and an audit of the whole set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qlora_kit.cli.flags import Command
from qlora_kit.config import rules
from qlora_kit.config.settings import RunConfig
from qlora_kit.errors import Fault, UserError, as_flag, named

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text
    from transformers import PreTrainedTokenizerBase

    from qlora_kit.data import Record
    from qlora_kit.tasks.task import Task


@dataclass(frozen=True, kw_only=True)
class PreviewFlags(rules.Checked):
    """The flags of this command alone."""

    rows: tuple[int, ...] = rules.setting((1, 2, 3), "numbers of the examples to show", metavar="N,N,…")


VISIBLE = {"\n": "\\n", "\t": "\\t", "\r": "\\r", " ": "·"}


def preview(config: RunConfig, rows: Sequence[int] = (1, 2, 3)) -> None:
    """Print the examples numbered `rows` (from 1) token by token, then the audit of all the data.

    Raises `UserError` for `rows` outside the data, and for whatever is wrong with the data or the tokenizer.
    """
    from rich.console import Console

    from qlora_kit.data import pack, read_rows, resolve_seq_len
    from qlora_kit.model.source import load_model_config, max_positions
    from qlora_kit.model.tokenizer import load_tokenizer
    from qlora_kit.runs.inputs import DATA, HELD_OUT, source_of, with_columns
    from qlora_kit.tasks import registry

    console = Console(highlight=False)
    architecture = load_model_config(config.base)
    records = read_rows(config.data.data, config.data.columns)
    task = registry.choose(config.base, records, config.data.columns, architecture)
    config = with_columns(config, task, records)
    tokenizer = task.prepare(load_tokenizer(config.base))
    seq_len = resolve_seq_len(config.data.seq_len, tokenizer, max_positions(architecture))
    examples = task.read(source_of(config, records), config.base)
    _check_rows(rows, len(examples))
    _say_unread(console, DATA, records)
    console.print(f"{task.preview_title}\n")
    for number in rows:
        if number <= len(examples):
            _print_example(console, config, task, number, examples[number - 1], tokenizer, seq_len)
    sets = {"data": examples}
    if config.data.eval_data is not None:
        held_out = read_rows(config.data.eval_data, config.data.columns, "eval_data")
        of_eval = source_of(config, held_out, config.data.eval_data, "eval_data")
        sets["eval_data"] = task.read(of_eval, config.base)
        _say_unread(console, HELD_OUT, held_out)
    for setting, members in sets.items():
        encoded = task.encode_to_show(config, members, tokenizer, seq_len, setting)
        lines = [*task.summary(encoded, seq_len), *task.audit(members, examples)]
        if config.data.pack and "pack" in task.settings:
            packed = pack(encoded, seq_len)
            lines.append(("packed rows", f"{len(packed)} ({packed.fill:.1%} full)"))
        console.print(_audit_table(setting, encoded.report.examples, lines))
    task.resolve(config.base, examples, "data")  # after all that can be seen: what training would refuse


def _print_example(
    console: Console,
    config: RunConfig,
    task: Task,
    number: int,
    example: Any,
    tokenizer: PreTrainedTokenizerBase,
    seq_len: int,
) -> None:
    """The tokens that the model reads of an example, row by row, and what it learns."""
    from rich.text import Text

    rows = task.rows_to_show(config, example, tokenizer, seq_len)
    for place, row in enumerate(rows, start=1):
        window = f", window {place} of {len(rows)}" if len(rows) > 1 else ""
        console.print(Text(_title(task, number, row) + window, style="bold"), soft_wrap=True)
        text = tokens_text(row.input_ids, task.learned_tokens(row), tokenizer)
        learned = task.learned(example, row, lambda token: _shown(token, tokenizer))
        console.print(text.append(f" {learned}" if learned else "", style="bold green"), soft_wrap=True)
        console.print()


def _title(task: Task, number: int, row: Any) -> str:
    cut = f", cut from {row.full_tokens}" if row.truncated else ""
    marks = task.learned_tokens(row)
    supervised = "" if marks is None else f", {sum(marks)} supervised"
    return f"Example {number} ({row.origin}): {len(row.input_ids)} tokens{cut}{supervised}"


def tokens_text(ids: Sequence[int], learned: Sequence[bool] | None, tokenizer: PreTrainedTokenizerBase) -> Text:
    """Tokens: those that are learned green and in «», the others dim and ended by |, white space visible."""
    from rich.text import Text

    text = Text()
    for token, is_learned in zip(ids, learned or [False] * len(ids), strict=True):
        shown = _shown(token, tokenizer)
        text.append(f"«{shown}»" if is_learned else f"{shown}|", style="bold green" if is_learned else "dim")
    return text


def _say_unread(console: Console, what: str, records: Sequence[Record]) -> None:
    """Say which fields of `records` were not read, now that their examples are."""
    from qlora_kit.data import unread_fields
    from qlora_kit.runs.messages import unread_lines
    from qlora_kit.system.progress import say_line

    for line in unread_lines({what: unread_fields(records)}):
        say_line(console, f"{line}\n")


def _check_rows(rows: Sequence[int], count: int) -> None:
    wanted = [row for row in rows if not 1 <= row <= count] if tuple(rows) != (1, 2, 3) else []
    if wanted:
        rule = f"must be numbers from 1 to {count}, as many examples as there are"
        raise UserError([Fault("rows", row, rule, f"For example {named('rows', 1)}.") for row in wanted])


def _shown(token: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """A token as text; one that is only part of a character is shown as the tokenizer writes it."""
    piece = str(tokenizer.convert_ids_to_tokens(token))
    text = tokenizer.decode([token])
    if "\N{LOWER ONE EIGHTH BLOCK}" in piece:  # SentencePiece's space, which decoding drops at the start of a text
        text = piece.replace("\N{LOWER ONE EIGHTH BLOCK}", " ")
    elif "\N{REPLACEMENT CHARACTER}" in text:
        text = piece
    return "".join(VISIBLE.get(character, character) for character in text)


def _audit_table(setting: str, examples: int, lines: Sequence[tuple[str, str]]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"Audit of {as_flag(setting, None)}", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_row("examples", str(examples))
    for name, value in lines:
        table.add_row(Text(name), Text(value))
    return table


COMMAND = Command(
    run=preview,
    example="qlora-kit preview --model Qwen/Qwen3-0.6B --data chat.jsonl --rows 1,5,17",
    flags=PreviewFlags,
    common=(
        *("model", "revision", "tokenizer", "trust_remote_code", "task", "labels", "multi_label", "source_prefix"),
        *("data", "eval_data", "eval_fraction", "columns", "train_on", "seq_len", "pack"),
    ),
)
