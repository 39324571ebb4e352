"""How well classes are told apart: figures, a report class by class, and a confusion matrix as a picture.

N examples, L classes. Labels and answers are numbers (N,), or with several to an example 0 and 1 for each (N, L).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from qlora_kit.system.files import write_bytes
from qlora_kit.tasks.evaluation import Scores
from qlora_kit.tasks.report import table, write_scores

if TYPE_CHECKING:
    import numpy as np

PICTURE_FILE = "confusion.png"
SHOWN_NUMBERS = 20  # the numbers of a matrix of more classes would not be legible
MAX_PICTURED = 60
SHOWN_CHARACTERS = 30  # of a label in the picture


def class_metrics(labels: np.ndarray, answers: np.ndarray) -> dict[str, float]:
    """Accuracy (of several labels: all of an example's right), and F1 over the classes that occur.

    `f1` is the plain mean over classes, `f1_weighted` the one by how many examples each has.
    """
    from sklearn.metrics import accuracy_score, f1_score

    labels, answers = _as_indicators(labels), _as_indicators(answers)
    options: dict[str, Any] = {"zero_division": 0, "labels": occurring(labels, answers)}
    return {
        "accuracy": float(accuracy_score(labels, answers)),
        "f1": float(f1_score(labels, answers, average="macro", **options)),
        "f1_weighted": float(f1_score(labels, answers, average="weighted", **options)),
    }


def _as_indicators(numbers: np.ndarray) -> np.ndarray:
    """The same, with a label that nobody has behind the only one of several.

    scikit-learn takes a single column of 0 and 1 for numbers of classes, and would count absences as class 0.
    """
    import numpy as np

    return np.pad(numbers, ((0, 0), (0, 1))) if numbers.shape[1:] == (1,) else numbers


def occurring(labels: np.ndarray, answers: np.ndarray) -> list[int]:
    """The classes that some example has or was given."""
    import numpy as np

    if labels.ndim == 2:
        return [int(number) for number in np.flatnonzero((labels | answers).any(axis=0))] or [0]
    return sorted({int(number) for number in labels} | {int(number) for number in answers})


def class_report(labels: np.ndarray, answers: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    """Precision, recall, F1 and examples of each class that occurs, their means, and the confusion matrix.

    The matrix is L × L, rows the true classes, columns the answers; of several labels to an example L × 2 × 2 ones.
    """
    from sklearn.metrics import classification_report, confusion_matrix, multilabel_confusion_matrix

    labels, answers = _as_indicators(labels), _as_indicators(answers)
    present = occurring(labels, answers)
    report = classification_report(
        labels,
        answers,
        labels=present,
        target_names=[names[number] for number in present],
        output_dict=True,
        zero_division=0,
    )
    if labels.ndim == 2:
        matrix = multilabel_confusion_matrix(labels, answers, labels=list(range(len(names))))
    else:
        matrix = confusion_matrix(labels, answers, labels=list(range(len(names))))
    return {"labels": list(names), "report": report, "confusion": matrix.tolist()}


def said(metrics: Mapping[str, float]) -> str:
    """The figures of an evaluation in a line."""
    return (
        f"held-out loss {metrics['loss']:.4f}, accuracy {metrics['accuracy']:.1%}, F1 {metrics['f1']:.1%} "
        f"(weighted {metrics['f1_weighted']:.1%})"
    )


def write_report(scores: Scores, folder: Path) -> None:
    """Write the report and the picture into `folder`."""
    write_scores(scores, folder)
    names, matrix = scores.report["labels"], scores.report["confusion"]
    if len(names) <= MAX_PICTURED:
        write_bytes(folder / PICTURE_FILE, draw_confusion(matrix, names))


def tables(scores: Scores) -> list[Table]:
    """The report class by class."""
    return [table(scores.report["report"])]


def draw_confusion(matrix: Sequence[Any], names: Sequence[str]) -> bytes:
    """The confusion matrix as a PNG: shares of each true class; of several labels each one's four outcomes."""
    import io

    import numpy as np
    from matplotlib.figure import Figure

    counts = np.asarray(matrix)
    columns: Sequence[str] = names
    whole = "the examples with the label"
    if counts.ndim == 3:
        whole = "all examples"
        counts = counts.reshape(len(names), 4)
        columns = ("rightly absent", "wrongly given", "missed", "rightly given")
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = max(3.2, 0.45 * len(names))
    figure = Figure(figsize=(max(3.2, 0.45 * len(columns)) + 2.2, side + 1.2), dpi=120, layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    as_they_are: dict[str, Any] = {"parse_math": False}  # $5-$10 is no formula
    axes.set_xticks(
        range(len(columns)), map(_short, columns), rotation=45, ha="right", rotation_mode="anchor", **as_they_are
    )
    axes.set_yticks(range(len(names)), map(_short, names), **as_they_are)
    axes.set_xlabel("answer")
    axes.set_ylabel("label")
    if len(names) <= SHOWN_NUMBERS:
        for (row, column), count in np.ndenumerate(counts):
            colour = "white" if shares[row, column] > 0.6 else "black"
            axes.text(column, row, f"{count:,}", ha="center", va="center", color=colour, fontsize=9)
    figure.colorbar(image, ax=axes, label=f"share of {whole}")
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # there is a box in its place
        figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _short(name: str) -> str:
    """As much of a label as leaves room for the matrix, on one line."""
    name = " ".join(name.split())
    return name if len(name) <= SHOWN_CHARACTERS else f"{name[:SHOWN_CHARACTERS]}…"
