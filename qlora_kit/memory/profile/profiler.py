"""The profile of a real run: the bytes that the plan predicted, measured over the first steps.

On CUDA the allocator itself is asked; on a CPU the planner's tracker follows the real storages. Without a profiler
nothing of this touches the run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from qlora_kit.config.settings import RunConfig
from qlora_kit.data.encode import IGNORED
from qlora_kit.memory import rules
from qlora_kit.memory.plan import CannotPlanError, MemoryPlan, failures_named, plan, resolve_architecture
from qlora_kit.memory.profile.cpu import BatchShape, CpuTracker, mark_clipping, predict
from qlora_kit.memory.profile.cuda import CudaTracker
from qlora_kit.memory.profile.result import Measured, MemoryProfile, Prediction
from qlora_kit.memory.watch import watch
from qlora_kit.system import files
from qlora_kit.system.progress import EVALUATION, GENERATING, PHASES, STEP, human_bytes

PROFILE_FILE = "profile.json"
STEPS = 3  # optimizer states are born in the first, so that the second already shows the peak


class Profiler(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Measures the first optimizer steps of a run; give it to a Trainer, or call its methods around your own steps.

    Use it as a context, so that a run that fails leaves neither hooks nor a recording behind:

        with Profiler(config, device) as profiler:
            trainer.add_callback(profiler)
            trainer.train()
        profiler.profile  # None where no whole step ran

    On CUDA it resets the allocator's peaks: that of all steps is the larger one of `profile.peak_bytes` and
    `torch.cuda.max_memory_allocated` afterwards. `snapshot` is a file to write for PyTorch's memory viewer (CUDA only).
    `load_peak_bytes` is what loading took, where the peaks have been begun anew since.
    `predicts` off leaves the prediction out.
    """

    def __init__(
        self,
        config: RunConfig,
        device: torch.device,
        steps: int = STEPS,
        snapshot: Path | None = None,
        predicts: bool = True,
        load_peak_bytes: int = 0,
    ) -> None:
        self.config = config
        self.device = device
        self.steps = steps
        self.snapshot = snapshot if device.type == "cuda" else None
        self.predicts = predicts
        self.load_peak_bytes = load_peak_bytes
        self.profile: MemoryProfile | None = None
        self.shapes: list[list[BatchShape]] = []
        self._tracker: CpuTracker | CudaTracker | None = None
        self._step = ExitStack()

    def __enter__(self) -> Profiler:
        """Nothing yet: `begin` starts."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Remove every hook and stop every recording."""
        self._step.close()
        if isinstance(self._tracker, CudaTracker):
            self._tracker.abandon()
        self._tracker = None

    def begin(self, model: Any, optimizer: torch.optim.Optimizer) -> None:
        """Get ready for the first step. `optimizer` may be the one that accelerate wrapped."""
        self._model, self._optimizer = model, getattr(optimizer, "optimizer", optimizer)
        if self.device.type == "cuda":
            self._tracker = CudaTracker(self.device)
            self._tracker.start()
        else:
            self._tracker = CpuTracker()

    def begin_step(self) -> None:
        """Say that an optimizer step begins, its batches loaded or not."""
        if self._tracker is None:
            return
        self.shapes.append([])
        self._tracker.begin_step()
        self._step.callback(
            self._model.register_forward_pre_hook(self._see_batch, with_kwargs=True, prepend=True).remove
        )
        self._step.enter_context(watch(self._tracker, self._model, self._optimizer))
        self._step.callback(mark_clipping(self._tracker, self._model).remove)
        if isinstance(self._tracker, CpuTracker):
            self._step.enter_context(self._tracker)

    def end_step(self) -> None:
        """Say that it ended; after the last one the profile is there."""
        if self._tracker is None:
            return
        self._tracker.enter("idle")
        self._step.close()
        if len(self.shapes) >= self.steps:
            self.finish()

    def finish(self) -> None:
        """End the profile with the steps that there were, and stop measuring."""
        tracker, self._tracker = self._tracker, None
        self._step.close()
        if tracker is None:
            return
        if isinstance(tracker, CudaTracker):
            played = tracker.finish(self.snapshot)
            load_peak_bytes = max(tracker.load_peak_bytes, self.load_peak_bytes)
            measured = Measured(
                events=played.events,
                lines=played.lines,
                counters=tracker.counters,
                load_peak_bytes=load_peak_bytes,
            )
        else:
            tracker.stop()
            measured = Measured(events=tracker.events, lines=tracker.lines)
        if self.shapes:
            self.profile = self._profile(measured)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin."""
        self.begin(kwargs["model"], kwargs["optimizer"])

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure the step."""
        self.begin_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End the step, and after the last one the profile."""
        self.end_step()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End with the steps there were."""
        self.finish()

    def _see_batch(self, module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        assert self._tracker is not None, "hooks are removed with it"
        for value in (*args, *kwargs.values()):
            if isinstance(value, torch.Tensor):
                self._tracker.label(value, "inputs")
        ids, mask = kwargs["input_ids"], kwargs.get("attention_mask")
        padded = mask is not None and mask.dim() == 2 and not bool(mask.all())
        labels = kwargs.get("labels")
        supervised = None
        if labels is not None and labels.shape == ids.shape:  # one for each token, not for each row
            supervised = int((labels[:, 1:] != IGNORED).sum())
        batch = {name: value for name, value in kwargs.items() if name != "num_items_in_batch"}
        batch = {name: v.to("meta") if isinstance(v, torch.Tensor) else v for name, v in batch.items()}
        self.shapes[-1].append(
            BatchShape(rows=ids.shape[0], tokens=ids.shape[1], padded=padded, supervised=supervised, batch=batch)
        )

    def _profile(self, measured: Measured) -> MemoryProfile:
        largest = max((s for shapes in self.shapes for s in shapes), key=lambda s: s.rows * s.tokens)
        peak = measured.peak
        reserved = [counter.reserved_bytes for counter in measured.counters.values()]
        is_cuda = self.device.type == "cuda"
        return MemoryProfile(
            device=torch.cuda.get_device_name(self.device) if is_cuda else "CPU",
            basis="torch.cuda's allocator" if is_cuda else "live storages on the CPU, by the planner's tracker",
            steps=len(self.shapes),
            rows=largest.rows,
            tokens=largest.tokens,
            padded=largest.padded,
            peak_bytes=peak.live_bytes,
            phase=peak.phase,
            block=peak.block,
            operation=peak.operation,
            components=peak.components,
            phases=measured.phases,
            series=measured.series,
            largest=measured.largest(),
            counters=measured.counters,
            load_peak_bytes=measured.load_peak_bytes,
            reserved_bytes=max(reserved, default=None),
            snapshot=None if self.snapshot is None else str(self.snapshot),
            predicted=self._predict(largest) if self.predicts else None,
        )

    def _predict(self, largest: BatchShape) -> Prediction | None:
        """What the measured steps should have taken; None for a model that cannot be planned."""
        try:
            with failures_named(self.config):
                return self._prediction(largest)
        except CannotPlanError:
            return None

    def _prediction(self, largest: BatchShape) -> Prediction:
        """The plan of the steps that were measured: of this GPU, or on a CPU of what a CPU allocates."""
        if self.device.type == "cuda":
            optim = dataclasses.replace(self.config.optim, batch_size=largest.rows)
            data = dataclasses.replace(self.config.data, seq_len=largest.tokens)
            planned = plan(dataclasses.replace(self.config, optim=optim, data=data), gpu=present_gpu(self.device))
            phases = {name: point.live_bytes for name, point in planned.phases.items()}
            basis = f"the plan for this GPU at {largest.rows} x {largest.tokens} tokens"
            return Prediction(peak_bytes=planned.peak_bytes, components=planned.components, phases=phases, basis=basis)
        foreseen = Measured(events=predict(self.config, resolve_architecture(self.config), self.shapes))
        phases = {name: point.live_bytes for name, point in foreseen.phases.items()}
        basis = "the same steps on `meta`, counted as a CPU runs them (not as CUDA would)"
        peak = foreseen.peak
        return Prediction(peak_bytes=peak.live_bytes, components=peak.components, phases=phases, basis=basis)


def present_gpu(device: torch.device) -> rules.Gpu:
    """The GPU at hand as the rules see it."""
    found = torch.cuda.get_device_properties(device)
    return rules.Gpu(found.name, found.total_memory, (found.major, found.minor))


def save_profile(profile: MemoryProfile, folder: Path) -> Path:
    """Write `profile.json` whole or not at all; returns the file."""
    file = folder / PROFILE_FILE
    files.write_json(file, profile.to_dict())
    return file


def summary_line(
    profile: MemoryProfile | None,
    plan: MemoryPlan,
    baselines: Mapping[str, MemoryPlan],
    measured_bytes: int | None = None,
) -> str:
    """The line at the end of a run: the peak of its step on a GPU, and what the baselines would have taken there.

    `baselines` is by what they are called, their recipe with it. `measured_bytes` is CUDA's own count for the step,
    which needs no profile; a CPU's figure is said besides, and never compared with a GPU's.
    """
    on_cuda = profile is not None and profile.counters
    measured = max(measured_bytes or 0, profile.peak_bytes if profile is not None and on_cuda else 0)
    peak = measured or plan.peak_bytes
    if measured:
        parts = [f"memory: peak of the step {human_bytes(peak)} measured (predicted {human_bytes(plan.peak_bytes)})"]
    else:
        parts = [f"memory on a GPU: peak of the step {human_bytes(peak)} predicted, not measured"]
    parts += [_against(peak, name, baseline.peak_bytes) for name, baseline in baselines.items()]
    if profile is not None and not on_cuda:
        parts.append(f"on this CPU {human_bytes(profile.peak_bytes)} of live tensors were measured")
    return "; ".join(parts)


def phase_part(plan: MemoryPlan, measured: Mapping[str, int]) -> str:
    """What is said of the phase of a run that took more than its step, or is to; "" where none did.

    `measured` are CUDA's peaks by phase, empty where there are none: then it is that of the plan.
    """
    planned = {name: stage.peak_bytes for name, stage in plan.stages.items()}
    if measured and GENERATING in planned and GENERATING not in measured:  # answers are part of the evaluation there
        planned[EVALUATION] = max(planned.pop(GENERATING), planned.get(EVALUATION, 0))
    taken = measured or planned
    largest = max(taken, key=lambda name: (taken[name], name == STEP))
    if largest == STEP:
        return ""
    predicted = f"{human_bytes(planned[largest])} predicted" if largest in planned else ""
    shown = ", ".join(filter(None, [f"{human_bytes(taken[largest])} measured" if measured else "", predicted]))
    return f"its largest phase is {PHASES[largest]}: {shown}"


def _against(peak_bytes: int, name: str, baseline_bytes: int) -> str:
    saved = 1 - peak_bytes / baseline_bytes
    what = f"{name} would take {human_bytes(baseline_bytes)} (predicted)"
    return f"{what}: saves {saved:.0%}" if saved >= 0 else f"{what}: saves nothing, takes {-saved:.0%} more"
