"""The memory of each combination, planned before anything runs, and which combinations it rules out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from qlora_kit.errors import UserError
from qlora_kit.memory import stages
from qlora_kit.memory.fit import Budget, Planner, parse_size, present_device
from qlora_kit.memory.plan import CannotPlanError
from qlora_kit.memory.preflight import with_rows
from qlora_kit.search.space import Point, Space, folder_name, label_of
from qlora_kit.system.progress import human_bytes

NO_BYTES = ("lr", "alpha", "clip", "weight_decay", "warmup", "epochs", "max_steps")  # settings that take no memory


@dataclass(frozen=True)
class PlannedMemory:
    """What each combination needs on a GPU, by the name of its folder, in bytes; empty if nothing was planned.

    `reason` says why an architecture could not be planned.
    """

    device_bytes: Mapping[str, int]
    budget: Budget | None
    reason: str = ""

    def fits(self, point: Point) -> bool:
        """Whether `point` fits into the budget; always without one."""
        needed = self.device_bytes.get(folder_name(point))
        return self.budget is None or needed is None or needed <= self.budget.n_bytes

    def said_of(self, point: Point) -> str:
        """Why `point` does not fit: `needs 9.10 GiB, and 8.00 GiB are given`."""
        assert self.budget is not None, "nothing is too large without a budget"
        needed = self.device_bytes[folder_name(point)]
        return f"needs {human_bytes(needed)}, and {human_bytes(self.budget.n_bytes)} are {self.budget.source}"


def read_budget(text: str | None, device_type: str) -> Budget | None:
    """The budget of the settings, else the free memory of a CUDA device. Raises `UserError`."""
    if text is not None:
        return Budget(parse_size(text, "budget", otherwise=""), "given")
    return present_device()[1] if device_type == "cuda" else None


def plan_memory(
    space: Space, budget_text: str | None, longest_tokens: int, device_type: str, tick: Callable[[int], None]
) -> PlannedMemory:
    """Plan every combination with rows of `longest_tokens`; `tick` is called with the number of plans made so far.

    Nothing is planned without `preflight` and `budget`. Raises `UserError` if nothing fits, and if there is a `budget`
    but the architecture cannot be planned.
    """
    config = space.config
    if not config.preflight and budget_text is None:
        return PlannedMemory({}, None)
    budget = read_budget(budget_text, device_type)
    gpu = present_device()[0] if device_type == "cuda" else None
    held_out = stages.assumed(config, longest_tokens)  # one of the folds holds out the longest row
    planner = Planner(with_rows(config, longest_tokens), gpu, tick, held_out)
    try:
        needed = {folder_name(point): _needed_bytes(planner, point, budget) for point in space.points()}
    except CannotPlanError as error:
        if budget_text is not None:
            raise
        return PlannedMemory({}, None, error.reason)
    planned = PlannedMemory(needed, budget)
    _check_any_fits(space, planned)
    return planned


def _needed_bytes(planner: Planner, point: Point, budget: Budget | None) -> int:
    """What `point` needs, with the embedding on the host if a run would move it there to fit."""
    changes = {name: value for name, value in point.items() if name not in NO_BYTES}
    needed = planner.plan(**changes).device_bytes
    is_too_large = budget is not None and needed > budget.n_bytes
    if is_too_large and planner.config.lean.offload_embedding == "auto":
        needed = planner.plan(**changes, offload_embedding="on").device_bytes
    return needed


def _check_any_fits(space: Space, planned: PlannedMemory) -> None:
    if any(planned.fits(point) for point in space.points()):
        return
    assert planned.budget is not None
    smallest = min(space.points(), key=lambda point: planned.device_bytes[folder_name(point)])
    rule = f"is too small for every combination; the smallest, {label_of(smallest)}, {planned.said_of(smallest)}"
    remedy = "Give more, or search smaller values; `qlora-kit plan --fit` lists what fits."
    raise UserError.of("budget", human_bytes(planned.budget.n_bytes), rule, remedy)
