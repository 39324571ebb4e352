"""What ties transformers' Trainer to a run: progress, metrics, samples, and the best checkpoint."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import EarlyStoppingCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from qlora_kit.errors import UserError, named
from qlora_kit.runs.folder import STATE_FILE, RunFolder, append_metrics
from qlora_kit.system.progress import GENERATING, TrainingProgress

if TYPE_CHECKING:
    from qlora_kit.training.held_out import Sampler
    from qlora_kit.training.prepare import Prepared


class DivergedError(UserError):
    """The loss or a gradient is no number any more: these settings do not train, and others may."""


def callbacks_of(
    prepared: Prepared, folder: RunFolder, progress: TrainingProgress, sample: Sampler | None
) -> list[TrainerCallback]:
    """All that follow the run: our own first, then early stopping and reports where they were asked for."""
    config = prepared.config
    callbacks: list[TrainerCallback] = [RunCallback(prepared, folder, progress, sample)]
    if config.evaluation.early_stopping is not None:
        callbacks.append(_EarlyStopping(config.evaluation.early_stopping))
    if "tensorboard" in config.report_to:
        callbacks.append(_tensorboard(folder))
    return callbacks


class RunCallback(TrainerCallback):
    """Ties the Trainer to the run: progress, metrics, tokens a second, and best checkpoints that moved."""

    def __init__(
        self, prepared: Prepared, folder: RunFolder, progress: TrainingProgress, sample: Sampler | None
    ) -> None:
        self.folder = folder
        self.sample = sample
        self.progress = progress
        self.task = prepared.inputs.task
        self.lr = prepared.config.optim.lr
        self.resumed_from = None if prepared.point is None else prepared.point.checkpoint
        self.tokens_seen: Any = 0  # a count, or a tensor of one on the device
        self.step_s = 0.0  # time spent in steps, evaluations left out
        self.evaluated = 0  # batches of the evaluation in progress

    def count_tokens(self, batch: Mapping[str, Any]) -> None:
        """Count the tokens of `batch`, padding left out where a mask tells it, without waiting for the device."""
        mask = batch.get("attention_mask")
        counted = mask.sum() if mask is not None and mask.dim() == 2 else batch["input_ids"].numel()
        self.tokens_seen = self.tokens_seen + counted

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
        line = {"step": state.global_step, **logs}
        if "loss" in logs:
            self.step_s += time.monotonic() - self.began_s  # the logged loss has waited for the device
            line["tokens_per_s"] = round(self.tokens_per_s, 1)
            self.progress.update(state.global_step, logs["loss"], self.tokens_per_s)
        append_metrics(self.folder, line)
        for name in ("loss", "grad_norm"):
            value = logs.get(name, 0.0)
            if not math.isfinite(value) and not (args.fp16 and name == "grad_norm"):
                what = {"loss": "the loss", "grad_norm": "the gradient"}[name]
                rule = f"{what} is {value} at step {state.global_step}: the training diverged"
                raise DivergedError.of("lr", self.lr, rule, f"Lower it, or use {named('adapter_dtype', 'fp32')}.")

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
        figures = {name.removeprefix("eval_"): value for name, value in metrics.items()}
        self.progress.say(f"step {state.global_step}: {self.task.said(figures)}")
        if self.sample is not None:
            with self.progress.peaks.during(GENERATING):
                sample = self.sample()
            append_metrics(self.folder, {"step": state.global_step, "sample": sample})
            for name, text in sample.items():
                self.progress.say(f"  {name:<9} {text!r}")

    @property
    def tokens_per_s(self) -> float:
        """Tokens (without padding) trained on in each second of training, evaluations left out."""
        return float(self.tokens_seen) / max(self.step_s, 1e-9)


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


def _tensorboard(folder: RunFolder) -> TrainerCallback:
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    return TensorBoardCallback(SummaryWriter(str(folder.working / "tensorboard")))
