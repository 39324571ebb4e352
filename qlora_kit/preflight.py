"""The plan of a run before it: recorded, said at the end beside the baselines, and on CUDA the reason to refuse it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from qlora_kit import host_memory
from qlora_kit.config import LeanConfig, RunConfig
from qlora_kit.errors import Fault, UserError
from qlora_kit.progress import human_bytes

if TYPE_CHECKING:
    import torch

    from qlora_kit.memory.fit import Budget
    from qlora_kit.memory.plan import MemoryPlan
    from qlora_kit.memory.profile_result import MemoryProfile
    from qlora_kit.memory.rules import Gpu

MULTIPLE = 8  # rows are padded to a multiple of so many tokens


@dataclass(frozen=True)
class Preflight:
    """What was planned; `plan` is None where the architecture cannot be planned, and `reason` says why.

    `baselines` are the plans of other ways to train, by what these are called in a sentence. `lean` are the run's
    pieces of the lean step, the embedding moved to the host where it would not fit otherwise.
    """

    plan: MemoryPlan | None
    lean: LeanConfig
    baselines: Mapping[str, MemoryPlan] = field(default_factory=dict)
    reason: str = ""

    def closing_line(self, measured_bytes: int | None, profile: MemoryProfile | None = None) -> str:
        """The line at the end of a run: its peak, measured on CUDA or else predicted, beside the baselines'."""
        if self.plan is None:
            return f"memory: not planned ({self.reason})"
        from qlora_kit.memory.profile import summary_line

        return summary_line(profile, self.plan, self.baselines, measured_bytes)


def with_rows(config: RunConfig, longest_tokens: int) -> RunConfig:
    """`config` with rows of `longest_tokens`, padded as a batch is."""
    rows = -(-longest_tokens // MULTIPLE) * MULTIPLE
    shown = min(rows, config.data.seq_len or rows)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, seq_len=shown))


def plan_run(config: RunConfig, device: torch.device, longest_tokens: int, *, checks: bool = True) -> Preflight:
    """Plan the run with rows of `longest_tokens`, and its baselines; on CUDA check that it fits what is free.

    Raises `UserError` for a run that does not fit, with the remedies ranked; without `checks` it only plans.
    """
    from qlora_kit.memory import fit
    from qlora_kit.memory.baselines import BASELINES, possible_plan
    from qlora_kit.memory.plan import CannotPlanError, plan

    config = with_rows(config, longest_tokens)
    gpu, budget = fit.present_device() if device.type == "cuda" else (None, None)
    budget = budget if checks else None
    try:
        planned = plan(config, gpu=gpu)
        if budget is not None and planned.device_bytes > budget.n_bytes and config.lean.offload_embedding == "auto":
            config = fit.with_settings(config, {"offload_embedding": "on"})
            planned = plan(config, gpu=gpu)
        possible = ((b.on(gpu).said, possible_plan(config, b, gpu=gpu)) for b in BASELINES if b.default)
        baselines = {said: found for said, found in possible if found is not None}
    except CannotPlanError as error:
        return Preflight(None, config.lean, reason=error.reason)
    faults: list[Fault] = []
    if budget is not None:
        if planned.device_bytes > budget.n_bytes:
            faults += _too_large(config, gpu, budget, planned).faults
        faults += _host_faults(planned, host_memory.available_bytes())
    if faults:
        raise UserError(faults)
    return Preflight(planned, config.lean, baselines)


def _host_faults(planned: MemoryPlan, available_bytes: int | None) -> list[Fault]:
    """That the host lacks the memory in which the plan's checkpoints wait; None: it does not tell what it has."""
    if available_bytes is None or planned.host_bytes <= available_bytes:
        return []
    rule = (
        f"keeps {human_bytes(planned.host_bytes)} of checkpoints in the host's memory, of which "
        f"{human_bytes(available_bytes)} are available"
    )
    shorter = planned.seq_len * max(available_bytes, 0) // planned.host_bytes
    remedy = f"Use --offload-activations off, --seq-len {max(shorter, 2)}, or a smaller --batch-size."
    return [Fault("--offload-activations", "on", rule, remedy)]


def _too_large(config: RunConfig, gpu: Gpu | None, budget: Budget, planned: MemoryPlan) -> UserError:
    """The refusal of a run that does not fit into `budget`, each remedy planned and not guessed."""
    from qlora_kit.memory import fit

    planner = fit.Planner(config, gpu)
    changes = fit.savings(planner, budget)
    enough = fit.together(planner, budget, changes)
    if enough is not None:
        remedy = f"With {enough.flags} it needs {human_bytes(enough.device_bytes)}."
    else:
        ranked = ", ".join(f"{change.flags} (saves {human_bytes(change.saves_bytes)})" for change in changes[:3])
        remedy = f"What saves the most is not enough: {ranked}." if ranked else "Use a smaller model."
    largest = max(planned.components, key=lambda name: planned.components[name])
    rule = (
        f"needs {human_bytes(planned.device_bytes)} (predicted, not yet validated on hardware), and "
        f"{human_bytes(budget.n_bytes)} are {budget.source}; the largest part is {largest}, "
        f"{human_bytes(planned.components[largest])}"
    )
    see = f"`qlora-kit plan --fit {budget.n_bytes // 2**20}MiB` lists what fits; --no-preflight runs it all the same."
    return UserError.of("--model", config.base.model, rule, f"{remedy} {see}")
