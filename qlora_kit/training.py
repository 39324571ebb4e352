"""The training run, from settings to a finished run folder."""

from __future__ import annotations

import dataclasses
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from qlora_kit import adapters, assembly, base, cards, data, quiet, runs, scoring
from qlora_kit.config import RunConfig
from qlora_kit.errors import Fault, UserError
from qlora_kit.progress import TrainingProgress, human_bytes, peak_bytes

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from qlora_kit.trainer import AdapterTrainer

SAMPLE_TOKENS = 64  # tokens of the answer shown at each evaluation
MAX_ANSWER_TOKENS = 256  # longest answer that exact match lets a model give


@dataclass(frozen=True)
class RunResult:
    """What a run leaves: its folder, the trained weights in it, and its figures."""

    folder: Path
    adapter: Path  # the model folder after `--full`
    steps: int
    train_loss: float
    eval_loss: float | None
    exact_match_before: float | None
    exact_match_after: float | None
    peak_bytes: int
    tokens_per_s: float


@dataclass(frozen=True)
class Inputs:
    """What is fed to the run: encoded sets, the held-out examples themselves, and the tokenizer."""

    tokenizer: PreTrainedTokenizerBase
    train: data.EncodedSet | data.PackedSet
    evaluation: data.EncodedSet | data.PackedSet | None
    held_out: list[data.Example]
    seq_len: int


def train(config: RunConfig, console: Console | None = None) -> RunResult:
    """Run the training that `config` describes and return where it is and how it went.

    Progress goes to `console` (standard error by default). Everything that can be wrong with the settings, the
    model or the data is found before anything is written. Raises `UserError`.
    """
    quiet.quiet_libraries()
    say = console if console is not None else Console(stderr=True)
    _check(config)
    point = runs.find_resume_point(config.resume) if config.resume else None
    device = base.resolve_device(config.base.device)
    if point is None and config.out is not None:
        runs.RunFolder.at(Path(config.out)).check_free(config.overwrite)
    quiet.quiet_progress_bars()
    inputs = _read_inputs(config)
    _announce(config, device, say)
    model = assembly.build_model(config, device)
    _check_vocabulary(inputs.tokenizer, model)
    name = Path(config.base.model.rstrip("/")).name
    if point is None:
        folder = runs.RunFolder.create(config.out, name, config.overwrite)
    else:
        folder = runs.continue_run(point, config.out, name, config.overwrite)
    with _kept_or_discarded(folder, say), runs.disk_errors(folder.final):
        runs.require_space(folder.working, _needed_bytes(config, model))
        return _run(config, folder, device, model, inputs, point, say)


def _check(config: RunConfig) -> None:
    """The rules that join several settings, or that depend on what is installed."""
    faults = []
    evaluation = config.evaluation
    has_eval = config.data.data == "demo" or config.data.eval_data is not None or config.data.eval_fraction > 0
    for flag, value in (
        ("--early-stopping", evaluation.early_stopping),
        ("--exact-match", evaluation.exact_match),
        ("--eval-steps", evaluation.eval_steps),
    ):
        if value is not None and not has_eval:
            faults.append(Fault(flag, value, "needs held-out data", "Add --eval-data FILE or --eval-fraction 0.05."))
    if evaluation.early_stopping is not None and not evaluation.keep_best:
        faults.append(
            Fault(
                "--early-stopping", evaluation.early_stopping, "needs the best checkpoint kept", "Drop --no-keep-best."
            )
        )
    if (
        has_eval
        and evaluation.keep_best
        and evaluation.eval_steps
        and (evaluation.save_steps or 0) % evaluation.eval_steps
    ):
        faults.append(
            Fault(
                "--save-steps",
                evaluation.save_steps,
                f"must be a multiple of --eval-steps {evaluation.eval_steps} to keep the best",
                "Change one, or add --no-keep-best.",
            )
        )
    for name, module in (("tensorboard", "tensorboard"), ("wandb", "wandb")):
        if name in config.report_to and not _installed(module):
            faults.append(Fault("--report-to", name, "is not installed", f"pip install 'qlora_kit[{name}]'"))
    if faults:
        raise UserError(faults)


def _installed(module: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(module) is not None


def _read_inputs(config: RunConfig) -> Inputs:
    tokenizer = data.prepare_tokenizer(base.load_tokenizer(config.base))
    positions = base.max_positions(base.load_model_config(config.base))
    seq_len = data.resolve_seq_len(config.data.seq_len, tokenizer, positions)
    examples = data.read_examples(config.data.data, config.data.columns)
    eval_source = config.data.eval_data or (
        "demo" if config.data.data == "demo" and not config.data.eval_fraction else None
    )
    if eval_source is not None:
        held_out = data.read_examples(eval_source, config.data.columns, "--eval-data")
    else:
        examples, held_out = data.split_examples(examples, config.data.eval_fraction, config.seed)
    train_set = _encode(config, examples, tokenizer, seq_len, "--data")
    eval_set = _encode(config, held_out, tokenizer, seq_len, "--eval-data") if held_out else None
    return Inputs(tokenizer, train_set, eval_set, held_out, seq_len)


def _encode(
    config: RunConfig, examples: list[data.Example], tokenizer: PreTrainedTokenizerBase, seq_len: int, setting: str
) -> data.EncodedSet | data.PackedSet:
    encoded = data.encode_set(examples, tokenizer, seq_len=seq_len, train_on=config.data.train_on, setting=setting)
    return data.pack(encoded, seq_len) if config.data.pack else encoded


def _announce(config: RunConfig, device: torch.device, say: Console) -> None:
    import torch

    if device.type == "cuda":
        say.print(f"device: {torch.cuda.get_device_name(device)}", highlight=False)
    else:
        say.print(f"device: CPU ({torch.get_num_threads()} threads); no CUDA device is used", highlight=False)
    if config.base.weights == "random":
        say.print("the base has random weights: for memory and speed work, its output means nothing", highlight=False)


def _check_vocabulary(tokenizer: PreTrainedTokenizerBase, model: Any) -> None:
    rows = model.get_input_embeddings().weight.shape[0]
    largest = max(tokenizer.get_vocab().values())
    if largest >= rows:
        rule = f"has token ids up to {largest}, and the model's vocabulary ends at {rows - 1}"
        raise UserError.of("--tokenizer", tokenizer.name_or_path, rule, "Give the tokenizer that belongs to the model.")


def _needed_bytes(config: RunConfig, model: Any) -> int:
    """Space for the trained weights and the checkpoints with their optimizer states: two moments, at most fp32."""
    weights = sum(p.nbytes for _, p in adapters.trainable(model))
    states = sum(8 * p.numel() for _, p in adapters.trainable(model))
    return weights + (config.evaluation.keep_checkpoints + 1) * (weights + states)


@contextmanager
def _kept_or_discarded(folder: runs.RunFolder, say: Console) -> Iterator[None]:
    """When the run stops early, keep what can be resumed and remove the rest."""
    try:
        yield
    except BaseException:
        if folder.working.exists() and not folder.discard_if_empty():
            say.print(f"interrupted; go on with --resume {folder.final}", highlight=False, soft_wrap=True)
        raise


def _run(
    config: RunConfig,
    folder: runs.RunFolder,
    device: torch.device,
    model: Any,
    inputs: Inputs,
    point: runs.ResumePoint | None,
    say: Console,
) -> RunResult:
    from qlora_kit.trainer import build_trainer, final_eval_loss, resolve_optim

    record = _record(config, device, model, inputs, resolve_optim(config, device))
    runs.write_json(folder.working / runs.RUN_FILE, record)
    _print_overview(record, say)
    progress = TrainingProgress(device, say)
    collator = _collator(config, model, inputs)
    sample = (lambda: _sample(model, inputs)) if inputs.held_out else None
    trainer, callback = build_trainer(
        config,
        folder,
        device,
        model,
        (inputs.train, inputs.evaluation),
        collator,
        progress,
        point.checkpoint if point else None,
        sample,
    )
    before = _exact_match(config, model, inputs)
    if before is not None:
        say.print(f"exact match before: {before:.1%} of {_asked(config, inputs)} held-out examples", highlight=False)
    try:
        output = trainer.train(resume_from_checkpoint=str(point.checkpoint) if point else None)
    finally:
        progress.stop()
    after = _exact_match(config, model, inputs)
    eval_loss = final_eval_loss(trainer) if inputs.evaluation is not None else None
    result = RunResult(
        folder.final,
        folder.final / ("model" if config.base.full else "adapter"),
        trainer.state.global_step,
        output.training_loss,
        eval_loss,
        before,
        after,
        peak_bytes(device),
        callback.tokens_per_s,
    )
    _save(folder, trainer, inputs, record, result)
    _print_result(result, say)
    return result


def _collator(config: RunConfig, model: Any, inputs: Inputs) -> data.Collator:
    """Pads rows, or lays packed ones out so that no example sees another. Raises `UserError` where it cannot."""
    pad = inputs.tokenizer.pad_token_id
    packed = [rows for rows in (inputs.train, inputs.evaluation) if isinstance(rows, data.PackedSet)]
    if not packed:
        return data.Collator(pad, max_tokens=inputs.seq_len)
    mask_dtype = data.packed_mask_dtype(model.config, max(rows.longest_tokens for rows in packed))
    return data.Collator(pad, packed=True, max_tokens=inputs.seq_len, mask_dtype=mask_dtype)


def _record(config: RunConfig, device: torch.device, model: Any, inputs: Inputs, optim: str) -> dict[str, Any]:
    """What `run.json` says; the settings in it repeat the run."""
    import torch

    count = base.count_parameters(model)
    return {
        "settings": config.to_dict(),
        "resolved": {
            "optim": optim,
            "seq_len": inputs.seq_len,
            "alpha": config.adapter.resolved_alpha,
            "dtype": str(base.compute_dtype(config.base, device)).removeprefix("torch."),
        },
        "base_hash": base.hash_base(config.base, config.seed),
        "parameters": dataclasses.asdict(count),
        "examples": {"train": len(inputs.train), "evaluation": len(inputs.evaluation) if inputs.evaluation else 0},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {platform.machine()}",
        "versions": runs.versions(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _print_overview(record: dict[str, Any], say: Console) -> None:
    settings, count = record["settings"], record["parameters"]
    kind = "every weight" if settings["base"]["full"] else f"LoRA r = {settings['adapter']['r']}"
    share = count["trainable"] / count["total"]
    say.print(
        f"{settings['base']['model']}: {count['total']:,} parameters at {settings['base']['bits']} bits; "
        f"training {kind}, {count['trainable']:,} ({share:.2%}), with {record['resolved']['optim']}",
        highlight=False,
        soft_wrap=True,
    )
    say.print(
        f"data: {record['examples']['train']:,} to train on, {record['examples']['evaluation']:,} held out, "
        f"at most {record['resolved']['seq_len']} tokens each",
        highlight=False,
        soft_wrap=True,
    )


def _asked(config: RunConfig, inputs: Inputs) -> int:
    return min(config.evaluation.exact_match or 0, len(inputs.held_out))


def _exact_match(config: RunConfig, model: Any, inputs: Inputs) -> float | None:
    """The share of held-out prompts that the model answers to the letter; None unless asked for."""
    if config.evaluation.exact_match is None:
        return None
    asked = inputs.held_out[: config.evaluation.exact_match]
    expected = [example.completion for example in asked]
    longest = max(len(ids) for ids in inputs.tokenizer(expected, add_special_tokens=False)["input_ids"])
    prompts = [data.encode_prompt(example, inputs.tokenizer) for example in asked]
    answers = scoring.answer(model, inputs.tokenizer, prompts, min(longest + 8, MAX_ANSWER_TOKENS))
    return scoring.exact_match(answers, expected)


def _sample(model: Any, inputs: Inputs) -> dict[str, str]:
    """The answer to the first held-out prompt."""
    example = inputs.held_out[0]
    prompt = data.encode_prompt(example, inputs.tokenizer)
    generated = scoring.answer(model, inputs.tokenizer, [prompt], SAMPLE_TOKENS)[0]
    return {"prompt": inputs.tokenizer.decode(prompt), "expected": example.completion, "generated": generated}


def _save(
    folder: runs.RunFolder, trainer: AdapterTrainer, inputs: Inputs, record: dict[str, Any], result: RunResult
) -> None:
    """Write the trained weights with their tokenizer and cards, and put the folder in its place."""
    target = folder.working / result.adapter.name
    trainer.save_model(str(target))
    inputs.tokenizer.save_pretrained(str(target))
    results = {k: v for k, v in dataclasses.asdict(result).items() if k not in ("folder", "adapter")}
    finished = {**record, "steps": result.steps, "results": results, "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    runs.write_json(folder.working / runs.RUN_FILE, finished)
    runs.write_text(target / runs.CARD_FILE, cards.adapter_card(finished))
    runs.write_text(folder.working / runs.CARD_FILE, cards.run_card(finished))
    folder.finish()


def _print_result(result: RunResult, say: Console) -> None:
    if result.exact_match_before is not None and result.exact_match_after is not None:
        say.print(
            f"exact match on held-out examples: {result.exact_match_before:.1%} before, "
            f"{result.exact_match_after:.1%} after",
            highlight=False,
        )
    held_out = f", held-out loss {result.eval_loss:.4f}" if result.eval_loss is not None else ""
    say.print(
        f"done: {result.steps} steps, training loss {result.train_loss:.4f}{held_out}, "
        f"{result.tokens_per_s:,.0f} tokens/s, peak {human_bytes(result.peak_bytes)}",
        highlight=False,
        soft_wrap=True,
    )
    say.print(
        f"adapter: {result.adapter}" if result.adapter.name == "adapter" else f"model: {result.adapter}",
        highlight=False,
        soft_wrap=True,
    )
