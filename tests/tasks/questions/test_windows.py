"""Windows over contexts: nothing of a context is lost, answers are whole where they fit, and places map back."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from classifiers import CLS_ID, SEP_ID, encoder_tokenizer
from families import tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from qlora_kit.errors import UserError
from qlora_kit.tasks.questions.read import AnswerSpan, AskedContext
from qlora_kit.tasks.questions.windows import NO_ANSWER, OVERLAP, rows_of, starts, tokens_of

settings.register_profile("steady", derandomize=True, deadline=None)  # the same cases on a slow, shared machine
settings.load_profile("steady")

WORDS = ("a", "cat", "sat", "on", "é", "##s", "##é", ".", "[UNK]", "[CLS]", "[SEP]", "[PAD]")


def word_pieces():
    """A WordPiece tokenizer like BERT's: several characters a token, white space in none."""
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    raw = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", WORDS.index("[CLS]")), ("[SEP]", WORDS.index("[SEP]"))],
    )
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]")


TOKENIZERS = {"bytes": encoder_tokenizer(), "decoder": tiny_tokenizer(), "pieces": word_pieces()}
TEXTS = st.text(alphabet="abcé \n.東", max_size=60)


def asked(context, *answers, question="q?"):
    spans = tuple(AnswerSpan(context[s:e], s) for s, e in answers)
    return AskedContext(question=question, context=context, answers=spans, id=None, origin="a.jsonl:1")


def rows(example, name="bytes", seq_len=24, labelled=True):
    return rows_of([example], TOKENIZERS[name], seq_len, labelled)


@given(tokens=st.integers(0, 200), room=st.integers(1, 40), overlap=st.integers(0, 39))
def test_windows_cover_everything_and_share_the_overlap(tokens, room, overlap):
    overlap %= room
    found = starts(tokens, room, overlap)
    covered = {token for start in found for token in range(start, min(start + room, tokens))}
    assert covered == set(range(tokens))
    assert all(b == a + room - overlap for a, b in itertools.pairwise(found))
    assert len(found) == 1 or found[-2] + room < tokens  # the last one is needed
    for first in range(tokens):  # an answer of as many tokens as are shared
        last = min(first + max(overlap, 1), tokens) - 1
        assert any(start <= first and last < start + room for start in found)


@given(context=TEXTS, name=st.sampled_from(sorted(TOKENIZERS)))
def test_every_token_of_the_context_is_in_some_window(context, name):
    tokenizer = TOKENIZERS[name]
    found = rows(asked(context), name)
    whole = tokenizer(context, add_special_tokens=False)["input_ids"]
    assert all(len(row.input_ids) <= 24 for row in found)
    seen = {}
    step = len(found[0].offsets) - int(OVERLAP * 24)
    for number, row in enumerate(found):
        for place in range(len(row.offsets)):
            token = row.input_ids[row.context_at + place]
            assert seen.setdefault(number * step + place, token) == token
    assert [seen[place] for place in sorted(seen)] == whole
    assert sorted(seen) == list(range(len(whole)))
    assert all(row.full_tokens == len(found[0].input_ids) - len(found[0].offsets) + len(whole) for row in found)


@pytest.mark.parametrize("name", ["bytes", "pieces"])
@pytest.mark.parametrize("length", [1, 16, 17, 40, 60])
def test_windows_are_those_of_the_tokenizer_itself(name, length):
    context, tokenizer = ("a cat. " * 60)[: length if name == "bytes" else 2 * length], TOKENIZERS[name]
    theirs = tokenizer(
        "a",
        context,
        truncation="only_second",
        max_length=24,
        stride=int(OVERLAP * 24),
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    ours = rows(asked(context, question="a"), name)
    assert [row.input_ids for row in ours] == theirs["input_ids"]
    if name == "bytes":
        assert [row.token_type_ids for row in ours] == theirs["token_type_ids"]
    for number, row in enumerate(ours):
        parts = theirs.sequence_ids(number)
        own = [pair for pair, part in zip(theirs["offset_mapping"][number], parts, strict=True) if part == 1]
        assert [tuple(pair) for pair in row.offsets.tolist()] == own


@given(context=TEXTS.filter(bool), ends=st.tuples(st.integers(0, 60), st.integers(1, 20)))
@pytest.mark.parametrize("name", ["bytes", "decoder"])
def test_places_map_back_to_exactly_the_characters(name, context, ends):
    start = ends[0] % len(context)
    end = min(start + ends[1], len(context))
    example = asked(context, (start, end))
    text = context[start:end]
    if not text.strip():
        return  # refused when it is read
    found = rows(example, name)
    held = [row for row in found if row.label != NO_ANSWER]
    for row in held:
        begin, behind = row.characters(*row.label)
        assert context[begin:behind] == text.strip()
        assert begin == start + len(text) - len(text.lstrip())
    n_tokens = len(TOKENIZERS[name](text, add_special_tokens=False)["input_ids"])
    if n_tokens <= int(OVERLAP * 24):
        assert held


@pytest.mark.parametrize(
    ("part", "expected"),
    [("cat", "cat"), ("cats", "cats"), ("at", "cat"), ("cats.", "cats."), ("a cats", "a cats"), (" cats ", "cats")],
)
def test_an_answer_within_tokens_gets_the_fewest_that_hold_it(part, expected):
    context = "a cats.  cats on a"
    start = context.index(part)
    (row,) = rows(asked(context, (start, start + len(part))), "pieces")
    begin, end = row.characters(*row.label)
    assert context[begin:end] == expected


@pytest.mark.parametrize(
    ("context", "part"),
    [
        ("a cafe\u0301 a", "cafe\u0301"),
        ("a cafe\u0301", "cafe\u0301"),
        ("e\u0301e\u0323\u0301. a", "e\u0301e\u0323\u0301"),
        ("\u00e9. a", "\u00e9"),
    ],
)
def test_marks_that_the_tokenizer_strips_belong_to_the_character_before_them(context, part):
    stripping = word_pieces()
    stripping.backend_tokenizer.normalizer = normalizers.BertNormalizer()
    start = context.index(part)
    for labelled in (asked(context, (start, start + len(part))), asked(context, (start, start + 1))):
        (row,) = rows_of([labelled], stripping, 24, labelled=True)
        begin, end = row.characters(*row.label)
        assert context[begin:end] == part


def test_a_mark_that_is_a_token_of_its_own_is_none_of_the_one_before():
    (row,) = rows(asked("e\u0301", (0, 1)))
    assert row.characters(*row.label) == (0, 1)


def test_which_tokens_are_blank():
    (row,) = rows(asked("a \n\u00a0b"))
    assert row.blanks() == [False, True, True, True, True, False]  # white space without a break is two bytes


def test_an_answer_that_no_token_holds_is_none():
    assert tokens_of(AnswerSpan("b", 3), np.array([[0, 3], [4, 5]])) is None
    assert tokens_of(AnswerSpan("ab c", 1), np.array([[0, 2], [2, 2], [2, 3], [4, 5], [5, 6]])) == (0, 3)
    assert tokens_of(AnswerSpan("a", 0), np.zeros((0, 2), dtype=np.int32)) is None


def test_an_answer_outside_a_window_is_its_first_token():
    example = asked("x" * 30 + "yz" + "x" * 30, (30, 32))
    labels = [row.label for row in rows(example)]
    assert NO_ANSWER in labels
    held = [label for label in labels if label != NO_ANSWER]
    assert held
    assert all(last == first + 1 for first, last in held)
    assert [row.label for row in rows(asked("x" * 60))] == [NO_ANSWER] * len(labels)
    assert {row.label for row in rows(example, labelled=False)} == {None}


def test_the_first_of_several_answers_is_learned():
    (row,) = rows(asked("abcd", (1, 2), (2, 4)))
    assert row.characters(*row.label) == (1, 2)


def test_the_layout_of_a_row():
    (row,) = rows(asked("ab", (0, 1)))
    assert row.input_ids == encoder_tokenizer()("q?", "ab")["input_ids"]
    assert (row.input_ids[0], row.input_ids[-1]) == (CLS_ID, SEP_ID)
    assert row.token_type_ids == [0, 0, 0, 0, 1, 1, 1]
    assert row.label == (4, 4)
    (decoded,) = rows(asked("ab", (0, 1)), "decoder")
    assert decoded.input_ids == tiny_tokenizer()("q?\nab")["input_ids"]
    assert decoded.token_type_ids is None
    assert decoded.label == (3, 3)


def test_numbers_go_on_over_several_calls_of_the_tokenizer(monkeypatch):
    monkeypatch.setattr("qlora_kit.tasks.questions.windows.AT_ONCE", 2)
    found = rows_of([asked("ab"), asked("x" * 40), asked("c")], TOKENIZERS["bytes"], 24, labelled=True)
    assert sorted({row.number for row in found}) == [0, 1, 2]
    assert [row.number for row in found] == sorted(row.number for row in found)


def test_a_question_that_leaves_too_little_room_is_refused_with_its_place():
    at_most = asked("a" * 40, question="q" * 9)  # and three marks: half of 24
    assert rows(at_most)
    with pytest.raises(UserError, match=r"a\.jsonl:1.*has a question of 13 tokens, and 50% of the 24 of seq_len"):
        rows(asked("a" * 40, question="q" * 10))


def test_a_slow_tokenizer_is_refused():
    class Slow:
        is_fast, name_or_path = False, "theirs"

    with pytest.raises(UserError, match=r"tokenizer = 'theirs'.*does not tell which characters its tokens are"):
        rows_of([asked("a")], Slow(), 24, labelled=True)
