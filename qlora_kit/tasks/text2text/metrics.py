"""How close texts come to those that were expected: BLEU, chrF and ROUGE, each from 0 to 100.

BLEU (Papineni et al., 2002) and chrF (Popović, 2015) are those of sacrebleu, over the whole set. ROUGE (Lin, 2004) is
the mean over the texts of rouge-score's F1, without stemming.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

WORD = re.compile(r"[^\W_]+")
ROUGE = ("rouge1", "rouge2", "rougeL")


class Words:
    """Words in lower case, whatever the script. On ASCII it is rouge-score's own, which drops all other letters."""

    def tokenize(self, text: str) -> list[str]:
        """The words of `text`."""
        return WORD.findall(text.lower())


def text_metrics(answers: Sequence[str], expected: Sequence[str]) -> dict[str, float]:
    """`bleu`, `chrf`, `rouge1`, `rouge2` and `rougeL` of N answers to the N texts that were expected, N ≥ 1."""
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer

    assert len(answers) == len(expected) >= 1, "one answer for each expected text"
    scorer = RougeScorer(list(ROUGE), tokenizer=Words())
    scores = [scorer.score(true, own) for own, true in zip(answers, expected, strict=True)]
    return {
        "bleu": float(sacrebleu.corpus_bleu(list(answers), [list(expected)]).score),
        "chrf": float(sacrebleu.corpus_chrf(list(answers), [list(expected)]).score),
        **{name: 100 * sum(own[name].fmeasure for own in scores) / len(scores) for name in ROUGE},
    }
