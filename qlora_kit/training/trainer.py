"""transformers' Trainer with four things mended: evaluation without a trace, exact saving and loading of the
factors, the check of the first gradients, and no pickled settings in a checkpoint.
"""

from __future__ import annotations

import functools
import math
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    get_scheduler,
)
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from qlora_kit.adapters import files, inject
from qlora_kit.config.settings import BaseConfig, OptimConfig, RunConfig
from qlora_kit.errors import UserError
from qlora_kit.lean import flat
from qlora_kit.model.device import compute_dtype
from qlora_kit.optim import paged_states
from qlora_kit.optim.rank_penalty import add_gradients
from qlora_kit.runs.folder import STATE_FILE, RunFolder, append_metrics
from qlora_kit.system.progress import EVALUATION, GENERATING, PhasePeaks, TrainingProgress
from qlora_kit.tasks import registry
from qlora_kit.tasks.decoding import undisturbed
from qlora_kit.tasks.evaluation import Scores
from qlora_kit.tasks.task import Asked, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qlora_kit.runs.inputs import Inputs
from qlora_kit.optim.optimizers import OPTIMIZERS, _is_adapter, _optimizer_of, resolve_optim

Sampler = Callable[[], dict[str, str]]  # gives one generated answer: prompt, expected, generated


class DivergedError(UserError):
    """The loss or a gradient is no number any more: these settings do not train, and others may."""


def training_arguments(
    config: RunConfig, folder: RunFolder, device: torch.device, evaluates: bool
) -> TrainingArguments:
    """The Trainer's settings for `config`; checkpoints go into the run folder."""
    optim, evaluation = config.optim, config.evaluation
    every = evaluation.eval_steps or evaluation.save_steps
    strategy = "steps" if every else "epoch"
    metric, more_is_better = registry.metric_of(registry.task_named(config.base.task), evaluation.metric)
    steps: dict[str, Any] = {"save_steps": evaluation.save_steps or every} if every else {}
    if every and evaluates:
        steps["eval_steps"] = every
    arguments = TrainingArguments(
        output_dir=str(folder.checkpoints),
        per_device_train_batch_size=optim.batch_size,
        per_device_eval_batch_size=optim.batch_size,
        gradient_accumulation_steps=optim.grad_accum,
        num_train_epochs=optim.epochs,
        max_steps=-1 if optim.max_steps is None else optim.max_steps,
        optim=OPTIMIZERS[resolve_optim(config, device)],
        learning_rate=optim.lr,
        lr_scheduler_type=optim.schedule,
        max_grad_norm=optim.clip,
        weight_decay=optim.weight_decay,
        seed=config.seed,
        use_cpu=device.type == "cpu",
        eval_strategy=strategy if evaluates else "no",
        save_strategy=strategy,
        save_total_limit=evaluation.keep_checkpoints,
        load_best_model_at_end=evaluates and evaluation.keep_best,
        metric_for_best_model=f"eval_{metric}" if evaluates else None,
        greater_is_better=more_is_better if evaluates else None,
        logging_steps=1,  # metrics.jsonl holds the whole curve
        logging_nan_inf_filter=False,  # a loss that is no number must show
        dataloader_pin_memory=device.type == "cuda",
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to=[name for name in config.report_to if name != "tensorboard"],
        fp16=compute_dtype(config.base, device) == torch.float16,
        **steps,
    )
    arguments._n_gpu = 1  # one GPU even where there are more: DataParallel cannot copy quantized layers
    return arguments


class AdapterTrainer(Trainer):
    """Trains the factors of a PEFT model (or every weight of a plain one) and keeps the run folder's promises."""

    control: TrainerControl
    optimizer: Any
    task: Task
    tokenizer: PreTrainedTokenizerBase
    base_config: BaseConfig
    scores: dict[int, Scores]  # of the evaluations of this process, by step
    peaks: PhasePeaks
    warmup: float = 0.0  # share of the steps
    gradients_checked = False  # fp16 checks none: its scaler skips overflowing steps by itself
    tokens_seen: Any = 0  # a count, or a tensor of one on the device

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """One forward and backward pass, more with an adversary; counts the tokens without waiting for the device."""
        mask = inputs.get("attention_mask")
        counted = mask.sum() if mask is not None and mask.dim() == 2 else inputs["input_ids"].numel()
        self.tokens_seen = self.tokens_seen + counted
        run = functools.partial(super().training_step, model, inputs, num_items_in_batch)
        adversary, penalty = getattr(self.model, "adversary", None), getattr(self.model, "rank_penalty", None)
        loss = run() if adversary is None else adversary.step(run)
        if penalty is not None and self.accelerator.sync_gradients:
            scaler = self.accelerator.scaler  # which fp16 training undoes before it clips
            add_gradients(self.model, penalty * (1.0 if scaler is None else scaler.get_scale()))
        if self.state.global_step == 0 and not self.gradients_checked and not self.args.fp16:
            inject.check_first_gradients(inject.trainable(self.model))  # before clipping, which spreads a NaN
            self.gradients_checked = True
        return loss

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The optimizer of the settings; that of factors is over the flat buffers, where they lie in some."""
        if self.optimizer is None and _is_adapter(self.model):
            self.optimizer = _optimizer_of(self.model, self.args)
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        paged_states.take_over(optimizer)
        return optimizer

    def _clip_grad_norm(self, model: Any) -> torch.Tensor:
        factors = flat.flat_factors(self.model)
        if factors is None:
            return super()._clip_grad_norm(model)
        factors.gather()  # fp16 training unscales what the optimizer will see
        self.accelerator.unscale_gradients()
        return factors.clip(self.args.max_grad_norm)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The task's figures on all held-out examples (the same whatever the batch size); the run is not disturbed."""
        start_s = time.monotonic()
        with undisturbed(self.model):  # the loader, too, draws from the random state
            scores = self._score(eval_dataset)
        self.scores[self.state.global_step] = scores
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in scores.metrics.items()}
        metrics[f"{metric_key_prefix}_s"] = round(time.monotonic() - start_s, 3)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _score(self, eval_dataset: Any = None) -> Scores:
        rows = getattr(self.eval_dataset if eval_dataset is None else eval_dataset, "rows", ())
        asked = Asked(rows, self._held_out(eval_dataset), self.tokenizer)
        with self.peaks.during(EVALUATION):
            return self.task.score(self.model, asked, self.base_config)

    def _held_out(self, eval_dataset: Any) -> Iterator[dict[str, torch.Tensor]]:
        for batch in self.get_eval_dataloader(eval_dataset):
            yield self._prepare_inputs(batch)
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        assert output_dir is not None, "the run always says where"
        if _is_adapter(self.model):
            files.save_adapter(self.model, Path(output_dir), self.has_learned)
        else:
            self.model.save_pretrained(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not _is_adapter(self.model):
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        try:
            files.load_factors(self.model, Path(resume_from_checkpoint))
        except (RuntimeError, OSError) as error:
            raise UserError.of(
                "--resume",
                resume_from_checkpoint,
                f"does not fit these settings ({error})",
                "Resume with the run's own --model, --r, --targets and --adapter-dtype.",
            ) from None

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        except ValueError as error:  # the states are those of other tensors
            rule = f"holds the states of an optimizer over other tensors ({error})"
            remedy = "Resume with the run's own --optim, --lean, --flat-buffer and --device."
            raise UserError.of("--resume", checkpoint, rule, remedy) from None

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None, "called only with a best checkpoint"
        if _is_adapter(self.model):
            files.load_factors(self.model, Path(self.state.best_model_checkpoint))
        else:
            super()._load_best_model()

    @property
    def has_learned(self) -> bool:
        """Whether any step so far had a learning rate above zero (the first of a warm-up has not)."""
        return any(line.get("learning_rate", 0) > 0 for line in self.state.log_history)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Warm up for whole steps only: rounding up would give a short run no learning at all."""
        self.args.warmup_steps = warmup_steps(self.warmup, num_training_steps)
        return super().create_scheduler(num_training_steps, optimizer)


class RunCallback(TrainerCallback):
    """Ties the Trainer to the run: progress, metrics, the check of the first gradients, best checkpoints that moved."""

    def __init__(
        self, folder: RunFolder, progress: TrainingProgress, resumed_from: Path | None, sample: Sampler | None
    ) -> None:
        self.folder = folder
        self.sample = sample
        self.progress = progress
        self.resumed_from = resumed_from
        self.trainer: AdapterTrainer | None = None
        self.step_s = 0.0  # time spent in steps, evaluations left out
        self.evaluated = 0  # batches of the evaluation in progress

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock and the bar; a resumed run goes on from the checkpoint's state, with its own settings."""
        if self.resumed_from is not None:
            into = self.folder.checkpoints if args.load_best_model_at_end else None
            if not _find_best_again(state, self.resumed_from, into):
                self.progress.say("the best checkpoint so far is gone: the best is chosen among those from here on")
            state.compute_steps(args, state.max_steps)  # when to evaluate and save, else those of the checkpoint
        self.progress.start(state.global_step, state.max_steps)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note when the step began, so that evaluations do not count as training time."""
        self.began_s = time.monotonic()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        """Write the metrics and move the bar. Raises `UserError` for a loss that is no number."""
        assert self.trainer is not None, "the trainer is set before training"
        line = {"step": state.global_step, **logs}
        if "loss" in logs:
            self.step_s += time.monotonic() - self.began_s  # the logged loss has waited for the device
            line["tokens_per_s"] = round(self.tokens_per_s, 1)
            self.progress.update(state.global_step, logs["loss"], self.tokens_per_s)
        append_metrics(self.folder, line)
        for name in ("loss", "grad_norm"):
            if not math.isfinite(logs.get(name, 0.0)) and not (args.fp16 and name == "grad_norm"):
                rule = f"is not finite at step {state.global_step}: the training diverged"
                raise DivergedError.of(name, logs[name], rule, "Lower --lr, or use --adapter-dtype fp32.")

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show how far the evaluation is."""
        self.evaluated += 1
        self.progress.note(f"evaluating, batch {self.evaluated}")

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any = None, **kwargs: Any
    ) -> None:
        """Say how the evaluation went, with one generated answer."""
        self.evaluated = 0
        assert self.trainer is not None, "the trainer is set before training"
        figures = {name.removeprefix("eval_"): value for name, value in metrics.items()}
        self.progress.say(f"step {state.global_step}: {self.trainer.task.said(figures)}")
        if self.sample is not None:
            with self.progress.peaks.during(GENERATING):
                sample = self.sample()
            append_metrics(self.folder, {"step": state.global_step, "sample": sample})
            for name, text in sample.items():
                self.progress.say(f"  {name:<9} {text!r}")

    @property
    def tokens_per_s(self) -> float:
        """Tokens (without padding) trained on in each second of training, evaluations left out."""
        assert self.trainer is not None, "the trainer is set before training"
        return float(self.trainer.tokens_seen) / max(self.step_s, 1e-9)


def build_trainer(
    config: RunConfig,
    folder: RunFolder,
    device: torch.device,
    model: Any,
    inputs: Inputs,
    collator: Any,
    progress: TrainingProgress,
    resumed_from: Path | None,
    sample: Sampler | None,
) -> tuple[AdapterTrainer, RunCallback]:
    """The Trainer for `model` on what `inputs` has to train on and to hold out, and its callback."""
    train_set, eval_set = inputs.train, inputs.evaluation
    callback = RunCallback(folder, progress, resumed_from, sample)
    callbacks: list[TrainerCallback] = [callback]
    if config.evaluation.early_stopping is not None:
        callbacks.append(_EarlyStopping(config.evaluation.early_stopping))
    if "tensorboard" in config.report_to:
        callbacks.append(_tensorboard(folder))
    arguments = training_arguments(config, folder, device, eval_set is not None)
    trainer = AdapterTrainer(model, arguments, collator, train_set, eval_set, callbacks=callbacks)
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.warmup = config.optim.warmup
    trainer.task, trainer.tokenizer = inputs.task, inputs.tokenizer
    trainer.base_config, trainer.scores, trainer.peaks = config.base, {}, progress.peaks
    callback.trainer = trainer
    return trainer, callback


def _find_best_again(state: TrainerState, checkpoint: Path, into: Path | None) -> bool:
    """Take the best checkpoint so far, which lies beside `checkpoint`, along to the folder `into`; None for no need.

    Its path in the state may be that of a folder which got its final name since. One that is gone is forgotten.
    Returns whether it is there, or there was none.
    """
    saved = TrainerState.load_from_json(str(checkpoint / STATE_FILE)).best_model_checkpoint
    state.best_model_checkpoint = None
    if saved is None or into is None:
        return True
    best = checkpoint.parent / Path(saved).name
    if not best.is_dir():
        state.best_metric = state.best_global_step = None
        return False
    own = into / best.name
    if not own.is_dir():
        shutil.copytree(best, own)
    state.best_model_checkpoint = str(own)
    return True


class _EarlyStopping(EarlyStoppingCallback):
    """Counts the evaluations before a resumption too, which transformers' own forgets."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count those that the state has, and have a place in it."""
        state.stateful_callbacks[type(self).__name__] = self.state()  # that of a run without early stopping has none
        best, counter = None, 0
        for figure in (line[args.metric_for_best_model] for line in state.log_history if "eval_loss" in line):
            is_better = best is None or (figure > best if args.greater_is_better else figure < best)
            best, counter = (figure, 0) if is_better else (best, counter + 1)
        self.early_stopping_patience_counter = counter


def planned_steps(config: RunConfig, rows: int) -> int:
    """The optimizer steps of a run over `rows` training rows, as the Trainer counts them."""
    if config.optim.max_steps is not None:
        return config.optim.max_steps
    batches = math.ceil(rows / config.optim.batch_size)
    return math.ceil(config.optim.epochs * math.ceil(batches / config.optim.grad_accum))


def warmup_steps(share: float, total: int) -> int:
    """The steps spent warming up in a run of `total`."""
    return int(share * total)


def share_of_rate(optim: OptimConfig, total: int, step: int) -> float:
    """The learning rate of a step (from 0) of a run of `total`, as a share of `lr`, as the Trainer's scheduler says."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))])
    scheduler: Any = get_scheduler(optim.schedule, optimizer, warmup_steps(optim.warmup, total), total)
    return float(scheduler.lr_lambdas[0](step))


def take_over(trainer: AdapterTrainer, checkpoint: Path) -> None:
    """Take weights and state from a checkpoint of the last step: resumed from it, the Trainer would take one more."""
    trainer.state = TrainerState.load_from_json(str(checkpoint / STATE_FILE))
    trainer._load_from_checkpoint(str(checkpoint))
    if trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint is not None:
        best = checkpoint.parent / Path(trainer.state.best_model_checkpoint).name
        if best.is_dir():
            trainer.state.best_model_checkpoint = str(best)
            trainer._load_best_model()


def mean_training_loss(trainer: AdapterTrainer) -> float:
    """The mean loss over all steps of the run, those before a resumption included."""
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return sum(losses) / max(len(losses), 1)


def final_metrics(trainer: AdapterTrainer) -> dict[str, float]:
    """The figures of the weights as they are after training: the best one's, the last one's, or fresh ones."""
    step = _kept_step(trainer)
    found = (line for line in reversed(trainer.state.log_history) if "eval_loss" in line and line.get("step") == step)
    line = next(found, None) or trainer.evaluate()
    figures = {name.removeprefix("eval_"): float(value) for name, value in line.items() if name.startswith("eval_")}
    return {name: value for name, value in figures.items() if name != "s"}


def final_scores(trainer: AdapterTrainer) -> Scores:
    """The same with its report; evaluated again where an earlier process did it."""
    found = trainer.scores.get(_kept_step(trainer))
    if found is not None:
        return found
    with undisturbed(trainer.model):
        return trainer._score()


def _kept_step(trainer: AdapterTrainer) -> int:
    """The step of the weights after training; that of the best evaluation may have had no checkpoint."""
    best = trainer.state.best_model_checkpoint
    is_best = trainer.args.load_best_model_at_end and best is not None
    return int(Path(best).name.rpartition("-")[2]) if is_best else trainer.state.global_step


def _tensorboard(folder: RunFolder) -> TrainerCallback:
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    return TensorBoardCallback(SummaryWriter(str(folder.working / "tensorboard")))
