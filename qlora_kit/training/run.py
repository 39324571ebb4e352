"""The training run, from settings to a finished run folder."""

from __future__ import annotations

import dataclasses
import importlib.util
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from qlora_kit.adapters import initialization, inject, unquantized
from qlora_kit.adapters.base_record import TrainedBase
from qlora_kit.build import build_model
from qlora_kit.config.files import read_settings
from qlora_kit.config.rules import flag
from qlora_kit.config.settings import RunConfig
from qlora_kit.errors import Fault, UserError
from qlora_kit.memory import preflight
from qlora_kit.model import quantize, source
from qlora_kit.model.device import compute_dtype, resolve_device
from qlora_kit.runs import cards, messages
from qlora_kit.runs.finished import label_map
from qlora_kit.runs.folder import (
    CARD_FILE,
    LABELS_FILE,
    RUN_FILE,
    ResumePoint,
    RunFolder,
    begin,
    check_place,
    find_resume_point,
)
from qlora_kit.runs.inputs import (
    Examples,
    Inputs,
    check_vocabulary,
    digest_of,
    make_collator,
    read_inputs,
    weigh_labels,
)
from qlora_kit.system import files, quiet
from qlora_kit.system.progress import GENERATING, INITIALIZING, LOADING, STEP, PhasePeaks, TrainingProgress, say_line
from qlora_kit.tasks import decoding
from qlora_kit.tasks.task import SampledPrompt
from qlora_kit.training import resuming

if TYPE_CHECKING:
    import torch

    from qlora_kit.memory.profile.profiler import Profiler
    from qlora_kit.memory.profile.result import MemoryProfile
    from qlora_kit.training.trainer import AdapterTrainer

PLAN_FILE = "plan.json"
OF_HELD_OUT = ("early_stopping", "exact_match", "eval_steps", "metric")  # settings that need held-out data


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
    peak_phase: str  # in which that was
    phase_peak_bytes: Mapping[str, int]  # see `progress.PhasePeaks`
    paged_bytes: int  # of the optimizer's states at the end, in managed memory
    tokens_per_s: float
    metrics: Mapping[str, float]  # the task's figures on held-out data; empty without any


def train(config: RunConfig, console: Console | None = None, examples: Examples | None = None) -> RunResult:
    """Run the training that `config` describes and return where it is and how it went.

    Progress goes to `console` (standard error by default). `examples` stand in the place of the data that the
    settings name, as the folds of a search do. Everything that can be wrong with the settings, the
    model or the data is found before anything is written. Raises `UserError`.
    """
    quiet.quiet_libraries()
    say = console if console is not None else Console(stderr=True)
    check_settings(config, examples)
    device = resolve_device(config.base.device)
    config, point = _continued(config, device)
    check_place(point, config.out, config.overwrite)
    quiet.quiet_progress_bars()
    inputs = read_inputs(config, examples)
    if point is not None:
        resuming.check_held_out(config, point, digest_of(inputs.held_out))
    asked, config = config, inputs.config
    for line in [*messages.opening(config, device), *messages.task_lines(asked.base, config.base)]:
        say_line(say, line)
    for line in messages.unread_lines(inputs.unread):
        say_line(say, line)
    planned = None
    if config.preflight:
        with say.status("planning the memory"):
            planned = preflight.plan_run(config, device, inputs.longest_row, held_out=_held_out(config, inputs))
        config = dataclasses.replace(config, lean=planned.lean)
    peaks = PhasePeaks(device)
    with say.status(f"loading {config.base.model}"), peaks.during(LOADING):
        model = build_model(config, device)
    _say_model(model, config, say)
    check_vocabulary(inputs.tokenizer, model)
    weigh_labels(model, inputs)
    name = Path(config.base.model.rstrip("/")).name
    folder = begin(point, config.out, name, config.overwrite)
    with _kept_or_discarded(folder, say), files.disk_errors(folder.final):
        files.require_space(folder.working, _needed_bytes(config, model))
        if planned is not None and planned.plan is not None:
            files.write_json(folder.working / PLAN_FILE, planned.plan.to_dict())
        return _run(config, folder, device, model, inputs, point, planned, peaks, say)


def _continued(config: RunConfig, device: torch.device) -> tuple[RunConfig, ResumePoint | None]:
    """The settings, with what the run to resume took from its data, and where it goes on. Raises `UserError`."""
    if config.resume is None:
        return config, None
    point = find_resume_point(config.resume)
    config = resuming.as_before(config, point)
    resuming.check_resumable(config, point, device)
    return config, point


def _say_model(model: Any, config: RunConfig, say: Console) -> None:
    for line in messages.unquantized_lines(unquantized.of_run(config, model), config.base.bits):
        say_line(say, line)
    if model.lean_outcomes:
        say.print(messages.step_table(model.lean_outcomes))


def check_settings(config: RunConfig, examples: Examples | None = None) -> None:
    """The rules that join several groups of settings, or that depend on what is installed. Raises `UserError`."""
    evaluation = config.evaluation
    eval_steps, save_steps = evaluation.eval_steps, evaluation.save_steps
    has_eval = config.data.holds_out if examples is None else bool(examples.held_out)
    faults = [
        Fault(flag(name), value, "needs held-out data", "Add --eval-data FILE or --eval-fraction 0.05.")
        for name in OF_HELD_OUT
        if (value := getattr(evaluation, name)) is not None and not has_eval
    ]
    if evaluation.early_stopping is not None and not evaluation.keep_best:
        rule = "needs the best checkpoint to be kept"
        faults.append(Fault("--early-stopping", evaluation.early_stopping, rule, "Drop --no-keep-best."))
    if has_eval and evaluation.keep_best and eval_steps and (save_steps or 0) % eval_steps:
        rule = f"must be a multiple of --eval-steps {eval_steps}, so that the best can be kept"
        faults.append(Fault("--save-steps", save_steps, rule, "Change one of them, or add --no-keep-best."))
    faults += _faults_of_adapters(config)
    for library in config.report_to:
        if importlib.util.find_spec(library) is None:
            faults.append(Fault("--report-to", library, "is not installed", f"pip install 'qlora_kit[{library}]'"))
    if faults:
        raise UserError(faults)


def _faults_of_adapters(config: RunConfig) -> Iterator[Fault]:
    """The rules that join how factors are made with how they are trained."""
    optim, adapter = config.optim, config.adapter
    for name in ("lora_plus", "rank_penalty"):
        if (given := getattr(optim, name)) is not None and config.base.full:
            yield Fault(flag(name), given, "is for adapters, and --full trains every weight", "Drop one of the two.")
    if optim.lora_plus is not None and adapter.variant == "lora-xs":
        rule = "needs both factors to train, and with --variant lora-xs only a core between them does"
        yield Fault("--lora-plus", optim.lora_plus, rule, "Drop one of the two.")
    if optim.rank_penalty is not None and adapter.dora:
        rule = "is on the change that the factors make, and with --dora they make only its direction"
        yield Fault("--rank-penalty", optim.rank_penalty, rule, "Drop one of the two.")


def _needed_bytes(config: RunConfig, model: Any) -> int:
    """Space for the trained weights and the checkpoints with their optimizer states: two moments, at most fp32."""
    from qlora_kit.adapters import parts

    weights = sum(p.nbytes for _, p in inject.trainable(model)) + parts.frozen_bytes(model)
    states = sum(8 * p.numel() for _, p in inject.trainable(model))
    return weights + (config.evaluation.keep_checkpoints + 1) * (weights + states)


@contextmanager
def _kept_or_discarded(folder: RunFolder, say: Console) -> Iterator[None]:
    """When the run stops early, keep what can be resumed and remove the rest; let go of the folder at the end."""
    try:
        yield
    except BaseException:
        if folder.working.exists() and not folder.discard_if_empty():
            say_line(say, f"stopped; go on with --resume {folder.final}")
        raise
    finally:
        folder.release()


def _run(
    config: RunConfig,
    folder: RunFolder,
    device: torch.device,
    model: Any,
    inputs: Inputs,
    point: ResumePoint | None,
    planned: preflight.Preflight | None,
    peaks: PhasePeaks,
    say: Console,
) -> RunResult:
    from qlora_kit.optim.optimizers import resolve_optim
    from qlora_kit.optim.paged_states import paged_bytes
    from qlora_kit.training.trainer import build_trainer, final_metrics, mean_training_loss, planned_steps, take_over

    with say.status("hashing the base"):
        record = _record(config, device, model, inputs, resolve_optim(config, device))
    files.write_json(folder.working / RUN_FILE, record)
    for line in messages.overview(record):
        say_line(say, line)
    progress = TrainingProgress(device, say, peaks)
    collator = make_collator(model, inputs)
    if config.adapter.init == "eva" and point is None and not config.base.full:
        with say.status("fitting the factors to the data"), peaks.during(INITIALIZING):
            _start_from_data(config, device, model, inputs, collator)
    sample = _sampler(model, inputs)
    trainer, callback = build_trainer(
        config,
        folder,
        device,
        model,
        inputs,
        collator,
        progress,
        point.checkpoint if point else None,
        sample,
    )
    at_once = _prompts_at_once(config, device, inputs, planned)
    before = _exact_match(config, model, inputs, at_once, peaks)
    if before is not None:
        asked = min(config.evaluation.exact_match or 0, len(inputs.held_out))
        say_line(say, f"exact match before: {before:.1%} of {asked} held-out examples")
    profiler = None
    if point is not None and point.step >= planned_steps(config, len(inputs.train)):
        take_over(trainer, point.checkpoint)
    else:
        try:
            with peaks.during(STEP), _profiled(config, device, trainer, peaks) as profiler:
                trainer.train(resume_from_checkpoint=str(point.checkpoint) if point else None)
        finally:
            progress.stop()
    after = _exact_match(config, model, inputs, at_once, peaks)
    metrics = final_metrics(trainer) if inputs.evaluation is not None else {}
    peaks.note()
    result = RunResult(
        folder.final,
        folder.final / ("model" if config.base.full else "adapter"),
        trainer.state.global_step,
        mean_training_loss(trainer),
        metrics.get("loss"),
        before,
        after,
        peaks.peaks[peaks.highest_phase],
        peaks.highest_phase,
        dict(peaks.peaks),
        paged_bytes(trainer.optimizer),
        callback.tokens_per_s,
        metrics,
    )
    profile = profiler.profile if profiler else None
    _save_profile(folder, profile)
    tables = _write_report(folder, trainer, inputs)
    _save(folder, trainer, inputs, record, result)
    for table in tables:
        say.print(table)
    for line in messages.closing(dataclasses.asdict(result), inputs.task):
        say_line(say, line)
    if planned is None and profile is not None:
        held_out = _held_out(config, inputs)
        planned = preflight.plan_run(config, device, inputs.longest_row, checks=False, held_out=held_out)
    if planned is not None:
        say_line(say, planned.closing_line(peaks.peaks if device.type == "cuda" else None, profile))
    return result


def _write_report(folder: RunFolder, trainer: AdapterTrainer, inputs: Inputs) -> list[Table]:
    """Write what the task says about the trained model on held-out data, and return what of it is shown."""
    from qlora_kit.training.trainer import final_scores

    if inputs.evaluation is None or not inputs.task.has_report:
        return []
    scores = final_scores(trainer)
    inputs.task.write_report(scores, folder.working)
    return inputs.task.tables(scores)


def _start_from_data(config: RunConfig, device: torch.device, model: Any, inputs: Inputs, collator: Any) -> None:
    """Turn the factors to what the model is fed, in batches of the run's size, drawn by its seed."""
    import torch

    draw = torch.Generator().manual_seed(config.seed)
    options = {"batch_size": config.optim.batch_size, "shuffle": True, "generator": draw, "collate_fn": collator}
    loader: Any = torch.utils.data.DataLoader(inputs.train, **options)
    batches = ({k: v.to(device) if torch.is_tensor(v) else v for k, v in batch.items()} for batch in loader)
    with decoding.undisturbed(model):
        initialization.start_from_data(model, batches)


@contextmanager
def _profiled(
    config: RunConfig, device: torch.device, trainer: AdapterTrainer, peaks: PhasePeaks
) -> Iterator[Profiler | None]:
    """Measure the first steps where it was asked for; otherwise nothing of the profiler touches the run."""
    if not config.profile:
        yield None
        return
    from qlora_kit.memory.profile.profiler import Profiler

    with Profiler(config, device, load_peak_bytes=peaks.peaks.get(LOADING, 0)) as profiler:
        trainer.add_callback(profiler)
        yield profiler
    if profiler.profile is not None and device.type == "cuda":
        peaks.take(STEP, profiler.profile.peak_bytes)


def _save_profile(folder: RunFolder, profile: MemoryProfile | None) -> None:
    if profile is None:
        return
    from qlora_kit.memory.profile.picture import draw_profile
    from qlora_kit.memory.profile.profiler import save_profile

    save_profile(profile, folder.working)
    draw_profile(profile, folder.working / "profile.png")


def _record(config: RunConfig, device: torch.device, model: Any, inputs: Inputs, optim: str) -> dict[str, Any]:
    """What `run.json` says; the settings in it repeat the run."""
    import torch

    count = quantize.count_parameters(model)
    return {
        "settings": config.to_dict(),
        "resolved": {
            "optim": optim,
            "seq_len": inputs.seq_len,
            "alpha": config.adapter.resolved_alpha,
            "dtype": str(compute_dtype(config.base, device)).removeprefix("torch."),
        },
        "base_hash": source.hash_base(config.base, config.seed),
        "parameters": dataclasses.asdict(count),
        "lean": {name: dataclasses.asdict(outcome) for name, outcome in model.lean_outcomes.items()},
        "examples": {"train": len(inputs.train), "evaluation": len(inputs.evaluation) if inputs.evaluation else 0},
        "held_out_hash": digest_of(inputs.held_out),
        "truncated": inputs.report.truncated,
        "dropped": inputs.report.examples - inputs.report.kept,
        "plain_text": inputs.plain_text,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {platform.machine()}",
        "versions": files.versions(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _prompts_at_once(
    config: RunConfig, device: torch.device, inputs: Inputs, planned: preflight.Preflight | None
) -> int:
    """How many held-out prompts are answered at once: as the plan has it, or as fit now where there is none."""
    if config.evaluation.exact_match is None:
        return 1
    if planned is not None and planned.plan is not None and planned.plan.answers is not None:
        return preflight.prompts_at_once(planned.plan, device)
    asked = inputs.task.prompt_lengths(inputs.tokenizer, inputs.held_out[: config.evaluation.exact_match])
    return preflight.prompts_in_free(config, device, asked)


def _exact_match(config: RunConfig, model: Any, inputs: Inputs, at_once: int, peaks: PhasePeaks) -> float | None:
    """The share of held-out prompts that the model answers to the letter; None unless asked for."""
    if config.evaluation.exact_match is None:
        return None
    asked = inputs.held_out[: config.evaluation.exact_match]
    with peaks.during(GENERATING):
        return inputs.task.exact_match(model, inputs.tokenizer, asked, at_once=at_once)


def _sampler(model: Any, inputs: Inputs) -> Callable[[], dict[str, str]] | None:
    """Answers the first held-out prompt that leaves room for an answer; None where there is none."""
    found = _sampled(inputs)
    if found is None:
        return None

    def sample() -> dict[str, str]:
        prompt = found.input_ids
        generated = decoding.answer(model, inputs.tokenizer, [prompt], decoding.SAMPLE_TOKENS)[0]
        return {"prompt": inputs.tokenizer.decode(prompt), "expected": found.expected, "generated": generated}

    return sample


def _sampled(inputs: Inputs) -> SampledPrompt | None:
    """The prompt that is answered at each evaluation; None where there is none."""
    return inputs.task.sampled(inputs.held_out, inputs.tokenizer, inputs.seq_len)


def _held_out(config: RunConfig, inputs: Inputs) -> decoding.HeldOut:
    """What the run does with its held-out data, in lengths."""
    if inputs.evaluation is None:
        return decoding.NOTHING_HELD_OUT
    found, sampled = _sampled(inputs), None
    if found is not None:
        sampled = decoding.AnswerLengths(1, len(found.input_ids), decoding.SAMPLE_TOKENS)
    asked = inputs.task.scored_answers(inputs.evaluation.rows)
    if config.evaluation.exact_match is not None:
        asked = inputs.task.prompt_lengths(inputs.tokenizer, inputs.held_out[: config.evaluation.exact_match])
        asked = asked if sampled is None else asked.also(sampled)
    longest = preflight.padded(inputs.longest_held_out)
    return decoding.HeldOut(len(inputs.evaluation), min(longest, inputs.seq_len), sampled, asked)


def _save(
    folder: RunFolder, trainer: AdapterTrainer, inputs: Inputs, record: dict[str, Any], result: RunResult
) -> None:
    """Write the trained weights with their tokenizer and cards, and put the folder in its place."""
    target = folder.working / result.adapter.name
    trainer.save_model(str(target))
    inputs.tokenizer.save_pretrained(str(target))
    if inputs.config.base.labels is not None:
        files.write_json(target / LABELS_FILE, label_map(inputs.config.base))
    settings = RunConfig.from_flat(read_settings({"settings": record["settings"]})).base
    if not settings.full:
        TrainedBase.of(settings, record["base_hash"], record["resolved"]["dtype"]).write(target)
    results = {k: v for k, v in dataclasses.asdict(result).items() if k not in ("folder", "adapter")}
    finished = {**record, "steps": result.steps, "results": results, "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    files.write_json(folder.working / RUN_FILE, finished)
    files.write_text(target / CARD_FILE, cards.adapter_card(finished))
    files.write_text(folder.working / CARD_FILE, cards.run_card(finished))
    folder.finish()
