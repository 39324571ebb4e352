"""CoNLL files: a word a line with its tag in the last column, a blank line between sentences.

Columns stand between tabs, or where a file has none between spaces. A file of one column has words without tags. As in
the shared tasks CoNLL-2003 and WNUT-17, lines with -DOCSTART- begin a document and hold no word.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from qlora_kit.data.problems import Problems

SUFFIXES = (".conll", ".bio", ".iob", ".iob2", ".bioes")
DOCUMENT = "-DOCSTART-"
TAG = re.compile(r"O|[BIESUL]-\S+")
LOOKED_AT = 200  # words by which a file is recognised
LEAST_TAGGED = 0.9  # of them have a tag
BLANK = " \t\r"  # other white space, such as that without a break, may be a word


@dataclass
class Sentence:
    """Words with their tags (none where the file has none), and the number of the line on which it begins."""

    line: int
    words: list[str] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)


def looks_like_conll(text: str) -> bool:
    """Whether nearly every line has a word and a tag (O, B-person, …); the others are for `read_sentences` to name."""
    lines = [line for line in text.split("\n") if _is_word(line)][:LOOKED_AT]
    rows = [_columns(line, "\t" in lines[0]) for line in lines]
    tagged = sum(len(row) > 1 and TAG.fullmatch(row[-1]) is not None for row in rows)
    return bool(rows) and tagged >= LEAST_TAGGED * len(rows)


def read_sentences(text: str, path: str, problems: Problems) -> Iterator[Sentence]:
    """The sentences of the file `path` that holds `text`; lines that are none of it go to `problems`."""
    lines = text.split("\n")
    first = next((line for line in lines if _is_word(line)), "")
    has_tabs, width = "\t" in first, 0
    sentence = Sentence(0)
    for number, line in enumerate(lines, start=1):
        if not _is_word(line):
            if sentence.words:
                yield sentence
            sentence = Sentence(0)
            continue
        columns = _columns(line, has_tabs)
        width = width or len(columns)
        rule = _fault(columns, width)
        if rule is not None:
            problems.add(f"{path}:{number}", rule)
            continue
        sentence.line = sentence.line or number
        sentence.words.append(columns[0])
        if width > 1:
            sentence.tags.append(columns[-1])
    if sentence.words:
        yield sentence


def _is_word(line: str) -> bool:
    return bool(line.strip(BLANK)) and not line.startswith(DOCUMENT)


def _columns(line: str, has_tabs: bool) -> list[str]:
    line = line.rstrip("\r")
    parts = line.split("\t") if has_tabs else re.split(r"[ \t]+", line.strip(BLANK))
    return [part.strip(BLANK) for part in parts]


def _fault(columns: list[str], width: int) -> str | None:
    """The rule that a line breaks, or None."""
    if len(columns) != width:
        return f"has {len(columns)} columns where the first line has {width}: a word, and its tag in the last one"
    if not columns[0]:
        return "has no word in its first column"
    return None if columns[-1] else f"has no tag behind {columns[0]!r}"
