"""The folds of the data: each is held out once while the others train (k-fold cross-validation).

Source: Hastie, Tibshirani, Friedman, The Elements of Statistical Learning, §7.10.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from qlora_kit import data
from qlora_kit.errors import UserError, named
from qlora_kit.runs.inputs import Examples


def stratum_of(example: data.Example) -> str | None:
    """The class of an example, whose proportion is the same in every fold; None if it has none.

    It is the example's only label; several labels are not a class.
    """
    labels: tuple[str, ...] = getattr(example, "labels", ())
    return labels[0] if len(labels) == 1 else None


def make_folds(examples: Sequence[data.Example], n_folds: int, seed: int, source: str) -> list[Examples]:
    """`n_folds` divisions of `examples`, drawn by `seed`; both parts of each keep the order of the examples.

    Every example is held out once. Where every example has a class, each part holds the classes in proportion.
    Raises `UserError`, which names the data `source`, for fewer examples than folds and for a part of one class.
    """
    if len(examples) < n_folds:
        rule = f"is more than the {len(examples)} examples in {source}"
        raise UserError.of("folds", n_folds, rule, "Give fewer folds or more data.")
    strata = [stratum_of(example) for example in examples]
    classes = [stratum for stratum in strata if stratum is not None]
    if len(classes) < len(examples):
        return list(_divided(examples, _splits(len(examples), n_folds, seed)))
    _check_classes(classes, n_folds, source)
    folds = list(_divided(examples, _stratified_splits(classes, n_folds, seed)))
    for number, fold in enumerate(folds, start=1):
        _check_fold(fold, number, n_folds, Counter(classes))
    return folds


def _divided(examples: Sequence[data.Example], splits: Iterable[tuple[list[int], list[int]]]) -> Iterator[Examples]:
    for train, held_out in splits:
        yield Examples([examples[index] for index in train], [examples[index] for index in held_out])


def _splits(count: int, n_folds: int, seed: int) -> list[tuple[list[int], list[int]]]:
    from sklearn.model_selection import KFold  # here, since it is slow to import

    splitter = KFold(n_folds, shuffle=True, random_state=seed)
    return [(train.tolist(), held_out.tolist()) for train, held_out in splitter.split(range(count))]


def _stratified_splits(classes: Sequence[str], n_folds: int, seed: int) -> list[tuple[list[int], list[int]]]:
    from sklearn.model_selection import StratifiedKFold

    numbers = {stratum: number for number, stratum in enumerate(dict.fromkeys(classes))}
    coded = [numbers[stratum] for stratum in classes]
    splitter = StratifiedKFold(n_folds, shuffle=True, random_state=seed)
    with warnings.catch_warnings():  # a rare class is missing from some folds, which cannot be helped
        warnings.filterwarnings("ignore", message="The least populated class", category=UserWarning)
        splits = list(splitter.split(coded, coded))
    return [(train.tolist(), held_out.tolist()) for train, held_out in splits]


def _check_classes(classes: Sequence[str], n_folds: int, source: str) -> None:
    counts = Counter(classes)
    if len(counts) == 1:
        rule = f"has only one class, {classes[0]!r}"
        raise UserError.of("data", source, rule, "Give examples of the other classes.")
    (_, most), *_ = counts.most_common(1)
    if most < n_folds:
        rule = f"is more than the {most} examples of the largest class"
        raise UserError.of("folds", n_folds, rule, f"Give at most {most}, or more data.")


def _check_fold(fold: Examples, number: int, n_folds: int, counts: Counter[str]) -> None:
    """Raises `UserError` if a part has only one class: nothing can be learned from it, or measured on it."""
    for part, examples in (("held-out", fold.held_out), ("training", fold.train)):
        found = {stratum_of(example) for example in examples}
        if len(found) == 1:
            rarest, count = counts.most_common()[-1]
            rule = f"leaves the {part} part of fold {number} with only one class, {found.pop()!r}"
            fewer = f"Give at most {named('folds', count)}, or give" if count > 1 else "Give"
            remedy = f"{fewer} more examples of the rarest class, {rarest!r} (it has {count})."
            raise UserError.of("folds", n_folds, rule, remedy)
