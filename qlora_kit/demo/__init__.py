"""The embedded demo: a toy base model and a small data set that travel inside the package.

`text` makes every sentence of both, `scripts/make_demo.py` remakes the files. Nothing heavy is imported here.
"""

from __future__ import annotations

from pathlib import Path

_HERE = Path(__file__).resolve().parent


def base_folder() -> Path:
    """The toy base model with its tokenizer, in the layout of `save_pretrained`."""
    return _HERE / "base"


def train_file() -> Path:
    """The task's training examples: JSON lines with `prompt` and `completion`."""
    return _HERE / "data" / "train.jsonl"


def eval_file() -> Path:
    """The task's held-out examples, in the form of `train_file`."""
    return _HERE / "data" / "eval.jsonl"
