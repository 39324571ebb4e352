"""Does text to text learn what it should? A made language, word for word, on tiny encoder-decoders made here.

    python benchmarks/made_language.py

For want of a pretrained model each base first learns to repeat sentences of both languages (every weight trains), some
of 20 words in one order, for T5 knows of positions only how far apart they are. Then
4-bit QLoRA teaches it to say each word in the made language, and the run is merged. BLEU of the base, of the run
(`qlora-kit predict`) and of the release as stock transformers loads it are taken by the same plain call of sacrebleu on
held-out sentences. The release must say the very texts of the run.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import commit, device_name, write_result

WORDS = 20
KINDS = {"t5": 3e-3, "bart": 1e-3, "marian": 1e-3}  # with the learning rate at which it learns to repeat
BOUND = 90.0  # BLEU that a run must reach
PAD, END, BEGIN, UNKNOWN = "<pad>", "</s>", "<s>", "<unk>"
CHECKED = "The answer is 42 ."  # what every tokenizer is tried with


def save_base(folder: Path, kind: str) -> None:
    """Write a random model of `kind` with a tokenizer of whole words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import AutoConfig, AutoModelForSeq2SeqLM, PreTrainedTokenizerFast

    said = [f"{letter}{number}" for letter in "wm" for number in range(WORDS)]
    words = {word: number for number, word in enumerate([PAD, END, BEGIN, UNKNOWN, *said, *CHECKED.split()])}
    raw = Tokenizer(models.WordLevel(words, unk_token=UNKNOWN))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token=END, pad_token=PAD, unk_token=UNKNOWN, model_max_length=64
    )
    shared: dict[str, Any] = {"vocab_size": 64, "d_model": 128, "pad_token_id": 0, "eos_token_id": 1, "dropout": 0.0}
    sizes = {"layers": 2, "attention_heads": 4, "ffn_dim": 256}
    stacks = {f"{part}_{name}": size for part in ("encoder", "decoder") for name, size in sizes.items()}
    own: dict[str, Any] = {
        **stacks,
        "max_position_embeddings": 64,
        "decoder_start_token_id": 1 if kind == "bart" else 0,
        "forced_eos_token_id": None,
        "init_std": 0.08,
    }
    if kind == "t5":
        own = {"d_kv": 32, "d_ff": 256, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
        own |= {"dropout_rate": 0.0, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    if kind == "marian":
        own |= {"decoder_vocab_size": 64}
    torch.manual_seed(0)
    AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(kind, **shared, **own)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_pairs(file: Path, count: int, seed: int, translates: bool) -> Path:
    """Write `count` sentences of 4 to 7 words: of either language to be repeated, or to be said in the made one."""
    draw = random.Random(seed)  # noqa: S311  # not a secret
    meaning = random.Random(0).sample(range(WORDS), WORDS)  # noqa: S311  # not a secret
    lines = []
    for number in range(count):
        sentence = sorted(draw.sample(range(WORDS), draw.randint(4, 7)))
        known, made = (" ".join(words) for words in zip(*((f"w{n}", f"m{meaning[n]}") for n in sentence), strict=True))
        repeated = made if number % 2 else known
        source, target = (known, made) if translates else (repeated, repeated)
        lines.append(json.dumps({"source": source, "target": target}))
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def trained(kind: str, model: Path, data: Path, out: Path, args: argparse.Namespace, full: bool) -> Path:
    """Train on `data`; returns the run folder."""
    from qlora_kit import AdapterConfig, BaseConfig, DataConfig, OptimConfig, RunConfig, train

    steps, lr = (args.copy_steps, KINDS[kind]) if full else (args.steps, args.lr)
    return train(
        RunConfig(
            base=BaseConfig(model=str(model), bits=32 if full else 4, full=full),
            adapter=AdapterConfig(r=args.r, adapter_dtype="fp32"),
            data=DataConfig(data=str(data), seq_len=16),
            optim=OptimConfig(optim="adamw", lr=lr, batch_size=32, max_steps=steps, gradient_checkpointing=False),
            seed=args.seed,
            out=str(out),
            preflight=False,
        )
    ).folder


def predicted(folder: Path, asked: Path, setting: str) -> list[str]:
    """What `qlora-kit predict` says of the run or model in `folder`."""
    from qlora_kit.cli.main import main

    out = asked.with_name(f"answers-{folder.name}.jsonl")
    main(["predict", setting, str(folder), "--data", str(asked), "--seq-len", "16", "--out", str(out)])
    return [json.loads(line)["text"] for line in out.read_text(encoding="utf-8").splitlines()]


def said_by_stock(release: Path, asked: Path) -> list[str]:
    """What stock transformers says with the release, one sentence at a time."""
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(release), AutoTokenizer.from_pretrained(release)
    texts = []
    for line in asked.read_text(encoding="utf-8").splitlines():
        ids = tokenizer(json.loads(line)["source"], return_tensors="pt")["input_ids"]
        out = model.generate(input_ids=ids, max_new_tokens=16, do_sample=False, num_beams=1)
        texts.append(tokenizer.decode(out[0], skip_special_tokens=True))
    return texts


def bleu(answers: list[str], asked: Path) -> float:
    """BLEU of the answers, of 100."""
    import sacrebleu

    targets = [json.loads(line)["target"] for line in asked.read_text(encoding="utf-8").splitlines()]
    return round(float(sacrebleu.corpus_bleu(answers, [targets]).score), 1)


def measure(kind: str, args: argparse.Namespace, place: Path) -> dict[str, Any]:
    """Make a base of `kind`, train and merge it; the figures."""
    from qlora_kit.cli.main import main

    save_base(place / "random", kind)
    repeats = save_pairs(place / "repeats.jsonl", 20_000, 1, translates=False)
    base = trained(kind, place / "random", repeats, place / "copier", args, full=True) / "model"
    data = save_pairs(place / "train.jsonl", 8000, 2, translates=True)
    asked = save_pairs(place / "dev.jsonl", 200, 3, translates=True)
    start_s = time.monotonic()
    run = trained(kind, base, data, place / "run", args, full=False)
    run_s = round(time.monotonic() - start_s, 1)
    main(["merge", "--run", str(run), "--out", str(place / "release"), "--dtype", "fp32"])
    answers, stock = predicted(run, asked, "--run"), said_by_stock(place / "release", asked)
    scores = {"base": bleu(predicted(base, asked, "--model"), asked), "run": bleu(answers, asked)}
    return {"kind": kind, "bleu": {**scores, "release": bleu(stock, asked)}, "same": answers == stock, "run_s": run_s}


def main() -> int:
    """Measure every kind; exits with 1 where one does not learn, or its release says something else."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--copy-steps", type=int, default=500)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--seed", type=int, default=42)
    args = parser.parse_args()
    rows = []
    for kind in args.kinds.split(","):
        with tempfile.TemporaryDirectory() as place:
            rows.append(measure(kind, args, Path(place)))
        print(rows[-1])
    file = write_result("made_language", {"settings": vars(args), "rows": rows, "bound": BOUND})
    print(f"on {device_name()} at {commit()}, written to {file.name}")
    return 0 if all(row["same"] and row["bleu"]["run"] >= BOUND for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
