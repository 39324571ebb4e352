"""Make a folder of fixtures: what today's commands leave behind, and what today's code reads out of it.

    python tests/upgrades/make_fixtures.py tests/upgrades/fixtures/0.1.0-becb071

Run it by hand, on a clean checkout, for every commit whose files later code must still take; commit the folder and
never change it. Everything of the package goes through `python -m qlora_kit`, in a working folder with relative paths.

    work/           the working folder: bases/, data/, search.yaml, and what the commands made: runs/, search/, release/
    MADE.json       how it was made (commit, versions, machine), what belongs to what, and what was read out of it
    logits.safetensors   of each release what stock transformers computes in fp32 for `IDS`
"""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
EOS_ID, CLS_ID, SEP_ID, PAD_ID, VOCAB = 256, 257, 258, 259, 320  # ids below 256 are bytes
IDS = [[CLS_ID, *b"3 red", SEP_ID]]  # what releases are asked for their logits
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "numpy")
ARITHMETIC = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS")
VECTOR_UNITS = re.compile(r"sse|avx|amx|fma|f16c|bf16|asimd|sve|neon")

COMMON = "--device cpu --batch-size 8 --seq-len 48"
SHORT = f"{COMMON} --r 4 --lr 2e-2 --max-steps 12 --no-preflight"
TEXT = f"{COMMON} --model bases/writer --data data/colours.jsonl --eval-data data/held-out.jsonl"
RUNS = {
    "runs/text": f"{TEXT} --r 4 --lr 3e-2 --max-steps 24 --save-steps 12 --exact-match 8",
    "runs/labels": f"{SHORT} --model bases/reader --data data/labels.jsonl --eval-fraction 0.25 --bits 8"
    " --variant lora-xs --save-steps 6",
    "runs/tags": f"{SHORT} --model bases/reader --data data/tags.conll --bits 16",
    "runs/answers": f"{SHORT} --model bases/reader --data data/answers.json --bits 32 --adapter-dtype fp32",
    "runs/pairs": f"{COMMON} --model bases/pairs --data data/pairs.jsonl --no-preflight --r 4 --lr 2e-2 --max-steps 24",
}
ONLY_READ = ("runs/tags", "runs/answers", "runs/pairs")  # kept without their checkpoints, which are as the others'
STOPPED, STOPPED_AT = "runs/stopped", "checkpoint-12"  # as runs/text, killed after this checkpoint
RESUMED = [  # a checkpoint, what --resume is given for it, and the run that it must become
    {"checkpoint": f"{STOPPED}.partial/checkpoints/{STOPPED_AT}", "resume": STOPPED, "like": "runs/text"},
    *(
        {"checkpoint": f"{run}/checkpoints/{name}", "resume": f"{run}/checkpoints/{name}", "like": run}
        for run, name in (("runs/text", "checkpoint-12"), ("runs/labels", "checkpoint-6"))
    ),
]
RELEASES = {"release/text": "runs/text", "release/labels": "runs/labels"}
SEARCH = {
    **{"model": "bases/writer", "data": "data/lines.jsonl", "device": "cpu", "bits": 4, "preflight": False},
    **{"r": [2, 4], "lr": [1e-5, 3e-2], "batch_size": 8, "seq_len": 48, "max_steps": 2, "warmup": 0.0, "folds": 2},
}
FINISHED_SEARCH, STOPPED_SEARCH = "search/finished", "search/stopped"
STOPPED_IN = "runs/r=4,lr=1e-05/fold-2.partial"  # the fold that the stopped search was at
QUESTIONS = [  # commands that only read, and print JSON
    "generate --run runs/text --data data/held-out.jsonl --max-new-tokens 8",
    "predict --run runs/labels --data data/asked-labels.jsonl",
    "predict --run runs/tags --data data/asked-tags.conll",
    "predict --run runs/answers --data data/asked-answers.json",
    "predict --run runs/pairs --data data/asked-pairs.jsonl",
    "eval --run runs/text --release release/text --json",
    "eval --run runs/labels --release release/labels --json",
    "generate --model release/text --data data/held-out.jsonl --max-new-tokens 8",
    "predict --model release/labels --data data/asked-labels.jsonl",
    "eval --model release/text --data data/held-out.jsonl --json",
]


# ------------------------------------------------------------------------------------------------ bases and data


def tokenizer(encloses: bool) -> Any:
    """One token a byte; with `encloses` <cls> before and <sep> behind each text, else no token of its own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={char: number for number, char in enumerate(alphabet)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens(["<|endoftext|>", "<cls>", "<sep>", "<pad>"])
    if not encloses:
        return PreTrainedTokenizerFast(
            tokenizer_object=raw, bos_token="<|endoftext|>", eos_token="<|endoftext|>", model_max_length=64
        )
    raw.post_processor = processors.TemplateProcessing(
        single="<cls>:0 $A:0 <sep>:0",
        pair="<cls>:0 $A:0 <sep>:0 $B:1 <sep>:1",
        special_tokens=[("<cls>", CLS_ID), ("<sep>", SEP_ID)],
    )
    tokens = {"cls_token": "<cls>", "sep_token": "<sep>", "pad_token": "<pad>", "eos_token": "<sep>"}
    return PreTrainedTokenizerFast(tokenizer_object=raw, model_max_length=64, **tokens)


def write_bases(work: Path) -> None:
    """Three random models of some 60,000 parameters each, in bf16."""
    import torch
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    writer = {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_inner": 64, "n_positions": 64}
    writer |= {"bos_token_id": EOS_ID, "eos_token_id": EOS_ID}
    writer |= dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
    reader = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    reader |= {"max_position_embeddings": 64, "pad_token_id": PAD_ID}
    reader |= dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)
    pairs = {"d_model": 64, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 2}
    pairs |= {"pad_token_id": PAD_ID, "eos_token_id": SEP_ID, "decoder_start_token_id": PAD_ID, "dropout_rate": 0.0}
    pairs |= {"tie_word_embeddings": False}
    kinds = {
        "writer": ("gpt2", writer, AutoModelForCausalLM),
        "reader": ("bert", reader, AutoModel),
        "pairs": ("t5", pairs, AutoModelForSeq2SeqLM),
    }
    for seed, (name, (kind, fields, auto_class)) in enumerate(kinds.items()):
        model = auto_class.from_config(AutoConfig.for_model(kind, vocab_size=VOCAB, **fields))
        draw = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight in model.parameters():
                noise = torch.randn(weight.shape, generator=draw)
                weight.copy_(noise * 0.15 if weight.ndim > 1 else weight + noise * 0.1)
        model.to(torch.bfloat16).save_pretrained(work / "bases" / name)
        tokenizer(encloses=kind != "gpt2").save_pretrained(work / "bases" / name)


def write_data(work: Path) -> None:
    """A few examples for each task, easy enough to be learned in a few steps."""
    answers = {"red": "stop", "green": "go", "blue": "wait", "grey": "ask"}
    asked = [(f"{number} {colour}", answer) for number in range(10) for colour, answer in answers.items()]
    prompts = [{"prompt": prompt, "completion": answer} for prompt, answer in asked]
    moods = [("good", "yes"), ("bad", "no"), ("good fine", "yes")]
    labels = [{"text": f"{mood} {number}", "label": label} for number in range(8) for mood, label in moods]
    ways = [("auf", "ja"), ("für", "nein")]
    pairs = [{"source": f"{source} {number}", "target": target} for number in range(8) for source, target in ways]
    (work / "data").mkdir()
    write_rows(work / "data" / "colours.jsonl", prompts[:32])
    write_rows(work / "data" / "held-out.jsonl", prompts[32:])
    write_rows(work / "data" / "lines.jsonl", [{"text": f"{number} and {number}"} for number in range(16)])
    write_rows(work / "data" / "labels.jsonl", labels)
    write_rows(work / "data" / "asked-labels.jsonl", labels[:3])
    write_rows(work / "data" / "pairs.jsonl", pairs)
    write_rows(work / "data" / "asked-pairs.jsonl", pairs[:2])
    people = ["Ann B-person\nLee I-person\nis O\nin O\nOslo B-place\n", "in O\nRome B-place\nis O\nBo B-person\n"]
    for name, repeats in (("tags", 6), ("asked-tags", 1)):
        text = "\n".join(people * repeats).replace(" ", "\t")
        (work / "data" / f"{name}.conll").write_text(text, encoding="utf-8")
    for name, count in (("answers", 12), ("asked-answers", 3)):
        (work / "data" / f"{name}.json").write_text(json.dumps(squad(count)) + "\n", encoding="utf-8")
    (work / "search.yaml").write_text(json.dumps(SEARCH, indent=1) + "\n", encoding="utf-8")  # JSON is YAML, too


def write_rows(file: Path, rows: list[dict[str, str]]) -> None:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def squad(count: int) -> dict[str, Any]:
    """So many questions with their answers, nested as SQuAD's."""
    paragraphs = []
    for number in range(count):
        context = f"{'it is ' * (number % 3)}Bo."
        answer = {"text": "Bo", "answer_start": context.index("Bo")}
        question = {"id": str(number), "question": f"who {number}?", "answers": [answer]}
        paragraphs.append({"context": context, "qas": [question]})
    return {"version": "1.1", "data": [{"title": "people", "paragraphs": paragraphs}]}


# ------------------------------------------------------------------------------------------------ the commands


def environment() -> dict[str, str]:
    """One thread, no GPU, no network, and the package of this checkout."""
    fixed = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    return {**os.environ, **fixed}


def command(words: list[str]) -> list[str]:
    return [sys.executable, "-m", "qlora_kit", *words]


def run(work: Path, words: list[str]) -> str:
    """Run a command to its end; returns what it prints on standard output."""
    print("qlora-kit", *words, flush=True)
    done = subprocess.run(command(words), cwd=work, env=environment(), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stdout


def stop(work: Path, words: list[str], moment: Callable[[], bool], how: signal.Signals) -> None:
    """Start a command, and send it `how` as soon as `moment` has come."""
    print("qlora-kit", *words, f"({how.name} in the middle)", flush=True)
    process = subprocess.Popen(command(words), cwd=work, env=environment(), stderr=subprocess.DEVNULL)
    while not moment():
        if process.poll() is not None:
            raise SystemExit("the command ended before it could be stopped")
        time.sleep(0.001)
    process.send_signal(how)
    process.wait()


def make(work: Path) -> None:
    """Let the commands make everything that is there after them."""
    for out, words in RUNS.items():
        run(work, ["train", *words.split(), "--out", out])
    for out in ONLY_READ:
        shutil.rmtree(work / out / "checkpoints")
    partial = work / f"{STOPPED}.partial"
    whole = partial / "checkpoints" / STOPPED_AT / "trainer_state.json"  # the last file of a checkpoint
    stop(work, ["train", *RUNS["runs/text"].split(), "--out", STOPPED], whole.is_file, signal.SIGKILL)
    if sorted(found.name for found in (partial / "checkpoints").iterdir()) != [STOPPED_AT]:
        raise SystemExit("the run was stopped too late: make the fixtures again")
    searching = ["search", "--config", "search.yaml", "--out"]
    run(work, [*searching, FINISHED_SEARCH])
    stop(work, [*searching, STOPPED_SEARCH], (work / STOPPED_SEARCH / STOPPED_IN).is_dir, signal.SIGTERM)
    for out, of in RELEASES.items():
        run(work, ["merge", "--run", of, "--out", out])


# ------------------------------------------------------------------------------------------------ what is recorded


def machine() -> dict[str, Any]:
    """What decides the last bits of a result beside the versions of the libraries."""
    import torch

    file = Path("/proc/cpuinfo")
    text = file.read_text(encoding="utf-8").split("\n\n")[0] if file.is_file() else ""
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in text.splitlines())}
    flags = fields.get("flags", fields.get("Features", "")).split()
    return {
        "system": platform.system(),
        "machine": platform.machine(),
        "cpu": {name: fields.get(name) for name in ("vendor_id", "cpu family", "model")},
        "vector units": sorted(flag for flag in flags if VECTOR_UNITS.search(flag)),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "limits": {name: os.environ.get(name) for name in ARITHMETIC},
    }


def versions() -> dict[str, str]:
    """Of the libraries that a result depends on."""
    return {name: importlib.metadata.version(name) for name in LIBRARIES}


def parsed(words: list[str], output: str) -> Any:
    """What a command of `QUESTIONS` printed: of an evaluation its figures, of answers a record each."""
    if words[0] == "eval":
        return figures(json.loads(output)["models"])
    return [json.loads(line) for line in output.splitlines()]


def figures(content: Any) -> Any:
    """Only the numbers in `content`, where they stand: the words beside them may become others."""
    if isinstance(content, Mapping):
        found = {name: figures(value) for name, value in content.items()}
        return {name: value for name, value in found.items() if value not in (None, {}, [])}
    if isinstance(content, list):
        kept = [figures(value) for value in content]
        return [] if all(value is None for value in kept) else kept
    return content if isinstance(content, (int, float)) else None


def logits_of(folder: Path) -> Any:
    """What stock transformers computes in fp32 with the release in `folder` for `IDS`: one row of numbers."""
    import torch
    import transformers

    kind = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"][0]
    model = getattr(transformers, kind).from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(torch.tensor(IDS)).logits
    return logits.reshape(-1, logits.shape[-1])[-1].contiguous()


def digests(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file in `folder`, by its path there."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def commit_of_package() -> str:
    """The last commit that changed the package, which must be as it is there."""
    ask = {"cwd": ROOT, "capture_output": True, "text": True, "check": True}
    if subprocess.run(["git", "status", "--porcelain", "qlora_kit"], **ask).stdout:
        raise SystemExit("qlora_kit/ is not as it was committed: commit it first")
    return subprocess.run(["git", "log", "-1", "--format=%H", "--", "qlora_kit"], **ask).stdout.strip()


def record(work: Path, commit: str) -> dict[str, Any]:
    """The content of MADE.json, for what was made in `work` by the package of `commit`."""
    answers = [
        {"words": words.split(), "answer": parsed(words.split(), run(work, words.split()))} for words in QUESTIONS
    ]
    return {
        "package": importlib.metadata.version("qlora_kit"),
        "commit": commit,
        "made": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "versions": versions(),
        "machine": machine(),
        "repeated": list(dict.fromkeys(own["like"] for own in RESUMED)),
        "resumed": RESUMED,
        "releases": RELEASES,
        "search": {"settings": "search.yaml", "finished": FINISHED_SEARCH, "stopped": STOPPED_SEARCH},
        "answers": answers,
        "files": digests(work),
    }


def main() -> None:
    """Make the folder that is named on the command line."""
    import torch
    from safetensors.torch import save_file

    commit = commit_of_package()
    torch.set_num_threads(1)
    folder = Path(sys.argv[1]).absolute()
    work = folder / "work"
    work.mkdir(parents=True)
    write_bases(work)
    write_data(work)
    make(work)
    made = record(work, commit)
    save_file({release: logits_of(work / release) for release in RELEASES}, folder / "logits.safetensors")
    (folder / "MADE.json").write_text(json.dumps(made, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
