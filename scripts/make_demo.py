"""Remake the embedded demo: its tokenizer, its toy base model and its data set, all from generated text.

    python scripts/make_demo.py            # remake qlora_kit/demo/base and qlora_kit/demo/data
    python scripts/make_demo.py --check    # remake in a temporary folder and compare with what is there

Needs no network and no GPU. Every random draw follows from seeds, so that the same versions of the libraries on
the same kind of CPU give the same bytes; elsewhere rounding differs and the metrics agree within `TOLERANCE`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from random import Random

import tokenizers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from qlora_kit import demo
from qlora_kit.demo import text

EOS = "<|endoftext|>"
VOCAB_LIMIT = 896  # the toy language runs out of merges before
TOKENIZER_DOCUMENTS = 20_000
POSITIONS = 128
IGNORED = -100  # the label that the loss skips
BATCH = 32  # documents
POOL = 16  # batches whose documents are sorted by length together
STEPS = 1000
MATRIX_LR = 0.02  # of Muon
OTHER_LR = 3e-3  # of AdamW
WARMUP_STEPS = 60
SEED = 0
THREADS = 1  # part of the recipe: the order of sums depends on it
HELD_OUT_BATCHES = 16
BYTE_LIMIT = 3_000_000  # of the base's folder
TOLERANCE = {"held_out_loss": 0.02, "task_exact_match": 0.02}  # absolute; between CPUs and versions


def train_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE (any text encodes, nothing is unknown) whose merges cover every word of the toy language."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_LIMIT,
        special_tokens=[EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(islice(text.pretraining_text(text.PRETRAIN_SEED), TOKENIZER_DOCUMENTS), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=EOS,
        eos_token=EOS,
        pad_token=EOS,
        model_max_length=POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def encoded(seed: int, tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """The token ids of each document of fresh text without end, closed by the end-of-text token."""
    for document in text.pretraining_text(seed):
        ids = [*tokenizer(document)["input_ids"], tokenizer.eos_token_id]
        assert len(ids) <= POSITIONS, document
        yield ids


def batches(seed: int, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Token ids and labels (-100 in the padding), each (BATCH, T), without end.

    A row is one document, as a prompt is one story. Batches are cut from `POOL` batches' documents sorted by length,
    so that few positions are padding, and come in a shuffled order. Nothing but padding follows a document: causal
    attention needs no mask.
    """
    source, order = encoded(seed, tokenizer), Random(seed)  # noqa: S311  # reproducible text, no secret
    while True:
        pool = sorted(islice(source, BATCH * POOL), key=len)
        groups = [pool[start : start + BATCH] for start in range(0, len(pool), BATCH)]
        order.shuffle(groups)
        for group in groups:
            ids = [torch.tensor(row) for row in group]
            yield (
                pad_sequence(ids, batch_first=True, padding_value=tokenizer.pad_token_id),
                pad_sequence(ids, batch_first=True, padding_value=IGNORED),
            )


def pace(step: int) -> float:
    """The learning rates' factor: a linear warmup, then a cosine down to a twentieth."""
    if step < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS
    return 0.525 + 0.475 * math.cos(math.pi * (step - WARMUP_STEPS) / max(1, STEPS - WARMUP_STEPS))


def sinusoids(positions: int, width: int) -> torch.Tensor:
    """(positions, width) sines and cosines with a mean square of 1, wavelengths 2π to 2000π."""
    rates = torch.exp(-math.log(1000) * torch.arange(width // 2) / (width // 2))
    angles = torch.arange(positions)[:, None] * rates
    return math.sqrt(2) * torch.cat([angles.sin(), angles.cos()], dim=1)


def new_model(tokenizer: PreTrainedTokenizerBase) -> GPT2LMHeadModel:
    """GPT-2's architecture, small; every linear layer holds whole NF4 blocks of 64 weights.

    Position embeddings are trained, but from sinusoids: neighbours are related from the start, so that attention to
    the previous token, which copying builds on, need not be found for each position apart.
    """
    torch.manual_seed(SEED)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=POSITIONS,
        n_embd=128,
        n_layer=4,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        model.transformer.wpe.weight.copy_(config.initializer_range * sinusoids(POSITIONS, config.n_embd))
    return model


def next_token_loss(model: GPT2LMHeadModel, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in fp32, in nats per token, of `labels` (B, T) given `ids` (B, T)."""
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, :-1].float()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)


def optimizers(model: GPT2LMHeadModel) -> list[torch.optim.Optimizer]:
    """Muon for the matrices in the blocks, AdamW for the rest.

    After 400 steps of AdamW alone a colour that the story names was still a guess among all 12; of Muon, it was known.
    """
    matrices = [p for p in model.transformer.h.parameters() if p.ndim == 2]
    others = [p for name, p in model.named_parameters() if p.ndim == 1 or ".h." not in name]
    return [
        torch.optim.Muon(matrices, lr=MATRIX_LR, weight_decay=0.0),
        torch.optim.AdamW(others, lr=OTHER_LR, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def pretrain(tokenizer: PreTrainedTokenizerBase) -> GPT2LMHeadModel:
    """Train the base from scratch in fp32 on `STEPS` batches of generated text, and round it to bf16."""
    model = new_model(tokenizer)
    steppers = optimizers(model)
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in steppers]
    start = time.monotonic()
    for step, (ids, labels) in enumerate(islice(batches(text.PRETRAIN_SEED, tokenizer), STEPS)):
        loss = next_token_loss(model, ids, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, peak in zip(steppers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * pace(step)
            optimizer.step()
            optimizer.zero_grad()
        if step % 50 == 0 or step == STEPS - 1:
            print(f"step {step:5d}  loss {loss.item():.4f}  {time.monotonic() - start:6.1f} s", flush=True)
    return model.to(torch.bfloat16).eval()


@torch.no_grad()
def held_out_loss(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerBase) -> float:
    """Mean cross-entropy (nats per token) on `HELD_OUT_BATCHES` batches of text that pretraining did not draw."""
    losses, weights = [], []
    for ids, labels in islice(batches(text.HELD_OUT_SEED, tokenizer), HELD_OUT_BATCHES):
        losses.append(next_token_loss(model, ids, labels).item())
        weights.append(int((labels[:, 1:] != IGNORED).sum()))
    return sum(loss * weight for loss, weight in zip(losses, weights, strict=True)) / sum(weights)


@torch.no_grad()
def task_exact_match(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerBase) -> float:
    """Share of the task's held-out prompts that the base, greedy and zero-shot, answers with the very record."""
    examples = text.task_examples()[1]
    tokenizer.padding_side = "left"
    inputs = tokenizer([e["prompt"] + "\n" for e in examples], return_tensors="pt", padding=True)
    longest = max(len(tokenizer(e["completion"])["input_ids"]) for e in examples) + 1
    inputs.pop("token_type_ids", None)
    ids = model.generate(**inputs, max_new_tokens=longest, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    answers = tokenizer.batch_decode(ids, skip_special_tokens=True)
    return sum(a.strip() == e["completion"] for a, e in zip(answers, examples, strict=True)) / len(examples)


def write_data(folder: Path) -> None:
    """`train.jsonl` and `eval.jsonl` of the task."""
    folder.mkdir(parents=True)
    for name, examples in zip(("train", "eval"), text.task_examples(), strict=True):
        lines = "".join(json.dumps(example) + "\n" for example in examples)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")


def write_base(folder: Path) -> None:
    """Train and save tokenizer and model, then measure what was saved, as anyone would load it."""
    tokenizer = train_tokenizer()
    start = time.monotonic()
    pretrain(tokenizer).save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # it is written for its owner alone; a package is for everyone
    tokenizer.save_pretrained(folder)
    seconds = time.monotonic() - start
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    reloaded = AutoTokenizer.from_pretrained(folder)
    metrics = {
        "held_out_loss": round(held_out_loss(model, reloaded), 4),
        "uniform_loss": round(math.log(len(reloaded)), 4),
        "task_exact_match": task_exact_match(model, reloaded),
        "parameters": model.num_parameters(),
        "vocabulary": len(reloaded),
        "pretraining_steps": STEPS,
        "pretraining_documents": STEPS * BATCH,
        "pretraining_minutes_on_1_core": round(seconds / 60, 1),
        "seed": SEED,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
    }
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(README.format(**metrics), encoding="utf-8")
    size = sum(path.stat().st_size for path in folder.iterdir())
    if size > BYTE_LIMIT:
        raise SystemExit(f"the base's folder has {size} bytes, more than {BYTE_LIMIT}")


README = """\
# The demo's base model

A toy. {parameters:,} parameters in GPT-2's architecture (4 layers, width 128, {vocabulary} tokens, 128 positions, in
bf16), trained from scratch on text that `qlora_kit/demo/text.py` generates: short English stories about people who
pass things on, with questions and remarks that recall them. It knows some 130 names, things, places, colours and
numbers, and nothing else of English or of the world. It is here so that `make demo` is a real fine-tuning run on a
machine without network or GPU; it is useful for nothing else, and says nothing about how larger models behave.

| Figure | Value |
|---|---|
| Loss on held-out generated text (nats per token, bf16) | {held_out_loss} |
| Loss of a uniform guess, for comparison | {uniform_loss} |
| Demo task, 200 held-out examples, exact match without fine-tuning | {task_exact_match:.1%} |
| Pretraining | {pretraining_steps} steps, {pretraining_documents:,} documents, seed {seed}, \
{pretraining_minutes_on_1_core} min on 1 CPU core |
| Made with | Python {python}, torch {torch}, transformers {transformers}, tokenizers {tokenizers} |

The loss does not go near 0: what a story says is drawn at random and cannot be predicted, only what recalls it can.

**The task** (`../data`): read a story, write its facts as a record, `from: …; to: …; item: …; colour: …; count: …;
place: …`. Pretraining never shows that form, and no giver and receiver of a held-out story occur together (in those
roles) in the task's training stories. The stories themselves are the pretraining's own kind: the base can read them,
and fine-tuning teaches it what to write. Text of any other kind is beyond it.

**Remaking it** needs this repository and its installed dependencies only:

    python scripts/make_demo.py            # writes this folder and ../data again
    python scripts/make_demo.py --check    # remakes both elsewhere and compares

On the same kind of CPU with the versions above the files come out the same, byte for byte (but for the minutes that
this file and `metrics.json` quote); elsewhere the figures agree within the tolerances in the script.
"""


def put_in_place(built: Path, target: Path) -> None:
    """Replace folder `target` by `built`, its sibling: whole or not at all."""
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    built.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def make(root: Path) -> None:
    """Build `base` and `data` in hidden folders in `root`, then put both in place."""
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root, prefix=".make_demo-") as scratch:
        write_data(Path(scratch) / "data")
        write_base(Path(scratch) / "base")
        put_in_place(Path(scratch) / "data", root / "data")
        put_in_place(Path(scratch) / "base", root / "base")


def differences(committed: Path, remade: Path) -> list[str]:
    """What in `remade` is not what `committed` says, beyond `TOLERANCE`; prints what was compared."""
    faults = []
    for name in ("data/train.jsonl", "data/eval.jsonl", "base/tokenizer.json", "base/config.json"):
        same = _digest(committed / name) == _digest(remade / name)
        print(f"{name}: {'the same bytes' if same else 'differs'}")
        if not same and name != "base/config.json":  # which also records the version of transformers
            faults.append(f"{name} differs")
    weights = _digest(committed / "base/model.safetensors") == _digest(remade / "base/model.safetensors")
    print(f"base/model.safetensors: {'the same bytes' if weights else 'differs (as it may: see the metrics)'}")
    before, after = (json.loads((root / "base/metrics.json").read_text("utf-8")) for root in (committed, remade))
    for name, tolerance in TOLERANCE.items():
        print(f"{name}: {before[name]} committed, {after[name]} remade, tolerance {tolerance}")
        if abs(before[name] - after[name]) > tolerance:
            faults.append(f"{name} is {after[name]}, not {before[name]}")
    return faults


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main() -> int:
    """Remake the demo, or check it; returns 1 where the check fails."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="remake in a temporary folder and compare the metrics")
    check = parser.parse_args().check
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    root = demo.base_folder().parent
    if not check:
        make(root)
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        make(Path(scratch))
        faults = differences(root, Path(scratch))
    print("\n".join(faults) or "The demo remakes as committed.")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
