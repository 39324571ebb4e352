"""The plan of a run before it: recorded, said at the end beside the baselines, and on CUDA the reason to refuse it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from qlora_kit.config.settings import LeanConfig, RunConfig
from qlora_kit.errors import Fault, Faults, UserError, named
from qlora_kit.system import host_memory
from qlora_kit.system.progress import EVALUATION, GENERATING, LOADING, STEP, free_bytes, human_bytes
from qlora_kit.tasks.decoding import ANSWER_BATCH, AnswerLengths, HeldOut

if TYPE_CHECKING:
    import torch

    from qlora_kit.memory.fit import Budget
    from qlora_kit.memory.plan import MemoryPlan
    from qlora_kit.memory.profile.result import MemoryProfile
    from qlora_kit.memory.rules import Gpu

MULTIPLE = 8  # rows are padded to a multiple of so many tokens
WITHOUT_SETTING = {  # what helps in a phase beside the settings that are tried
    EVALUATION: " Or hold out shorter rows.",
    GENERATING: " Or hold out shorter prompts.",
}


@dataclass(frozen=True, kw_only=True)
class Preflight:
    """What was planned; `plan` is None where the architecture cannot be planned, and `reason` says why.

    `baselines` are the plans of other ways to train, by what these are called in a sentence. `lean` are the run's
    pieces of the lean step, the embedding moved to the host where it would not fit otherwise.
    """

    plan: MemoryPlan | None
    lean: LeanConfig
    baselines: Mapping[str, MemoryPlan] = field(default_factory=dict)
    reason: str = ""

    def closing_line(self, measured: Mapping[str, int] | None, profile: MemoryProfile | None = None) -> str:
        """The line at the end of a run: its step's peak, measured on CUDA or else predicted, beside the baselines'.

        `measured` are the peaks of its phases on CUDA; where another took more than the step, that is said too.
        """
        if self.plan is None:
            return f"memory: not planned ({self.reason})"
        from qlora_kit.memory.profile.profiler import phase_part, summary_line

        measured = measured or {}
        line = summary_line(profile, self.plan, self.baselines, measured.get(STEP))
        left_out = f"evaluation and answers were not planned ({self.plan.unplanned})" if self.plan.unplanned else ""
        return "; ".join(filter(None, [line, phase_part(self.plan, measured), left_out]))


def padded(tokens: int) -> int:
    """The tokens of a row as it is padded in a batch."""
    return -(-tokens // MULTIPLE) * MULTIPLE


def with_rows(config: RunConfig, longest_tokens: int) -> RunConfig:
    """`config` with rows of `longest_tokens`, padded as a batch is."""
    rows = padded(longest_tokens)
    shown = min(rows, config.data.seq_len or rows)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, seq_len=shown))


def plan_run(
    config: RunConfig,
    device: torch.device,
    longest_tokens: int,
    *,
    checks: bool = True,
    held_out: HeldOut | None = None,
) -> Preflight:
    """Plan the run with rows of `longest_tokens`, and its baselines; on CUDA check that it fits what is free.

    `held_out` is what it evaluates and answers. It fits when its largest phase does, whichever that is.
    Raises `UserError` for a run that does not fit, with the remedies ranked; without `checks` it only plans.
    """
    from qlora_kit.memory import fit, rules
    from qlora_kit.memory.baselines import BASELINES, possible_plan
    from qlora_kit.memory.plan import CannotPlanError, plan

    config = with_rows(config, longest_tokens)
    gpu, budget = fit.present_device() if device.type == "cuda" else (None, None)
    room_bytes = 0 if gpu is None or budget is None else rules.peak_within(budget.n_bytes, gpu.capability)
    budget = budget if checks else None
    try:
        planned = plan(config, gpu=gpu, held_out=held_out, room_bytes=room_bytes)
        if budget is not None and planned.device_bytes > budget.n_bytes and config.lean.offload_embedding == "auto":
            config = fit.with_settings(config, {"offload_embedding": "on"})
            planned = plan(config, gpu=gpu, held_out=held_out, room_bytes=room_bytes)
        possible = ((b.on(gpu).said, possible_plan(config, b, gpu=gpu)) for b in BASELINES if b.default)
        baselines = {said: found for said, found in possible if found is not None}
    except CannotPlanError as error:
        return Preflight(plan=None, lean=config.lean, reason=error.reason)
    if budget is not None:
        _check_room(config, gpu, budget, planned, held_out)
    return Preflight(plan=planned, lean=config.lean, baselines=baselines)


def _check_room(
    config: RunConfig, gpu: Gpu | None, budget: Budget, planned: MemoryPlan, held_out: HeldOut | None
) -> None:
    """Check that device and host have room for the run. Raises one `UserError`."""
    with Faults() as faults:
        if planned.device_bytes > budget.n_bytes:
            faults.add(_too_large(config, gpu, budget, planned, held_out))
        for fault in _host_faults(planned, host_memory.available_bytes()):
            faults.add(fault)


def _host_faults(planned: MemoryPlan, available_bytes: int | None) -> list[Fault]:
    """That the host lacks the memory in which the plan's checkpoints wait; None: it does not tell what it has."""
    if available_bytes is None or planned.host_bytes <= max(available_bytes, 0):
        return []
    rule = (
        f"keeps {human_bytes(planned.host_bytes)} of checkpoints in the host's memory, of which "
        f"{human_bytes(available_bytes)} are available"
    )
    shorter = planned.seq_len * max(available_bytes, 0) // planned.host_bytes
    off, length = named("offload_activations", "off"), named("seq_len", max(shorter, 2))
    remedy = f"Use {off}, {length}, or a smaller {named('batch_size')}."
    return [Fault("offload_activations", "on", rule, remedy)]


def prompts_at_once(planned: MemoryPlan, device: torch.device) -> int:
    """How many prompts the run of `planned` answers at once on `device`.

    On CUDA as many as were planned: what was free then has room for them, so that answers never decide whether it fits;
    on the host, whose plan is a GPU's, as many as what is free now has room for.
    """
    assert planned.answers is not None, "only of a run that answers prompts"
    return planned.answers.prompts if device.type == "cuda" else _prompts_in_free(planned, device)


def prompts_in_free(config: RunConfig, device: torch.device, answers: AnswerLengths) -> int:
    """How many prompts a model of `config`, which is loaded, answers at once in what `device` has free now.

    As many as `scoring` takes where such a run, or its answers, cannot be planned.
    """
    from qlora_kit.memory import fit
    from qlora_kit.memory.plan import plan

    try:
        gpu = fit.present_device()[0] if device.type == "cuda" else None
        found = plan(
            with_rows(config, MULTIPLE), gpu=gpu, held_out=HeldOut(rows=0, row_tokens=0, sampled=answers, asked=answers)
        )
    except UserError:  # it may be one that does not train, and answers all the same
        return ANSWER_BATCH
    return ANSWER_BATCH if found.answers is None else _prompts_in_free(found, device)


def _prompts_in_free(planned: MemoryPlan, device: torch.device) -> int:
    """With the model loaded; the plan counts it, and the optimizer's states, beside the prompts."""
    from qlora_kit.memory import rules, stages

    assert planned.answers is not None, "it was asked for"
    own, loading = planned.answers, planned.stages[LOADING].components
    loaded_bytes = sum(n_bytes for name, n_bytes in loading.items() if name != "workspaces")  # and those are gone
    one_bytes = max(own.one_bytes - loaded_bytes, own.each_bytes)
    free = free_bytes(device)
    room_bytes = free - rules.fragmentation_bytes(free)
    return stages.prompts_at_once(room_bytes, one_bytes, own.each_bytes, own.most)


def _too_large(
    config: RunConfig, gpu: Gpu | None, budget: Budget, planned: MemoryPlan, held_out: HeldOut | None
) -> Fault:
    """The refusal of a run that does not fit into `budget`, each remedy planned and not guessed."""
    from qlora_kit.memory import fit
    from qlora_kit.memory.report import largest_in_words

    planner = fit.Planner(config, gpu, held_out=held_out)
    changes = fit.savings(planner, budget)
    enough = fit.together(planner, budget, changes)
    if enough is not None:
        remedy = f"With {enough.named} it needs {human_bytes(enough.device_bytes)}."
    else:
        ranked = ", ".join(f"{change.named} (saves {human_bytes(change.saves_bytes)})" for change in changes[:3])
        remedy = f"What saves the most is not enough: {ranked}." if ranked else "Use a smaller model."
        remedy += WITHOUT_SETTING.get(planned.largest_stage, "")
    components = planned.largest.components
    largest = max(components, key=lambda name: components[name])
    rule = (
        f"needs {human_bytes(planned.device_bytes)} (predicted, not yet validated on hardware), and "
        f"{human_bytes(budget.n_bytes)} are {budget.source}; it is largest in {largest_in_words(planned)}, where the "
        f"largest part is {largest}, {human_bytes(components[largest])}"
    )
    without = named("preflight", False)
    see = f"`qlora-kit plan --fit {budget.n_bytes // 2**20}MiB` lists what fits; {without} runs it all the same."
    return Fault("model", config.base.model, rule, f"{remedy} {see}")
