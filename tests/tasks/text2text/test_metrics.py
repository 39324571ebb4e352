"""BLEU, chrF and ROUGE of whole sets of texts, against counting by hand and the libraries' own."""

from __future__ import annotations

import math

import pytest
from data_tokenizers import EOS  # noqa: F401  (its profile makes hypothesis steady)
from hypothesis import given
from hypothesis import strategies as st
from rouge_score import rouge_scorer, tokenize

from qlora_kit.tasks.text2text.metrics import Words, text_metrics


def test_equal_texts_have_all_points():
    texts = ["the cat sat on the mat", "a dog ran over the green hill"]
    assert text_metrics(texts, texts) == pytest.approx(
        dict.fromkeys(("bleu", "chrf", "rouge1", "rouge2", "rougeL"), 100)
    )
    assert set(text_metrics(["", ""], texts).values()) == {0.0}


def test_bleu_by_hand():
    """The matching n-grams are 5 of 6, 3 of 5, 2 of 4 and 1 of 3, and the lengths are equal."""
    found = text_metrics(["the cat sat on a mat"], ["the cat sat on the mat"])
    assert found["bleu"] == pytest.approx(100 * math.prod([5 / 6, 3 / 5, 2 / 4, 1 / 3]) ** 0.25)
    assert found["rouge1"] == pytest.approx(100 * 5 / 6)
    assert found["rouge2"] == pytest.approx(100 * 3 / 5)
    assert found["rougeL"] == pytest.approx(100 * 5 / 6)


def test_rouge_is_the_mean_over_texts_and_bleu_is_over_the_set():
    answers, expected = ["a b c d e", "x"], ["a b c d e", "y z"]
    found = text_metrics(answers, expected)
    assert found["rouge1"] == pytest.approx(50)
    assert found["bleu"] > 0  # no n-gram of the second is right, and its mean with the first would be a half
    assert found["bleu"] != pytest.approx(50)


def test_words_of_any_script_count():
    found = text_metrics(["Привет мир", "größer als"], ["Привет всем", "größer als"])
    assert found["rouge1"] == pytest.approx(75)


@given(st.text(st.characters(max_codepoint=127)))
def test_on_ascii_the_words_are_those_of_rouge_score(text):
    assert Words().tokenize(text) == tokenize.tokenize(text, None)


@given(st.lists(st.tuples(st.text("ab ", max_size=12), st.text("ab ", max_size=12)), min_size=1, max_size=4))
def test_rouge_on_ascii_is_rouge_score(pairs):
    scorer = rouge_scorer.RougeScorer(["rougeL"])
    expected = [scorer.score(true, own)["rougeL"].fmeasure for own, true in pairs]
    found = text_metrics([own for own, _ in pairs], [true for _, true in pairs])
    assert found["rougeL"] == pytest.approx(100 * sum(expected) / len(expected))
