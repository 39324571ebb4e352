"""CoNLL files: one word a line with its tag in the last column, a blank line between sentences.

Columns are separated by tabs, or by spaces if a file has no tabs. A file of one column has words without tags. As in
the shared tasks CoNLL-2003 and WNUT-17, lines with -DOCSTART- begin a document and hold no word. Nor do comments: lines
with "# " before a sentence.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from qlora_kit.data.problems import Problems

SUFFIXES = (".conll", ".bio", ".iob", ".iob2", ".bioes")
DOCUMENT = "-DOCSTART-"
COMMENT = "# "
LINE_END = re.compile(r"\r*\n|\r")  # and no other: words may hold the rest of what `str.splitlines` takes for one
TAG = re.compile(r"O|[BIESUL]-\S+")
LOOKED_AT = 200  # words by which a file is recognised
LEAST_TAGGED = 0.9  # of them have a tag
BLANK = " \t"  # other white space, such as that without a break, may be a word


@dataclass(kw_only=True)
class Sentence:
    """Words with their tags (none where the file has none), and the number of the line on which it begins.

    `width` is the number of columns in the file; columns between the word and its tag are not read.
    """

    line: int
    words: list[str] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    width: int = 1


def looks_like_conll(text: str) -> bool:
    """Whether nearly every line has a word and a tag (O, B-person, …); `read_sentences` reports the others."""
    lines = [line for line in LINE_END.split(text) if _is_plain(line)][:LOOKED_AT]
    rows = [_columns(line, "\t" in lines[0]) for line in lines]
    tagged = sum(len(row) > 1 and TAG.fullmatch(row[-1]) is not None for row in rows)
    return bool(rows) and tagged >= LEAST_TAGGED * len(rows)


def read_sentences(text: str, path: str, problems: Problems) -> Iterator[Sentence]:
    """The sentences of the file `path` that holds `text`; lines that do not fit go to `problems`."""
    lines = LINE_END.split(text)
    layout = _layout(lines)
    sentence = Sentence(line=0)
    for number, line in enumerate(lines, start=1):
        if not _is_word(line):
            if sentence.words:
                yield sentence
            sentence = Sentence(line=0)
            continue
        columns = _columns(line, layout.has_tabs)
        if not sentence.words and line.startswith(COMMENT) and layout.is_comment(columns):
            continue
        rule = layout.fault(columns)
        if rule is not None:
            problems.add(f"{path}:{number}", rule)
            continue
        sentence.line, sentence.width = sentence.line or number, layout.width
        sentence.words.append(columns[0])
        if layout.width > 1:
            sentence.tags.append(columns[-1])
    if sentence.words:
        yield sentence


@dataclass(frozen=True)
class _FileLayout:
    """The layout of a file by its first line with a word: its `number`, its `columns`, and their separator."""

    number: int
    columns: list[str]
    has_tabs: bool

    @property
    def width(self) -> int:
        return len(self.columns)

    def is_comment(self, columns: list[str]) -> bool:
        """Whether a line that begins like a comment is one, and not the token # with its tag."""
        if len(columns) == self.width > 1:
            return TAG.fullmatch(columns[-1]) is None and TAG.fullmatch(self.columns[-1]) is not None
        return len(columns) > 1 or self.has_tabs

    def fault(self, columns: list[str]) -> str | None:
        """The rule that a line breaks, or None."""
        if len(columns) != self.width:
            first = f"the first line with a word, line {self.number}, has {self.width}"
            return f"has {len(columns)} columns, but {first}: a word, and its tag in the last column"
        if not columns[0]:
            return "has no word in its first column"
        return None if columns[-1] else f"has no tag after {columns[0]!r}"


def _layout(lines: list[str]) -> _FileLayout:
    """The layout of a file, from its first line that cannot be a comment, else from the first line with a word."""
    numbers = [number for number, line in enumerate(lines, start=1) if _is_word(line)]
    first = next((number for number in numbers if _is_plain(lines[number - 1])), numbers[0] if numbers else 1)
    has_tabs = "\t" in lines[first - 1]
    return _FileLayout(first, _columns(lines[first - 1], has_tabs), has_tabs)


def _is_plain(line: str) -> bool:
    return _is_word(line) and not line.startswith(COMMENT)


def _is_word(line: str) -> bool:
    return bool(line.strip(BLANK)) and not line.startswith(DOCUMENT)


def _columns(line: str, has_tabs: bool) -> list[str]:
    parts = line.split("\t") if has_tabs else re.split(r"[ \t]+", line.strip(BLANK))
    return [part.strip(BLANK) for part in parts]
