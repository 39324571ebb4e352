"""Where `qlora-kit generate` takes its prompts from, and how it puts out their answers."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import Any

from rich.console import Console

from qlora_kit import data
from qlora_kit.config.settings import RunConfig
from qlora_kit.errors import UserError, as_flag, named, said_of
from qlora_kit.evaluate.generate import Prompt, answer_in_order, encode_prompts, stream, typed_prompt
from qlora_kit.runs import messages
from qlora_kit.runs.finished import Opened
from qlora_kit.runs.inputs import DATA
from qlora_kit.system.progress import counted, say_line
from qlora_kit.tasks.decoding import Sampling, WrittenAnswer

READY = "One prompt a line, each answered by itself; Ctrl-D ends."


@dataclass(frozen=True, kw_only=True)
class Session:
    """A loaded model, and how it is to answer."""

    model: Any
    opened: Opened
    sampling: Sampling
    as_json: bool
    say: Console


def prompts_of_file(config: RunConfig, opened: Opened, raw: bool, say: Console) -> list[Prompt]:
    """The prompts of the data that `config` names; what is not read of it is said. Raises `UserError`."""
    source, columns = config.data.data, config.data.columns
    with said_of("data", instead_of="eval_data"):  # the held-out part, where a source has several
        rows = data.read_rows(source, columns, "eval_data")
        examples = data.prompts_from(rows, columns, source, "eval_data")
    for line in messages.unread_lines({DATA: data.unread_fields(rows)}):
        say_line(say, line)
    return encode_prompts(examples, opened, raw, "data")


def asked_prompts(texts: Sequence[str], opened: Opened, raw: bool, say: Console) -> Iterator[Prompt]:
    """The prompts of the flags, or of standard input as its lines come. Raises `UserError`."""
    if texts:
        return iter(encode_prompts([typed_prompt(text) for text in texts], opened, raw, "prompt"))
    if sys.stdin.isatty():
        return _typed_prompts(opened, raw, say)
    piped = _piped_prompts(opened, raw)
    first = next(piped, None)  # before the model is loaded
    if first is None:
        remedy = f"Give {named('prompt', 'TEXT')} or {named('data', 'FILE')}, or pipe in one prompt a line."
        raise UserError.of("prompt", "standard input", "holds none", remedy)
    return chain([first], piped)


def _piped_prompts(opened: Opened, raw: bool) -> Iterator[Prompt]:
    try:
        for line in sys.stdin:
            if line.strip():
                yield from encode_prompts([typed_prompt(line.rstrip("\r\n"))], opened, raw, "prompt")
    except UnicodeDecodeError:
        raise UserError.of("prompt", "a line of standard input", "is not UTF-8", "Convert it.") from None


def _typed_prompts(opened: Opened, raw: bool, say: Console) -> Iterator[Prompt]:
    """What is typed at the terminal; a prompt that cannot be answered is said and asked for again."""
    say_line(say, READY)
    while (line := _typed_line()) is not None:
        try:
            if line.strip():
                yield from encode_prompts([typed_prompt(line)], opened, raw, "prompt")
        except UserError as error:
            say_line(say, f"error: {error.text(as_flag)}")


def _typed_line() -> str | None:
    """A line of the terminal, None at its end; the mark before it goes to standard error where output is kept."""
    import readline  # noqa: F401  # gives `input` its arrow keys and its memory

    if not sys.stdout.isatty():
        sys.stderr.write("> ")
        sys.stderr.flush()
    try:
        return input("> " if sys.stdout.isatty() else "")
    except (EOFError, KeyboardInterrupt) as end:
        sys.stderr.write("\n")  # the cursor stands behind the mark
        if isinstance(end, KeyboardInterrupt):
            raise
        return None


def answer_one(session: Session, prompt: Prompt) -> None:
    """Answer one prompt on standard output: its text as it comes, or one line of JSON."""
    tokenizer = session.opened.tokenizer
    if session.as_json:
        answer = stream(session.model, tokenizer, prompt, session.sampling, lambda piece: None)
        _write(_json_line(prompt, answer))
        return
    try:
        answer = stream(session.model, tokenizer, prompt, session.sampling, _write)
    finally:
        _write("\n")
    if answer.is_cut:
        most, positions = session.sampling.max_new_tokens, session.opened.positions
        is_full = positions is not None and len(prompt.input_ids) + most > positions
        end = f"where the model's {positions} positions end" if is_full else f"after {most} tokens, --max-new-tokens"
        say_line(session.say, f"(cut off {end})")


def answer_file(session: Session, prompts: Sequence[Prompt], batch_size: int) -> None:
    """One line of JSON for each prompt, in their order."""
    cut = 0
    shows_lines = sys.stdout.isatty() and session.say.is_terminal  # a bar would be among them
    with nullcontext(lambda _: None) if shows_lines else counted(session.say, "answered", len(prompts)) as tick:
        answers = answer_in_order(session.model, session.opened.tokenizer, prompts, session.sampling, batch_size)
        for prompt, answer in zip(prompts, answers, strict=True):
            _write(_json_line(prompt, answer))
            cut += answer.is_cut
            tick(1)
    if cut:
        ends = f"after {session.sampling.max_new_tokens} tokens, --max-new-tokens, or where the model's positions end"
        say_line(session.say, f"{cut} of {len(prompts)} answers were cut off {ends}")


def _json_line(prompt: Prompt, answer: WrittenAnswer) -> str:
    return json.dumps({"prompt": prompt.text, "generated": answer.text}, ensure_ascii=False) + "\n"


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
