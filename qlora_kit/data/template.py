"""Renders an example as text, and marks the parts that the model learns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from qlora_kit.data.columns import Example, Message
from qlora_kit.errors import named

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qlora_kit.data.problems import Problems

MARK = "8147-{}-5093"  # in no text by chance; without letters, which templates may change
Shown = set[tuple[str, ...]]  # orders of roles of which the template is known to show every turn

# Every text as it is: a newline after one that does not end in white space, the end-of-text token after an answer.
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}"
    "{% elif message['content'][-1:] not in [' ', '\\n', '\\t'] %}{{ '\\n' }}{% endif %}{% endfor %}"
)


@dataclass(frozen=True)
class TextSegment:
    """A stretch of text, and whether the model learns to write it."""

    text: str
    is_answer: bool


class TemplateError(ValueError):
    """The tokenizer's chat template cannot render a conversation; the message says why."""

    remedy = f"Fix the conversation, or give a {named('tokenizer')} with another chat template."

    def add_to(self, problems: Problems, origin: str) -> None:
        """Note it of the example at `origin`."""
        problems.add(origin, str(self))


class DroppedError(TemplateError):
    """The chat template leaves out the turns of some role."""

    remedy = (
        "Move that text to a turn that the template shows, remove it, "
        f"or give a {named('tokenizer')} with another chat template."
    )

    def add_to(self, problems: Problems, origin: str) -> None:
        """Note it once for all examples that it applies to."""
        problems.add_kind(origin, str(self), self.remedy)


def segments_of(example: Example, tokenizer: PreTrainedTokenizerBase, shown: Shown) -> list[TextSegment]:
    """The text of `example` in order, cut where answers begin and end; an end-of-turn mark belongs to its answer.

    `shown` spares proofs: it is filled with what they show, for other examples of the same tokenizer.
    Raises `TemplateError` where the chat template refuses the conversation, leaves out a turn or rewrites an earlier
    one.
    """
    if example.prompt is None and example.messages is None:
        return [TextSegment(example.completion, is_answer=True)]
    messages = example.messages or (Message("user", example.prompt or ""), Message("assistant", example.completion))
    whole = _render(tokenizer, messages)
    _check_shown(tokenizer, messages, whole, shown)
    segments, position = [], 0
    for index, message in enumerate(messages):
        if message.role == "assistant":
            start, end = _answer_span(tokenizer, messages, index, whole)
            segments += [
                TextSegment(whole[position:start], is_answer=False),
                TextSegment(whole[start:end], is_answer=True),
            ]
            position = end
    if whole[position:].strip():  # white space after the last answer teaches nothing
        segments.append(TextSegment(whole[position:], is_answer=False))
    return [segment for segment in segments if segment.text]


def opening_of(example: Example, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text that a conversation without an answer opens with, up to where the answer would begin."""
    assert example.messages is not None
    text = _render(tokenizer, example.messages, add_generation_prompt=True)
    _check_shown(tokenizer, example.messages, text, set())
    return text


def _check_shown(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], text: str, shown: Shown) -> None:
    """Check that the chat template leaves out no turn in `text`. Raises `DroppedError`.

    The proof is a mark behind each content, which must be in what is rendered then: a template may trim a content,
    escape it, move it, or cut thoughts out of it. It is made once for each order of roles, and where a content is not
    in the text as it stands.
    """
    roles = tuple(message.role for message in messages)
    if roles in shown and all(message.content.strip() in text for message in messages):
        return
    marked = [replace(message, content=f"{message.content} {MARK.format(n)}") for n, message in enumerate(messages)]
    sought = [MARK.format(number) for number in range(len(messages))]
    try:
        proof = _render(tokenizer, marked)
    except TemplateError:  # it looks into contents, so that nothing can be put behind them
        proof, sought = text, [message.content.strip() for message in messages]
    dropped = {m.role for m, mark in zip(messages, sought, strict=True) if m.content.strip() and mark not in proof}
    if dropped:
        turns = " turn and its ".join(sorted(dropped))
        raise DroppedError(f"the chat template leaves out its {turns} turn")
    if all(message.content.strip() for message in messages):
        shown.add(roles)


def _answer_span(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], index: int, whole: str
) -> tuple[int, int]:
    """From where generation would begin to the end-of-turn mark, white space after it left out."""
    before = _render(tokenizer, messages[:index], add_generation_prompt=True)
    if not whole.startswith(before):
        raise TemplateError(
            f"the chat template renders the text before message {index + 1} differently once the answer is known"
        )
    is_last = index + 1 == len(messages)
    through = whole if is_last else _render(tokenizer, messages[: index + 1])
    if whole.startswith(through.rstrip()):
        return len(before), max(len(before), len(through.rstrip()))
    return len(before), _end_by_content(messages[index].content.strip(), through, whole, len(before))


def _end_by_content(content: str, through: str, whole: str, start: int) -> int:
    """The end of an answer that the template changes once the conversation goes on (Qwen3 drops empty thoughts).

    Its content and the mark behind it must still stand there: `through` ends with both.
    """
    _, found, mark = through.rpartition(content)
    ending = content + mark.rstrip()
    position = whole.find(ending, start)
    if not found or position < 0:
        raise TemplateError("the chat template rewrites an earlier answer when the conversation goes on")
    return position + len(ending)


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], add_generation_prompt: bool = False
) -> str:
    import jinja2

    turns = [{"role": message.role, "content": message.content} for message in messages]
    try:
        text: str = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=add_generation_prompt)
    except (jinja2.TemplateError, TypeError, ValueError) as error:  # whatever a template's own code may raise
        raise TemplateError(f"the chat template refuses it ({error})") from error
    return text
