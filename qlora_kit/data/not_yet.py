"""Fields of records that are not supported yet: ignored, they would train something other than what they mean."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any

from qlora_kit.data.fields import peek
from qlora_kit.data.problems import Problems
from qlora_kit.data.values import BadValueError, is_empty
from qlora_kit.errors import named

CALLS = ("tool_calls", "function_call")
TOOLS = ("tools", "functions")
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
WEIGHTS = {"weight": "1", "train": "true", "training": "true"}  # with the value that changes nothing
NONE = ("none", "false", "nan")  # as text, for nothing
NOT_YET = "this is not supported yet"
TOOL_REMEDY = (
    "Write them into the system text in the form of the model's chat template, or remove {} to train without them."
)
CALL_REMEDY = (
    "Write the calls into the contents in the form of the model's chat template, or leave these conversations out."
)
THOUGHT_REMEDY = (
    "Write them into the contents in the form of the model's chat template (<think>…</think> before the answer), or "
    "remove {} to train without them."
)
WEIGHT_REMEDY = "Remove {} to learn these like the others, or leave these conversations out."
TRAIN_REMEDY = f"Remove {{}} to learn the answers only, or learn everything with {named('train_on', 'all')}."
HISTORY_REMEDY = (
    "Give the whole as a conversation, {messages: [{role, content}, …]}, or remove 'history' to train without it."
)


class NotYetError(BadValueError):
    """A record cannot be trained on as it is meant; holds a rule and a remedy for each reason."""

    def __init__(self, reasons: Mapping[str, str]) -> None:
        super().__init__("; ".join(reasons))
        self._reasons = reasons

    def add_to(self, problems: Problems, origin: str) -> None:
        """Note every reason; the same one usually applies in many places."""
        for rule, remedy in self._reasons.items():
            problems.add_kind(origin, rule, remedy)


def check_chat(values: Mapping[str, Any], turns: Sequence[object], answering: Set[str], learns_all: bool) -> None:
    """Check a conversation for tools, and its `turns` for calls, thoughts and weights, which would be ignored.

    Turns of the `answering` roles are learned, with `learns_all` every turn. Raises `NotYetError`.
    """
    reasons = {
        f"has {name!r} beside its messages, which would not reach the prompt: {NOT_YET}": TOOL_REMEDY.format(repr(name))
        for name in TOOLS
        if name in values and not _says_nothing(values[name])
    }
    for turn in turns:
        if isinstance(turn, Mapping):
            reasons.update(_reasons_of(turn, answering, learns_all))
    if reasons:
        raise NotYetError(reasons)


def _reasons_of(turn: Mapping[str, Any], answering: Set[str], learns_all: bool) -> Iterator[tuple[str, str]]:
    """The rules that a turn breaks, each with its remedy."""
    for name in turn:
        if name in (*CALLS, *THOUGHTS) and not _says_nothing(turn[name]):
            remedy = CALL_REMEDY if name in CALLS else THOUGHT_REMEDY.format(repr(name))
            yield f"has a message with {name!r}, which would be left out: {NOT_YET}", remedy
        elif name in WEIGHTS and not is_empty(turn[name]):
            yield from _reasons_of_weight(name, turn[name], _is_answer(turn, answering), learns_all)


def _is_answer(turn: Mapping[str, Any], answering: Set[str]) -> bool:
    return not answering.isdisjoint((str(turn.get("role")), str(turn.get("from"))))


def _reasons_of_weight(name: str, weight: object, is_answer: bool, learns_all: bool) -> Iterator[tuple[str, str]]:
    """Why a turn is not learned by its weight: a turn is learned either in full or not at all."""
    in_full = _is_one(weight)
    if (is_answer or learns_all) and not in_full:
        what = "an answer" if is_answer else "a message"
        rule = f"has {what} whose {name!r} is not {WEIGHTS[name]}, but it would be learned in full: {NOT_YET}"
        yield rule, WEIGHT_REMEDY.format(repr(name))
    elif in_full and not is_answer and not learns_all and name != "weight":  # which says nothing at questions
        rule = f"has a message whose {name!r} is true, but it is not an answer and would not be learned: {NOT_YET}"
        yield rule, TRAIN_REMEDY.format(repr(name))


def _is_one(weight: object) -> bool:
    """Whether a weight is 1 or true, also as text."""
    if not isinstance(weight, str):
        return weight == 1
    try:
        return weight.strip().lower() == "true" or float(weight) == 1
    except ValueError:
        return False


def _says_nothing(value: object) -> bool:
    """Whether a field for calls, tools or thoughts is empty, in one of the ways in which files write that."""
    return is_empty(value) or value in (False, 0) or (isinstance(value, str) and value.strip().lower() in NONE)


def check_pair(values: Mapping[str, Any]) -> None:
    """Check a prompt and its answer for a list of earlier turns. Raises `NotYetError`.

    Any other text called history is a field like any other.
    """
    said = peek(values, "history")
    is_list = isinstance(said, list) or (isinstance(said, str) and said.lstrip().startswith("["))
    if is_list and not is_empty(said):
        raise NotYetError({f"has a 'history', which would not reach the prompt: {NOT_YET}": HISTORY_REMEDY})
