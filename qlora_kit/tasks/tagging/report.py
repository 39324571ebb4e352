"""How well entities are found: figures by seqeval, a report type by type, and the entities that tags spell out.

An entity counts as found where its type, its first word and its last one are right (as in CoNLL-2003 and WNUT-17). Tags
follow IOB, BIOES or BILOU, read as leniently as by the script `conlleval`: an I- that continues nothing begins an
entity. A tag that is of none of them, such as a part of speech, is an entity of one word.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qlora_kit.tasks.tagging.read import OUTSIDE, kind_of

AS_IN_BIOES = {"U": "S", "L": "E", "": "S"}  # BILOU's unit and last; a tag of no scheme


@dataclass(frozen=True)
class Entity:
    """An entity of `kind`, from the word `start` to before the word `end`."""

    kind: str
    start: int
    end: int


def entities(tags: Sequence[str]) -> list[Entity]:
    """The entities that the tags of a sentence spell out."""
    from seqeval.metrics.sequence_labeling import get_entities

    return [Entity(kind, first, last + 1) for kind, first, last in get_entities(_in_bioes(tags))]


def _in_bioes(tags: Sequence[str]) -> list[str]:
    """The tags with the prefixes that seqeval knows."""
    found = []
    for tag in tags:
        prefix, kind = kind_of(tag)
        found.append(tag if tag == OUTSIDE else f"{AS_IN_BIOES.get(prefix, prefix)}-{kind}")
    return found


def tag_metrics(truth: Sequence[Sequence[str]], answers: Sequence[Sequence[str]]) -> dict[str, float]:
    """Precision, recall and F1 of the entities of all sentences, and the share of words with the right tag."""
    from seqeval.metrics import f1_score, precision_score, recall_score

    pair = [_in_bioes(tags) for tags in truth], [_in_bioes(tags) for tags in answers]
    words = sum(map(len, truth))
    right = sum(own == true for pair in zip(truth, answers, strict=True) for true, own in zip(*pair, strict=True))
    return {
        "precision": float(precision_score(*pair, zero_division=0)),
        "recall": float(recall_score(*pair, zero_division=0)),
        "f1": float(f1_score(*pair, zero_division=0)),
        "accuracy": right / max(words, 1),
    }


def tag_report(truth: Sequence[Sequence[str]], answers: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Precision, recall, F1 and entities of each type that occurs, and their means; empty where none does."""
    from seqeval.metrics import classification_report

    pair = [_in_bioes(tags) for tags in truth], [_in_bioes(tags) for tags in answers]
    if not any(tag != OUTSIDE for side in pair for tags in side for tag in tags):
        return {}
    found = classification_report(*pair, output_dict=True, zero_division=0)
    return {name: {key: float(value) for key, value in own.items()} for name, own in found.items()}


def said(metrics: Mapping[str, float]) -> str:
    """The figures of an evaluation in a line."""
    return (
        f"held-out loss {metrics['loss']:.4f}, entities: F1 {metrics['f1']:.1%} (precision {metrics['precision']:.1%}, "
        f"recall {metrics['recall']:.1%}), accuracy by word {metrics['accuracy']:.1%}"
    )
