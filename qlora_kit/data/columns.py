"""Turns records into examples: recognises the shape of a data set by its columns, or maps the columns as told."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

from qlora_kit.data.not_yet import check_chat, check_pair
from qlora_kit.data.problems import Problems
from qlora_kit.data.read import Record
from qlora_kit.data.values import BadValueError, as_text, is_missing
from qlora_kit.errors import Fault, UserError, named

TARGETS = ("text", "prompt", "completion", "messages", "system")
EXAMPLE = "prompt=NAME,completion=NAME"  # of a mapping
ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "tool": "tool",
}
TEXT_KINDS = ("text", "input_text", "output_text")  # of the parts of a content
ANSWERING = {name for name, role in ROLES.items() if role == "assistant"}


@dataclass(frozen=True)
class Message:
    """One turn of a conversation; the role is system, user, assistant or tool."""

    role: str
    content: str


@dataclass(frozen=True, kw_only=True)
class Example:
    """One normalised example.

    Plain text has only a `completion`. A prompt with its completion has both. A conversation has `messages`;
    its `completion` is then its first answer, and its `prompt` what was said before it.
    `origin` is its place in the source, e.g. "train.jsonl:17".
    """

    prompt: str | None
    completion: str
    messages: tuple[Message, ...] | None
    origin: str


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A layout of examples in columns: required and optional columns, and how to read a record.

    `by_hand` maps parts to the columns that the user named; `learns_all`: all of an example is learned.
    """

    required: tuple[str, ...]
    optional: tuple[str, ...]
    read: Callable[[Shape, Record], Iterator[Example]]
    by_hand: Mapping[str, str] = field(default_factory=dict)
    learns_all: bool = False

    def column(self, part: str) -> str:
        """The column that holds this part of an example."""
        return self.by_hand.get(part, part)

    def __str__(self) -> str:
        return "/".join(self.required) + "".join(f"[/{column}]" for column in self.optional)


# ------------------------------------------------------------------------------------------- reading one record


def _text(record: Record, column: str) -> str:
    """The text in a column; a number becomes its text."""
    if column not in record.values:
        raise BadValueError(f"has no column {column!r}")
    return as_text(record.values[column], f"column {column!r}")


def _optional_text(record: Record, column: str | None) -> str:
    if column is None or is_missing(record.values.get(column)):
        return ""
    return _text(record, column)


def _read_text(shape: Shape, record: Record) -> Iterator[Example]:
    yield Example(
        prompt=None, completion=_text(record, shape.column(shape.required[0])), messages=None, origin=record.origin
    )


def _read_pair(shape: Shape, record: Record) -> Iterator[Example]:
    """A prompt, its completion, and maybe a system text and an input that belongs to the prompt."""
    if "history" not in shape.by_hand.values():
        check_pair(record.values)
    prompt, completion = (_text(record, shape.column(part)) for part in shape.required)
    input_column = next((column for column in shape.optional if column != "system"), None)
    prompt = _with_input(prompt, _optional_text(record, input_column))
    yield _pair(_optional_text(record, shape.column("system")), prompt, completion, record.origin)


def _with_input(instruction: str, given: str) -> str:
    return f"{instruction}\n\n{given}" if given.strip() else instruction


def _pair(system: str, prompt: str, completion: str, origin: str) -> Example:
    messages = None
    if system.strip():
        messages = (Message("system", system), Message("user", prompt), Message("assistant", completion))
    return Example(prompt=prompt, completion=completion, messages=messages, origin=origin)


def _read_instances(shape: Shape, record: Record) -> Iterator[Example]:
    """The self-instruct layout: one instruction with several pairs of input and output."""
    instruction, instances = _text(record, "instruction"), record.values.get("instances")
    if not isinstance(instances, list) or not instances:
        raise BadValueError("column 'instances' must be a list with at least one {input, output}")
    for number, values in enumerate(instances, start=1):
        if not isinstance(values, Mapping):
            raise BadValueError(f"instance {number} must be an object with an output")
        origin = record.origin if len(instances) == 1 else f"{record.origin} instance {number}"
        nested = Record(record.file, origin, values)
        prompt = _with_input(instruction, _optional_text(nested, "input"))
        yield Example(prompt=prompt, completion=_text(nested, "output"), messages=None, origin=origin)


def _read_chat(shape: Shape, record: Record) -> Iterator[Example]:
    column = shape.column(shape.required[0])
    turns = record.values.get(column)
    if not isinstance(turns, list) or not turns:
        raise BadValueError(f"column {column!r} must be a list with at least one message")
    check_chat(record.values, turns, ANSWERING, shape.learns_all)
    messages = [_message(turn, number) for number, turn in enumerate(turns, start=1)]
    messages = _with_system(messages, _optional_text(record, shape.column("system")), shape.column("system"))
    if messages[0].role == "assistant":
        raise BadValueError("the conversation begins with the assistant: there is nothing that it answers")
    answers = [index for index, message in enumerate(messages) if message.role == "assistant"]
    first = answers[0] if answers else len(messages)
    prompt = "\n".join(message.content for message in messages[:first])
    yield Example(
        prompt=prompt,
        completion=messages[first].content if answers else "",
        messages=tuple(messages),
        origin=record.origin,
    )


def _with_system(messages: list[Message], system: str, column: str) -> list[Message]:
    if not system.strip():
        return messages
    if messages[0].role != "system":
        return [Message("system", system), *messages]
    if messages[0].content.strip() != system.strip():
        raise BadValueError(f"has a system text in column {column!r} and a different one in its first message")
    return messages


def _message(turn: object, number: int) -> Message:
    if not isinstance(turn, Mapping):
        raise BadValueError(f"message {number} must be an object with role and content")
    role, content = _first(turn, "role", "from"), _first(turn, "content", "value")
    if not isinstance(role, str) or role not in ROLES:
        raise BadValueError(f"message {number} has the role {role!r}; the known roles are {', '.join(ROLES)}")
    if isinstance(content, list):  # the parts of a multimodal message
        content = _joined_parts(content, number)
    return Message(ROLES[role], as_text(content, f"the content of message {number}"))


def _first(turn: Mapping[str, Any], name: str, other: str) -> Any:
    """The value under `name`, or under `other` if there is none."""
    value = turn.get(name)
    return turn.get(other) if is_missing(value) else value


def _joined_parts(parts: list[Any], number: int) -> str:
    if not all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in parts):
        raise BadValueError(f"message {number} has parts that are not text")
    kinds = {str(part.get("type")) for part in parts} - {"None", *TEXT_KINDS}
    if kinds:
        raise BadValueError(f"message {number} has parts of type {', '.join(sorted(kinds))}; only text can be read")
    return "".join(part["text"] for part in parts)


# -------------------------------------------------------------------------------------------- choosing the shape

TEXT = Shape(required=("text",), optional=(), read=_read_text)
PROMPT = Shape(required=("prompt", "completion"), optional=("system",), read=_read_pair)
MESSAGES = Shape(required=("messages",), optional=("system",), read=_read_chat)
SHAPES = (  # the first one that fits is taken: a data set with both an answer and a rendered text has its answer read
    MESSAGES,
    Shape(required=("conversations",), optional=("system",), read=_read_chat),
    PROMPT,
    Shape(required=("prompt", "response"), optional=("system",), read=_read_pair),
    Shape(required=("instruction", "output"), optional=("input", "system"), read=_read_pair),
    Shape(required=("instruction", "response"), optional=("context", "system"), read=_read_pair),
    Shape(required=("instruction", "instances"), optional=(), read=_read_instances),
    Shape(required=("question", "answer"), optional=("system",), read=_read_pair),
    Shape(required=("question", "response"), optional=("system",), read=_read_pair),
    TEXT,
)
PAIRED = tuple(shape for shape in SHAPES if shape.read is _read_pair)  # a prompt with its completion


def prompts_from(records: list[Record], columns: Mapping[str, str], source: str, setting: str) -> list[Example]:
    """The prompts in `records`, each a conversation that waits for an answer; the answer column may be absent.

    An answer at the end of a conversation is dropped; a plain text is a prompt as a whole.
    Raises `UserError` as `examples_from` does.
    """
    unanswered: list[Record] = []
    for _, group in groupby(records, key=lambda record: record.file):
        in_file = list(group)
        answers = _answer_column(in_file, columns)
        unanswered += in_file if answers is None else [record.with_value(answers, "") for record in in_file]
    return [_without_answer(example) for example in examples_from(unanswered, columns, source, setting)]


def _answer_column(records: list[Record], columns: Mapping[str, str]) -> str | None:
    """The answer column for the records of a file, even if they lack it; None if their shape has no such column."""
    if columns:
        return columns.get("completion", "completion") if "prompt" in columns else None
    there = {column for record in records for column in record.values}
    whole = next((shape for shape in SHAPES if set(shape.required) <= there), None)
    found = whole or next((shape for shape in PAIRED if shape.required[0] in there), None)
    return found.required[1] if found is not None and found in PAIRED else None


def _without_answer(example: Example) -> Example:
    if example.prompt is None:
        return prompt_of(example.completion, example.origin)
    if example.messages is None:
        return prompt_of(example.prompt, example.origin)
    asked = list(example.messages)
    while asked[-1].role == "assistant":  # the first one never is
        asked.pop()
    return Example(
        prompt="\n".join(message.content for message in asked),
        completion="",
        messages=tuple(asked),
        origin=example.origin,
    )


def prompt_of(text: str, origin: str) -> Example:
    """A conversation that opens with `text` and waits for its answer."""
    return Example(prompt=text, completion="", messages=(Message("user", text),), origin=origin)


def examples_from(
    records: list[Record], columns: Mapping[str, str], source: str, setting: str, learns_all: bool = False
) -> list[Example]:
    """The examples in `records`, each file recognised by its own columns, or mapped by `columns`.

    `learns_all`: whole examples are learned, not only their answers.

    Raises `UserError` if the columns fit no shape, if `columns` names a target or a column that does not exist, and if
    a record does not fit (each with file and line).
    """
    _check_targets(columns)
    problems = Problems(setting, source, "Fix or remove it.")
    examples: list[Example] = []
    for file, group in groupby(records, key=lambda record: record.file):
        in_file = list(group)
        there = list(dict.fromkeys(column for record in in_file for column in record.values))
        shape = _mapped_shape(columns, there, file) if columns else _recognised_shape(there, file, setting)
        examples.extend(_read_all(replace(shape, learns_all=learns_all), in_file, problems))
    problems.raise_if_any()
    return examples


def _read_all(shape: Shape, records: list[Record], problems: Problems) -> Iterator[Example]:
    for record in records:
        try:
            yield from shape.read(shape, record)
        except BadValueError as error:
            error.add_to(problems, record.origin)


def _recognised_shape(there: list[str], file: str, setting: str) -> Shape:
    for shape in SHAPES:
        if set(shape.required) <= set(there):
            return shape
    rule = f"has the columns {_listed(there)}, which fit no known shape"
    known = ", ".join(str(shape) for shape in SHAPES)
    remedy = f"Map them, e.g. {named('columns', EXAMPLE)}. Known shapes: {known}."
    raise UserError.of(setting, file, rule, remedy)


def _listed(columns: list[str]) -> str:
    """Column names, shortened: in a file without a header the first line is taken for names."""
    return ", ".join(repr(column if len(column) <= 40 else column[:37] + "...") for column in columns)


def _check_targets(columns: Mapping[str, str]) -> None:
    given = ",".join(f"{target}={column}" for target, column in columns.items())
    faults = [
        Fault(
            "columns",
            f"{target}={column}",
            f"maps {target!r}, which is not one of {', '.join(TARGETS)}",
            f"For example {named('columns', EXAMPLE)}.",
        )
        for target, column in columns.items()
        if target not in TARGETS
    ]
    kinds = [kind for kind in (("text",), ("messages",), ("prompt", "completion")) if set(kind) & set(columns)]
    if len(kinds) > 1 or set(columns) == {"system"} or {"text", "system"} <= set(columns):
        faults.append(
            Fault(
                "columns",
                given,
                "must map either text, or messages, or prompt and completion (the last two also with system)",
                "Drop the others.",
            )
        )
    if faults:
        raise UserError(faults)


def _mapped_shape(columns: Mapping[str, str], there: list[str], file: str) -> Shape:
    shape = TEXT if "text" in columns else MESSAGES if "messages" in columns else PROMPT
    needed = {target: columns.get(target, target) for target in shape.required} | dict(columns)
    faults = [
        Fault(
            "columns",
            f"{target}={column}",
            f"names a column that {file} does not have",
            f"Its columns are {_listed(there)}.",
        )
        for target, column in needed.items()
        if column not in there
    ]
    if faults:
        raise UserError(faults)
    return replace(shape, by_hand=columns)
