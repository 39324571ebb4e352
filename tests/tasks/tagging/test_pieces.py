"""Words and the tokens they become: which one is a word's first, whatever kind of tokenizer makes them."""

from __future__ import annotations

import functools

import pytest
from classifiers import encoder_tokenizer
from families import tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, ByT5Tokenizer, CanineTokenizer, PreTrainedTokenizerFast

from qlora_kit.tasks.tagging.pieces import split

words = st.lists(st.text(st.sampled_from("abcé😀,-\u200d"), max_size=5), max_size=8)


@functools.cache
def wordpiece():
    """BERT's own parts, with single letters for a vocabulary; it drops U+200D and takes accents off."""
    letters = "abce,-"
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters, *(f"##{letter}" for letter in letters)]
    raw = Tokenizer(models.WordPiece({token: i for i, token in enumerate(vocabulary)}, unk_token="[UNK]"))
    raw.normalizer = normalizers.BertNormalizer(lowercase=True)
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    raw.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


@functools.cache
def metaspace():
    """As SentencePiece's tokenizers: a space is part of the piece behind it."""
    pieces = [("<unk>", 0.0), ("▁", -2.0), *((letter, -3.0) for letter in "abcé,-"), ("▁a", -2.0), ("▁ab", -1.0)]
    raw = Tokenizer(models.Unigram(pieces, unk_id=0))
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", eos_token="<unk>")


def firsts_byte_by_byte(own, leading):
    """The oracle for one token a byte: the places of the words in the bytes of the text."""
    found, place = [], leading
    for word in own:
        found.append(place if word else None)
        place += len(word.encode()) + 1
    return found


@pytest.mark.parametrize(
    ("tokenizer", "leading"),
    [(encoder_tokenizer(), 1), (tiny_tokenizer(), 0), (ByT5Tokenizer(), 0)],
    ids=["marked", "bare", "python"],
)
@settings(deadline=None, max_examples=40, derandomize=True)
@given(own=words)
def test_a_token_a_byte_in_rust_and_in_python(tokenizer, leading, own):
    pieces = split(own, tokenizer, 1000)
    assert pieces.firsts == firsts_byte_by_byte(own, leading)
    if own != [] and own != [""]:
        assert pieces.input_ids == tokenizer(" ".join(own))["input_ids"]
    assert pieces.lost == 0


@settings(deadline=None, max_examples=100, derandomize=True)
@given(words)
def test_wordpieces_are_those_of_transformers_own_alignment(own):
    tokenizer = wordpiece()
    encoded = tokenizer(own, is_split_into_words=True)
    numbers = encoded.word_ids()
    pieces = split(own, tokenizer, 1000)
    assert pieces.input_ids == encoded["input_ids"]
    assert pieces.firsts == [numbers.index(i) if i in numbers else None for i in range(len(own))]


@settings(deadline=None, max_examples=100, derandomize=True)
@given(st.lists(st.text(st.sampled_from("abc,-"), min_size=1, max_size=5), min_size=1, max_size=8))
def test_pieces_that_hold_the_space_before_them(own):
    tokenizer = metaspace()
    pieces = split(own, tokenizer, 1000)
    tokens = tokenizer.convert_ids_to_tokens(pieces.input_ids)
    ends = [place for place in [*pieces.firsts[1:], len(tokens)] if place is not None]
    for word, start, end in zip(own, pieces.firsts, ends, strict=True):
        assert "".join(tokens[start:end]).replace("▁", "") == word


@settings(deadline=None, max_examples=60, derandomize=True)
@given(own=words, seq_len=st.integers(3, 20), side=st.sampled_from(["left", "right"]))
def test_what_is_cut_off_is_counted(own, seq_len, side):
    fast, slow = wordpiece(), ByT5Tokenizer()
    for tokenizer in (fast, slow):
        kept, tokenizer.truncation_side = tokenizer.truncation_side, side
        try:
            whole, cut = split(own, tokenizer, 10_000), split(own, tokenizer, seq_len)
        finally:
            tokenizer.truncation_side = kept
        assert len(cut.input_ids) == min(seq_len, whole.full_tokens)
        assert cut.full_tokens == len(whole.input_ids)
        assert cut.lost == sum(first is not None for first in whole.firsts) - sum(f is not None for f in cut.firsts)
        left_out = whole.full_tokens - len(cut.input_ids) if side == "left" else 0
        for before, after in zip(whole.firsts, cut.firsts, strict=True):
            assert after is None or after == before - left_out


def test_words_of_python_tokenizers_are_characters():
    pieces = split(["ab", "", "c"], CanineTokenizer(), 100)
    assert pieces.firsts == [1, None, 5]
    assert pieces.token_type_ids == [0] * 7


def test_a_sentence_without_words_still_feeds_a_token():
    assert split([], tiny_tokenizer(), 10).input_ids == [tiny_tokenizer().eos_token_id]
    assert split([], encoder_tokenizer(), 10).firsts == []


def test_a_piece_over_several_words_belongs_to_the_first():
    raw = Tokenizer(models.Unigram([("<unk>", 0.0), ("a b", -1.0), ("a", -5.0), ("b", -5.0), (" ", -5.0)], unk_id=0))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", eos_token="<unk>")
    assert split(["a", "b", "a"], tokenizer, 10).firsts == [0, None, 2]


@pytest.mark.data
def test_a_byte_level_tokenizer_sees_running_text(shared_data):
    """Word by word transformers 5 gives GPT-2 words without the space before them, and says nothing."""
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "gpt2-tokenizer")
    own = ["@paulwalk", "It", "'s", "the", "view", "😀", "of", "Zürich"]
    pieces = split(own, tokenizer, 100)
    assert pieces.input_ids == tokenizer(" ".join(own))["input_ids"]
    assert pieces.input_ids != tokenizer(own, is_split_into_words=True)["input_ids"]
    for word, first in zip(own, pieces.firsts, strict=True):
        piece = tokenizer.decode(pieces.input_ids[first]).strip()
        assert word.startswith(piece.rstrip("\N{REPLACEMENT CHARACTER}"))
