"""Does a run train as well as the stock libraries? Equal settings and seed, one process each, the same data.

    python benchmarks/stock_parity.py --model ../shared/data/small-gpt2 --data ../shared/data/gsm8k/train.jsonl \
        --eval-data ../shared/data/gsm8k/test.jsonl

`stock` is what a careful user writes by hand: transformers' `from_pretrained` with `BitsAndBytesConfig`, PEFT's
`get_peft_model`, and `Trainer`, with bitsandbytes' repacking at the first evaluation avoided (it would break the
training on CPUs with AVX512-BF16). It shares no code with qlora_kit but the reading and batching of the data, so
that both are fed the same tokens; `ours` is `qlora_kit.train`. Both are then scored by the same plain loop.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import commit, device_name, write_result

from qlora_kit.config.settings import AdapterConfig, BaseConfig, DataConfig, EvalConfig, OptimConfig, RunConfig

BOUND = 0.005  # the held-out losses may differ by this share


def run_config(args: argparse.Namespace, out: str) -> RunConfig:
    """The settings of both contenders."""
    return RunConfig(
        base=BaseConfig(model=args.model, bits=4),
        adapter=AdapterConfig(r=args.r, adapter_dtype=args.adapter_dtype),
        data=DataConfig(data=args.data, seq_len=args.seq_len),
        optim=OptimConfig(optim="adamw", lr=args.lr, max_steps=args.max_steps, batch_size=args.batch_size, warmup=0.0),
        evaluation=EvalConfig(keep_checkpoints=1),
        seed=args.seed,
        out=out,
    )


def encoded(args: argparse.Namespace, tokenizer: Any, source: str, limit: int | None = None) -> Any:
    """The data as both contenders see it."""
    from qlora_kit import data

    examples = data.read_examples(source, {})[:limit]
    return data.encode_set(examples, tokenizer, seq_len=args.seq_len, train_on="answer")


def train_ours(args: argparse.Namespace, out: str) -> tuple[Any, list[float]]:
    """Train with qlora_kit; returns a freshly loaded base with the adapter, and the loss of every step."""
    from qlora_kit import train
    from qlora_kit.adapters.files import load_adapter
    from qlora_kit.model.device import resolve_device
    from qlora_kit.model.load import load_base

    config = run_config(args, out)
    result = train(config)
    lines = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    model = load_adapter(load_base(config.base, resolve_device("auto")), result.adapter)
    return model, [line["loss"] for line in lines if "loss" in line]


def train_stock(args: argparse.Namespace, out: str, tokenizer: Any) -> tuple[Any, list[float]]:
    """Train with transformers, PEFT and bitsandbytes alone; returns the model and the loss of every step."""
    import torch
    from bitsandbytes.nn import Linear4bit
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments, set_seed

    from qlora_kit.data import Collator

    four_bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    base = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=torch.bfloat16, quantization_config=four_bits, device_map={"": device}
    )
    for module in base.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
    set_seed(args.seed)
    lora = LoraConfig(r=args.r, lora_alpha=2 * args.r, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, lora)  # PEFT keeps the factors in fp32
    arguments = TrainingArguments(
        output_dir=out,
        per_device_train_batch_size=args.batch_size,
        max_steps=args.max_steps,
        learning_rate=args.lr,
        lr_scheduler_type="cosine",
        optim="adamw_torch",
        seed=args.seed,
        use_cpu=device == "cpu",
        save_strategy="no",
        report_to=[],
        remove_unused_columns=False,
        logging_steps=1,
        disable_tqdm=True,
    )
    collator = Collator(tokenizer.pad_token_id, max_tokens=args.seq_len)
    trainer = Trainer(model, arguments, collator, encoded(args, tokenizer, args.data))
    trainer.train()
    return model, [line["loss"] for line in trainer.state.log_history if "loss" in line]


def score(args: argparse.Namespace, model: Any, tokenizer: Any) -> tuple[float, int]:
    """Mean held-out loss over every supervised token, row by row in fp32, by a plain loop."""
    import torch

    total, tokens = 0.0, 0
    model.eval()
    with torch.no_grad():
        for row in encoded(args, tokenizer, args.eval_data, args.eval_limit):
            ids = torch.tensor([row["input_ids"]], device=model.device)
            labels = torch.tensor(row["labels"], device=model.device)
            logp = model(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
            wanted = labels[1:] != -100
            total -= float(logp[wanted].gather(1, labels[1:][wanted, None]).sum())
            tokens += int(wanted.sum())
    return total / tokens, tokens


def contend(args: argparse.Namespace) -> None:
    """Train and score one contender; prints its row as JSON."""
    from qlora_kit.data import prepare_tokenizer
    from qlora_kit.model.tokenizer import load_tokenizer
    from qlora_kit.system.quiet import quiet_libraries

    quiet_libraries()
    tokenizer = prepare_tokenizer(load_tokenizer(BaseConfig(model=args.model)))
    with tempfile.TemporaryDirectory() as folder:
        start_s = time.monotonic()
        out = str(Path(folder) / "run")
        ours = args.contender == "ours"
        model, losses = train_ours(args, out) if ours else train_stock(args, out, tokenizer)
        train_s = time.monotonic() - start_s
        loss, tokens = score(args, model, tokenizer)
    row = {"eval_loss": loss, "eval_tokens": tokens, "train_s": round(train_s, 1), "losses": losses}
    print(json.dumps(row))


def main() -> int:
    """Run both contenders and compare them; exits with 1 outside the bound."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--eval-data", required=True)
    parser.add_argument("--eval-limit", type=int, default=None, help="score only so many held-out examples")
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-steps", type=int, default=200)
    parser.add_argument("--adapter-dtype", default="bf16")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--contender", choices=["ours", "stock"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contender:
        contend(args)
        return 0
    rows = {name: _in_own_process(name) for name in ("stock", "ours")}
    difference = rows["ours"]["eval_loss"] / rows["stock"]["eval_loss"] - 1
    settings = {k: (Path(v).name if k in ("model", "data") else v) for k, v in vars(args).items() if k != "contender"}
    settings["eval_data"] = Path(args.eval_data).name
    result = {"settings": settings, "rows": rows, "difference": difference, "bound": BOUND}
    file = write_result("stock_parity", result)
    print(f"stock {rows['stock']['eval_loss']:.4f}  ours {rows['ours']['eval_loss']:.4f}  difference {difference:+.3%}")
    print(f"on {device_name()} at {commit()}, written to {file.name}")
    return 0 if abs(difference) <= BOUND else 1


def _in_own_process(contender: str) -> dict[str, Any]:
    command = [sys.executable, __file__, *sys.argv[1:], "--contender", contender]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


if __name__ == "__main__":
    sys.exit(main())
