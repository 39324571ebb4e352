"""How near a found answer comes to the right ones: exact match and F1 of SQuAD, also where there is no answer.

As in the evaluations of Rajpurkar et al., arXiv 1606.05250 (SQuAD 1.1) and 1806.03822 (2.0): both texts are normalized,
F1 is over their words as bags, and of several right answers the one that fits best counts. "" is no answer; a question
without one is answered rightly by it alone. (torchmetrics' `SQuAD` knows only questions that have an answer.)
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from statistics import fmean

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalized(text: str) -> str:
    """`text` in lower case, without punctuation and articles, its words apart by one space."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def exact_match(found: str, right: Sequence[str]) -> float:
    """1 where the answer `found` is one of the `right` ones, else 0; without any right one "" is."""
    return float(normalized(found) in _normalized_right(right))


def f1(found: str, right: Sequence[str]) -> float:
    """The harmonic mean of precision and recall over words, of the right answer where it is highest."""
    return max(_f1(normalized(found).split(), one.split()) for one in _normalized_right(right))


def _normalized_right(right: Sequence[str]) -> list[str]:
    """Those of `right` of which something is left, as SQuAD 2.0's own script counts them; without any, ""."""
    return [own for own in map(normalized, right) if own] or [""]


def _f1(found: Sequence[str], right: Sequence[str]) -> float:
    if not found or not right:
        return float(found == right)
    shared = (Counter(found) & Counter(right)).total()
    return 2 * shared / (len(found) + len(right))


def squad_metrics(found: Sequence[str], right: Sequence[Sequence[str]]) -> dict[str, float]:
    """The means of `exact_match` and `f1` over all questions, and over those with and without an answer.

    A part is there only where it has questions; without an answer both figures are the same, so it has one.
    """
    exact = [exact_match(*pair) for pair in zip(found, right, strict=True)]
    shares = [f1(*pair) for pair in zip(found, right, strict=True)]
    metrics = {"exact_match": fmean(exact), "f1": fmean(shares)}
    answerable = [number for number, own in enumerate(right) if own]
    if answerable:
        metrics["exact_match_answerable"] = fmean(exact[number] for number in answerable)
        metrics["f1_answerable"] = fmean(shares[number] for number in answerable)
    if len(answerable) < len(right):
        metrics["exact_match_unanswerable"] = fmean(
            own for own, answers in zip(exact, right, strict=True) if not answers
        )
    return metrics
