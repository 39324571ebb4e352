"""transformers' Trainer with four things mended: evaluation without a trace, exact saving and loading of the
factors, the check of the first gradients, and no pickled settings in a checkpoint.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from qlora_kit.adapters import files, inject
from qlora_kit.config.settings import EvalConfig
from qlora_kit.errors import UserError, named
from qlora_kit.model.device import compute_dtype
from qlora_kit.optim.rank_penalty import add_gradients
from qlora_kit.runs.folder import STATE_FILE, RunFolder
from qlora_kit.system.progress import EVALUATION, TrainingProgress
from qlora_kit.tasks.decoding import undisturbed
from qlora_kit.tasks.evaluation import Scores
from qlora_kit.tasks.task import Asked
from qlora_kit.training.callback import RunCallback, callbacks_of
from qlora_kit.training.schedule import warmup_steps

if TYPE_CHECKING:
    from qlora_kit.training.held_out import Sampler
    from qlora_kit.training.prepare import Prepared


def training_arguments(prepared: Prepared, folder: RunFolder) -> TrainingArguments:
    """The Trainer's settings for what was `prepared`; checkpoints go into the run folder."""
    from qlora_kit.tasks.registry import metric_of

    optim, evaluation, device = prepared.config.optim, prepared.config.evaluation, prepared.device
    metric, more_is_better = metric_of(prepared.inputs.task, evaluation.metric)
    evaluates = prepared.inputs.evaluation is not None
    arguments = TrainingArguments(
        output_dir=str(folder.checkpoints),
        per_device_train_batch_size=optim.batch_size,
        per_device_eval_batch_size=optim.batch_size,
        gradient_accumulation_steps=optim.grad_accum,
        num_train_epochs=optim.epochs,
        max_steps=-1 if optim.max_steps is None else optim.max_steps,
        learning_rate=optim.lr,
        lr_scheduler_type=optim.schedule,
        max_grad_norm=optim.clip,
        weight_decay=optim.weight_decay,
        seed=prepared.config.seed,
        use_cpu=device.type == "cpu",
        save_total_limit=evaluation.keep_checkpoints,
        load_best_model_at_end=evaluates and evaluation.keep_best,
        metric_for_best_model=f"eval_{metric}" if evaluates else None,
        greater_is_better=more_is_better if evaluates else None,
        logging_steps=1,  # metrics.jsonl holds the whole curve
        logging_nan_inf_filter=False,  # a loss that is no number must show
        dataloader_pin_memory=device.type == "cuda",
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to=[name for name in prepared.config.report_to if name != "tensorboard"],
        fp16=compute_dtype(prepared.config.base, device) == torch.float16,
        **_when(evaluation, evaluates),
    )
    arguments._n_gpu = 1  # one GPU even where there are more: DataParallel cannot copy quantized layers
    arguments.optim = prepared.optim  # for reports alone: the optimizer is made by our own table
    return arguments


def _when(evaluation: EvalConfig, evaluates: bool) -> dict[str, Any]:
    """When the Trainer evaluates and saves."""
    every = evaluation.eval_steps or evaluation.save_steps
    strategy = "steps" if every else "epoch"
    steps: dict[str, Any] = {"save_steps": evaluation.save_steps or every} if every else {}
    if every and evaluates:
        steps["eval_steps"] = every
    return {**steps, "save_strategy": strategy, "eval_strategy": strategy if evaluates else "no"}


class AdapterTrainer(Trainer):
    """Trains the factors of a PEFT model (or every weight of a plain one) and keeps the run folder's promises."""

    control: TrainerControl
    optimizer: Any

    def __init__(self, prepared: Prepared, arguments: TrainingArguments, callbacks: Sequence[TrainerCallback]) -> None:
        inputs = prepared.inputs
        super().__init__(
            prepared.built.model,
            arguments,
            prepared.collate,
            inputs.train,
            inputs.evaluation,
            callbacks=list(callbacks),
        )
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        self.prepared = prepared
        self.is_adapter = not prepared.config.base.full
        self.run_callback = next(callback for callback in callbacks if isinstance(callback, RunCallback))
        self.scores: dict[int, Scores] = {}  # of the evaluations of this process, by step
        self.gradients_checked = False  # fp16 checks none: its scaler skips overflowing steps by itself

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """One forward and backward pass, more with an adversary; counts the tokens without waiting for the device."""
        built = self.prepared.built
        self.run_callback.count_tokens(inputs)
        run = functools.partial(super().training_step, model, inputs, num_items_in_batch)
        loss = run() if built.adversary is None else built.adversary.step(run)
        if built.rank_penalty is not None and self.accelerator.sync_gradients:
            scaler = self.accelerator.scaler  # which fp16 training undoes before it clips
            add_gradients(self.model, built.rank_penalty * (1.0 if scaler is None else scaler.get_scale()))
        if self.state.global_step == 0 and not self.gradients_checked and not self.args.fp16:
            inject.check_first_gradients(inject.trainable(self.model))  # before clipping, which spreads a NaN
            self.gradients_checked = True
        return loss

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The optimizer of the settings; that of factors is over the flat buffers, where they lie in some."""
        if self.optimizer is None:
            self.optimizer = self.prepared.built.make_optimizer(self.prepared.config.optim, self.prepared.optim)
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        return optimizer

    def _clip_grad_norm(self, model: Any) -> torch.Tensor:
        factors = self.prepared.built.factors
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
        inputs = self.prepared.inputs
        asked = Asked(rows, self._held_out(eval_dataset), inputs.tokenizer)
        with self.prepared.peaks.during(EVALUATION):
            return inputs.task.score(self.model, asked, self.prepared.config.base)

    def _held_out(self, eval_dataset: Any) -> Iterator[dict[str, torch.Tensor]]:
        for batch in self.get_eval_dataloader(eval_dataset):
            yield self._prepare_inputs(batch)
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        assert output_dir is not None, "the run always says where"
        if self.is_adapter:
            files.save_adapter(self.model, Path(output_dir), self.has_learned)
        else:
            self.model.save_pretrained(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not self.is_adapter:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        try:
            files.load_factors(self.model, Path(resume_from_checkpoint))
        except (RuntimeError, OSError) as error:
            rule = f"does not fit these settings ({error})"
            own = f"{named('model')}, {named('r')}, {named('targets')} and {named('adapter_dtype')}"
            raise UserError.of("resume", resume_from_checkpoint, rule, f"Resume with the run's own {own}.") from None

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        except ValueError as error:  # the states are those of other tensors
            rule = f"holds the states of an optimizer over other tensors ({error})"
            own = f"{named('optim')}, {named('lean')}, {named('flat_buffer')} and {named('device')}"
            raise UserError.of("resume", checkpoint, rule, f"Resume with the run's own {own}.") from None

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None, "called only with a best checkpoint"
        if self.is_adapter:
            files.load_factors(self.model, Path(self.state.best_model_checkpoint))
        else:
            super()._load_best_model()

    @property
    def has_learned(self) -> bool:
        """Whether any step so far had a learning rate above zero (the first of a warm-up has not)."""
        return any(line.get("learning_rate", 0) > 0 for line in self.state.log_history)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Warm up for whole steps only: rounding up would give a short run no learning at all."""
        self.args.warmup_steps = warmup_steps(self.prepared.config.optim.warmup, num_training_steps)
        return super().create_scheduler(num_training_steps, optimizer)


def build_trainer(
    prepared: Prepared, folder: RunFolder, progress: TrainingProgress, sample: Sampler | None
) -> tuple[AdapterTrainer, RunCallback]:
    """The Trainer for what was `prepared`, and its callback."""
    callbacks = callbacks_of(prepared, folder, progress, sample)
    trainer = AdapterTrainer(prepared, training_arguments(prepared, folder), callbacks)
    return trainer, trainer.run_callback


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
