"""`qlora-kit preview`: what the model will be fed, token by token, and an audit of the whole set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qlora_kit.cli.flags import Command
from qlora_kit.config import rules
from qlora_kit.config.settings import RunConfig
from qlora_kit.errors import Fault, UserError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text
    from transformers import PreTrainedTokenizerBase

    from qlora_kit.data import AuditReport, EncodedSet, Example, Record
    from qlora_kit.data.encode import Encoded
    from qlora_kit.tasks.registry import Task


@dataclass(frozen=True, kw_only=True)
class PreviewFlags(rules.Checked):
    """The flags of this command alone."""

    rows: tuple[int, ...] = rules.setting((1, 2, 3), "numbers of the examples to show", metavar="N,N,…")


VISIBLE = {"\n": "\\n", "\t": "\\t", "\r": "\\r", " ": "·"}


def preview(config: RunConfig, rows: Sequence[int] = (1, 2, 3)) -> None:
    """Print the examples numbered `rows` (from 1) token by token, then the audit of all the data.

    Raises `UserError` for "--rows" outside the data, and for whatever is wrong with the data or the tokenizer.
    """
    from rich.console import Console

    from qlora_kit.data import encode_set, prepare_tokenizer, read_rows, resolve_seq_len
    from qlora_kit.model.source import load_model_config, max_positions
    from qlora_kit.model.task_models import GENERATION
    from qlora_kit.model.tokenizer import load_tokenizer
    from qlora_kit.tasks import registry
    from qlora_kit.tasks.inputs import DATA, HELD_OUT, source_of, with_columns

    console = Console(highlight=False)
    architecture = load_model_config(config.base)
    records = read_rows(config.data.data, config.data.columns)
    task = registry.choose(config.base, records, config.data.columns, architecture)
    config = with_columns(config, task, records)
    tokenizer = prepare_tokenizer(load_tokenizer(config.base), task.name == GENERATION)
    seq_len = resolve_seq_len(config.data.seq_len, tokenizer, max_positions(architecture))
    source = source_of(config, records)
    examples = task.reader.read(source, config.base)
    _check_rows(rows, len(examples))
    _say_unread(console, DATA, records)
    if task.name != GENERATION:
        _preview_answers(console, config, task, examples, rows, tokenizer, seq_len)
        return
    _print_examples(console, examples, rows, tokenizer, seq_len, config.data.train_on)
    sets = {"--data": examples}
    if config.data.eval_data is not None:
        held_out = read_rows(config.data.eval_data, config.data.columns, "--eval-data")
        of_eval = source_of(config, held_out, config.data.eval_data, "--eval-data")
        sets["--eval-data"] = task.reader.read(of_eval, config.base)
        _say_unread(console, HELD_OUT, held_out)
    for setting, members in sets.items():
        encoded = encode_set(members, tokenizer, seq_len=seq_len, train_on=config.data.train_on, setting=setting)
        console.print(_audit_table(setting, encoded, seq_len, config.data.pack))


def _preview_answers(
    console: Console,
    config: RunConfig,
    task: Task,
    examples: list[Any],
    rows: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    seq_len: int,
) -> None:
    """The same of a task whose answers are no tokens, such as labels."""
    from rich.text import Text

    from qlora_kit.data import read_rows
    from qlora_kit.tasks.inputs import HELD_OUT, source_of

    assert task.answering is not None, "only text generation has none"
    console.print(f"{task.name}: the tokens that the model reads, and the answer that it learns.\n")
    for row in rows:
        if row <= len(examples):
            encoded_rows = task.answering.encode([examples[row - 1]], tokenizer, seq_len, config.base).rows
            for number, encoded in enumerate(encoded_rows, start=1):
                cut = f", cut from {encoded.full_tokens}" if encoded.truncated else ""
                window = f", window {number} of {len(encoded_rows)}" if len(encoded_rows) > 1 else ""
                title = f"Example {row} ({encoded.origin}): {len(encoded.input_ids)} tokens{cut}{window}"
                console.print(Text(title, style="bold"), soft_wrap=True)
                text = Text("".join(f"{_shown(token, tokenizer)}|" for token in encoded.input_ids), style="dim")
                if task.model.decodes:
                    answer = "".join(f"«{_shown(token, tokenizer)}»" for token in encoded.labels)
                else:
                    answer = f"«{task.reader.answer(examples[row - 1], encoded)}»"
                console.print(text.append(f" {answer}", style="not dim bold green"))
                console.print()
    sets = {"--data": examples}
    if config.data.held_out_source is not None:
        held_out = read_rows(config.data.held_out_source, config.data.columns, "--eval-data")
        of_eval = source_of(config, held_out, config.data.held_out_source, "--eval-data")
        sets["--eval-data"] = task.reader.read(of_eval, config.base)
        _say_unread(console, HELD_OUT, held_out)
    for setting, members in sets.items():
        encoded = task.answering.encode(members, tokenizer, seq_len, config.base)
        report, table = encoded.report, _table(setting)
        table.add_row("examples", str(report.examples))
        for name, value in getattr(encoded, "length_lines", _length_lines(report, seq_len)):
            table.add_row(name, value)
        table.add_row("empty texts", str(report.empty))
        table.add_row("duplicates", str(report.duplicates))
        for name, value in [*task.reader.audit_rows(encoded), *task.reader.audit(members, examples)]:
            table.add_row(Text(name), Text(value))
        console.print(table)
    task.reader.resolve(config.base, examples, "--data")  # after all that can be seen: what training would refuse


def _say_unread(console: Console, what: str, records: Sequence[Record]) -> None:
    """Say which fields of `records` were not read, now that their examples are."""
    from qlora_kit.data import unread_fields
    from qlora_kit.runs.messages import unread_lines
    from qlora_kit.system.progress import say_line

    for line in unread_lines({what: unread_fields(records)}):
        say_line(console, f"{line}\n")


def _length_lines(report: AuditReport, seq_len: int) -> list[tuple[str, str]]:
    """How long the rows are; an encoded set whose rows have several lengths says it itself (`length_lines`)."""
    lengths = (report.length_min, report.length_median, report.length_p95, report.length_max)
    return [
        ("tokens: min / median / p95 / max", " / ".join(f"{length:g}" for length in lengths)),
        (f"truncated to {seq_len} tokens", str(report.truncated)),
    ]


def _check_rows(rows: Sequence[int], count: int) -> None:
    wanted = [row for row in rows if not 1 <= row <= count] if tuple(rows) != (1, 2, 3) else []
    if wanted:
        rule = f"must be numbers from 1 to {count}, as many examples as there are"
        raise UserError([Fault("--rows", row, rule, "For example --rows 1.") for row in wanted])


def _print_examples(
    console: Console,
    examples: Sequence[Example],
    rows: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    seq_len: int,
    train_on: str,
) -> None:
    from qlora_kit.data import encode_example

    console.print("Supervised tokens stand in «angle quotes», the others between bars.\n")
    for row in rows:
        if row <= len(examples):
            encoded = encode_example(examples[row - 1], tokenizer, seq_len, train_on)
            console.print(_title(row, encoded), soft_wrap=True)
            console.print(tokens_text(encoded, tokenizer), soft_wrap=True)
            console.print()


def _title(row: int, encoded: Encoded) -> Text:
    from rich.text import Text

    tokens, supervised = len(encoded.input_ids), sum(encoded.supervised)
    cut = f", cut from {encoded.full_tokens}" if encoded.truncated else ""
    return Text(f"Example {row} ({encoded.origin}): {tokens} tokens{cut}, {supervised} supervised", style="bold")


def tokens_text(encoded: Encoded, tokenizer: PreTrainedTokenizerBase) -> Text:
    """The tokens of an example: supervised ones green and in «», the others dim and ended by |, white space visible."""
    from rich.text import Text

    text = Text()
    for token, supervised in zip(encoded.input_ids, encoded.supervised, strict=True):
        shown = _shown(token, tokenizer)
        text.append(f"«{shown}»" if supervised else f"{shown}|", style="bold green" if supervised else "dim")
    return text


def _shown(token: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """A token as text; one that is only part of a character is shown as the tokenizer writes it."""
    piece = str(tokenizer.convert_ids_to_tokens(token))
    text = tokenizer.decode([token])
    if "\N{LOWER ONE EIGHTH BLOCK}" in piece:  # SentencePiece's space, which decoding drops at the start of a text
        text = piece.replace("\N{LOWER ONE EIGHTH BLOCK}", " ")
    elif "\N{REPLACEMENT CHARACTER}" in text:
        text = piece
    return "".join(VISIBLE.get(character, character) for character in text)


def _audit_table(setting: str, encoded: EncodedSet, seq_len: int, packed: bool) -> Table:
    from qlora_kit.data import pack

    table = _table(setting)
    for name, value in _audit_lines(encoded.report, seq_len):
        table.add_row(name, value)
    if packed:
        rows = pack(encoded, seq_len)
        table.add_row("packed rows", f"{len(rows)} ({rows.fill:.1%} full)")
    return table


def _table(setting: str) -> Table:
    from rich.table import Table

    table = Table(title=f"Audit of {setting}", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    return table


def _audit_lines(report: AuditReport, seq_len: int) -> list[tuple[str, str]]:
    share = report.supervised_tokens / report.input_tokens
    return [
        ("examples", f"{report.examples}"),
        *_length_lines(report, seq_len),
        ("empty answers", f"{report.empty}"),
        ("nothing supervised (dropped)", f"{report.unsupervised}"),
        ("duplicates", f"{report.duplicates}"),
        ("supervised tokens", f"{report.supervised_tokens} of {report.input_tokens} ({share:.1%})"),
    ]


COMMAND = Command(
    run=preview,
    example="qlora-kit preview --model Qwen/Qwen3-0.6B --data chat.jsonl --rows 1,5,17",
    flags=PreviewFlags,
    common=(
        *("model", "revision", "tokenizer", "trust_remote_code", "task", "labels", "multi_label", "source_prefix"),
        *("data", "eval_data", "eval_fraction", "columns", "train_on", "seq_len", "pack"),
    ),
)
