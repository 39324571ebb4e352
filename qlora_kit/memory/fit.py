"""What fits into a given memory: the largest batch and sequence, and what each change of the settings saves.

Every answer is a plan of its own, never a guess from another one; the search needs only a few of them.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from qlora_kit.config.settings import RunConfig, settings
from qlora_kit.errors import UserError, as_flag, named, rendered
from qlora_kit.memory import rules
from qlora_kit.memory.plan import MemoryPlan, plan, resolve_architecture
from qlora_kit.model.source import max_positions
from qlora_kit.tasks.decoding import HeldOut

UNITS = {
    "B": 1,
    **{f"{prefix}B": 1000**power for power, prefix in enumerate("KMGT", 1)},
    **{f"{prefix}iB": 1024**power for power, prefix in enumerate("KMGT", 1)},
}
"""Bytes of each unit: 1 GB is 10^9 of them, 1 GiB is 2^30."""

MAX_BATCH = 1024  # the search ends here: no single GPU gains from more
MAX_TOKENS = 1 << 17  # and here for a model without a limit of positions
SHORTEST = 256
MAX_ACCUM_FACTOR = 8  # a plan simulates each accumulated batch

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Budget:
    """Memory to stay within, in bytes, and where the number comes from."""

    n_bytes: int
    source: str


@dataclass(frozen=True, kw_only=True)
class LargestRun:
    """The largest run of its kind within the budget; `batch_size` 0 (or `seq_len` 0): none fits.

    `at_limit`: the search ended there and not at the budget.
    """

    batch_size: int
    seq_len: int
    device_bytes: int | None
    at_limit: bool


@dataclass(frozen=True, kw_only=True)
class Saving:
    """Other settings for the same run, planned: they take `saves_bytes` less on the device than the run does now.

    `on`: the run has this switch already, and would take that much more without it.
    """

    flags: str  # on the command line
    settings: Settings
    peak_bytes: int
    device_bytes: int
    saves_bytes: int
    fits: bool | None
    on: bool = False

    @property
    def named(self) -> str:
        """The settings, for the text of a fault."""
        return _named_change(self.settings)


@dataclass(frozen=True, kw_only=True)
class Fit:
    """What fits into `budget`: the largest batch of each length, the longest sequence of batch 1."""

    budget: Budget
    batches: tuple[LargestRun, ...]
    longest: LargestRun
    n_plans: int


def parse_size(text: str, setting: str = "fit", otherwise: str = ", or 'device'") -> int:
    """`8GiB`, `6000MiB` or `24GB` as bytes, in any case. Raises `UserError` with the nearest unit.

    Errors name `setting`; `otherwise` is what else it takes.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text, re.ASCII)
    units = {unit.lower(): n_bytes for unit, n_bytes in UNITS.items()}
    if match and match[2].lower() in units:
        size = int(float(match[1]) * units[match[2].lower()])
        if size > 0:
            return size
    rule = f"must be a size above 0 with one of the units {', '.join(UNITS)}{otherwise}"
    raise UserError.of(setting, text, rule, _nearest_size(match, setting))


def _nearest_size(match: re.Match[str] | None, setting: str) -> str:
    if match is None or not match[2]:
        return f"For example {named(setting, '8GiB')}."
    unit = match[2]
    same_letters = [u for u in UNITS if sorted(u.lower()) == sorted(unit.lower())]
    near = same_letters or difflib.get_close_matches(unit, UNITS, n=1, cutoff=0.3) or ["GiB"]
    return f"Did you mean {named(setting, match[1] + near[0])}?"


def find_gpu(name: str) -> rules.Gpu:
    """The GPU called `name`. Raises `UserError` with the nearest names."""
    try:
        return rules.find_gpu(name)
    except UserError as error:
        near = difflib.get_close_matches(name.lower().replace(" ", ""), rules.GPUS, n=3, cutoff=0.5)
        if not near:
            raise
        (fault,) = error.faults
        remedy = f"Did you mean {' or '.join(near)}? {fault.remedy}"
        raise UserError([dataclasses.replace(fault, remedy=remedy)]) from None


def present_device() -> tuple[rules.Gpu, Budget]:
    """The CUDA device of this machine, and its free memory. Raises `UserError` if there is none."""
    import torch

    if not torch.cuda.is_available():
        rule = "this machine has no usable CUDA device"
        raise UserError.of("fit", "device", rule, f"Give a size, for example {named('fit', '8GiB')}.")
    free_bytes, total_bytes = torch.cuda.mem_get_info()
    capability = torch.cuda.get_device_capability()
    gpu = rules.Gpu(torch.cuda.get_device_name(), total_bytes, capability)
    # asking created a context, which a plan counts again
    free_bytes = min(total_bytes, free_bytes + rules.context_bytes(capability))
    return gpu, Budget(free_bytes, f"free on {gpu.name}")


class Planner:
    """Plans of one run with other settings, each made once; `tick` is called for each new one.

    `held_out` is what the run evaluates and answers, where that is known.
    """

    def __init__(
        self,
        config: RunConfig,
        gpu: rules.Gpu | None = None,
        tick: Callable[[int], None] | None = None,
        held_out: HeldOut | None = None,
    ) -> None:
        self.config = config
        self.gpu = gpu
        self.tick = tick
        self.held_out = held_out
        self._plans: dict[tuple[tuple[str, Any], ...], MemoryPlan] = {}

    @property
    def n_plans(self) -> int:
        return len(self._plans)

    def plan(self, **changes: Any) -> MemoryPlan:
        """The plan of the run with `changes`, by setting name. Raises `UserError`."""
        key = tuple(sorted(changes.items()))
        if key not in self._plans:
            changed = with_settings(self.config, changes)
            self._plans[key] = plan(changed, gpu=self.gpu, held_out=self.held_out)
            if self.tick is not None:
                self.tick(self.n_plans)
        return self._plans[key]

    def need_bytes(self, batch_size: int, seq_len: int) -> int:
        """The free memory that the run needs with this batch and length, in its largest phase."""
        return self.plan(batch_size=batch_size, seq_len=seq_len).device_bytes


def with_settings(config: RunConfig, changes: Settings) -> RunConfig:
    """`config` with the settings in `changes`. Raises `UserError` if they break a rule."""
    group_of = {field.name: group for group, field, _ in settings()}
    grouped: dict[str, dict[str, Any]] = {}
    for name, value in changes.items():
        grouped.setdefault(group_of[name], {})[name] = value
    own = grouped.pop("", {})
    changed = {group: dataclasses.replace(getattr(config, group), **values) for group, values in grouped.items()}
    return dataclasses.replace(config, **own, **changed)


def largest(need: Callable[[int], int], budget_bytes: int, low: int, high: int, guess: int | None = None) -> int:
    """The largest n with `low` <= n < `high` and need(n) within the budget; `low` must fit and `high` must not.

    `need` must not fall with n. It is called rarely, since it is nearly a straight line: the next n is where the line
    through the two nearest known points meets the budget, and every fifth n is the middle, in case it is not straight.
    """
    known: dict[int, int] = {}
    while high - low > 1:
        n = _next_probe(known, budget_bytes, low, high, guess)
        known[n] = need(n)
        low, high = (n, high) if known[n] <= budget_bytes else (low, n)
    return low


def _next_probe(known: Mapping[int, int], budget_bytes: int, low: int, high: int, guess: int | None) -> int:
    probe: float
    if not known:
        probe = low + 1 if guess is None else guess
    elif len(known) == 1:
        (first,) = known
        probe = first + 1 if known[first] <= budget_bytes else first - 1
    elif len(known) % 5 == 4:
        probe = (low + high) // 2 if high in known else low * 2
    else:
        probe = _where_met(known, budget_bytes, low, high)
    return round(min(max(probe, low + 1), high - 1))


def _where_met(known: Mapping[int, int], budget_bytes: int, low: int, high: int) -> int:
    """Where the line through the two known points nearest to the border meets the budget."""
    a, b = sorted(sorted(known, key=lambda n: min(abs(n - low), abs(n - high)))[:2])
    if known[b] <= known[a]:
        return b * 2 if known[b] <= budget_bytes else a // 2
    return a + (budget_bytes - known[a]) * (b - a) // (known[b] - known[a])


def find_fit(planner: Planner, budget: Budget) -> Fit:
    """What fits into `budget`. Raises `UserError`."""
    positions = max_positions(resolve_architecture(planner.config)) or MAX_TOKENS
    own_len = planner.plan().seq_len
    batches: list[LargestRun] = []
    capacity: int | None = None  # tokens of a batch that just fits
    for seq_len in _lengths(positions, own_len):
        found = _largest_batch(planner, budget, seq_len, batches, capacity)
        batches.append(found)
        capacity = found.batch_size * seq_len + seq_len // 2 if found.batch_size else capacity
    return Fit(
        budget=budget,
        batches=tuple(batches),
        longest=_longest(planner, budget, batches, positions, capacity),
        n_plans=planner.n_plans,
    )


def _lengths(positions: int, own_len: int) -> list[int]:
    """Powers of two up to the model's positions, and the run's own length."""
    powers = [1 << n for n in range(SHORTEST.bit_length() - 1, positions.bit_length()) if 1 << n <= positions]
    return sorted({*powers, own_len} if powers else {positions, own_len})


def _largest_batch(
    planner: Planner, budget: Budget, seq_len: int, shorter: list[LargestRun], capacity: int | None
) -> LargestRun:
    limit = MAX_BATCH
    if shorter and not shorter[-1].at_limit:
        limit = shorter[-1].batch_size  # of longer examples no more fit
    guess = None if capacity is None else max(1, capacity // seq_len)
    batch = largest(lambda n: planner.need_bytes(n, seq_len), budget.n_bytes, 0, limit + 1, guess)
    need_bytes = planner.need_bytes(batch, seq_len) if batch else None
    return LargestRun(batch_size=batch, seq_len=seq_len, device_bytes=need_bytes, at_limit=batch == MAX_BATCH)


def _longest(
    planner: Planner, budget: Budget, batches: list[LargestRun], positions: int, capacity: int | None
) -> LargestRun:
    """The longest sequence of batch 1, between the longest of `batches` that fits and the next."""
    low = max((f.seq_len for f in batches if f.batch_size), default=0)
    high = min((f.seq_len for f in batches if not f.batch_size), default=positions + 1)
    length = largest(lambda n: planner.need_bytes(1, n), budget.n_bytes, max(low, 1), high, capacity)
    if length == 1:  # a run takes examples of two tokens or more
        return LargestRun(batch_size=1, seq_len=0, device_bytes=None, at_limit=False)
    return LargestRun(
        batch_size=1, seq_len=length, device_bytes=planner.need_bytes(1, length), at_limit=length == positions
    )


def savings(planner: Planner, budget: Budget | None) -> tuple[Saving, ...]:
    """What other settings would save, each planned, the most first; those that save nothing are left out."""
    now = planner.plan()
    found = []
    for change in _candidates(planner.config, now):
        try:
            found.append(_changed(planner, now, change, budget))
        except UserError:  # the model or the GPU cannot run with it
            continue
    return _ranked(found)


def switched_on(planner: Planner) -> tuple[Saving, ...]:
    """What the memory-saving switches of the run save already, each planned without it, the most first."""
    now, config = planner.plan(), planner.config
    found = []
    for change in _without_switches(config, now):
        without = planner.plan(**change)
        more_bytes = without.device_bytes - now.device_bytes
        switch = next(iter(change))
        shown = flags_of({switch: _value_of(config, switch, now)})
        found.append(
            Saving(
                flags=shown,
                settings=change,
                peak_bytes=without.peak_bytes,
                device_bytes=without.device_bytes,
                saves_bytes=more_bytes,
                fits=None,
                on=True,
            )
        )
    return _ranked(found)


def _value_of(config: RunConfig, name: str, now: MemoryPlan) -> Any:
    """The value of the setting `name` in `config`, the optimizer resolved."""
    group = next(group for group, field, _ in settings() if field.name == name)
    if group == "lean":
        return getattr(config.lean.resolved("cuda"), name)
    value = getattr(getattr(config, group) if group else config, name)
    return now.optim if name == "optim" else value


def together(planner: Planner, budget: Budget, ranked: Iterable[Saving]) -> Saving | None:
    """The shortest start of `ranked` whose changes together make the run fit; None if all together do not."""
    now, joined = planner.plan(), dict[str, Any]()
    for change in ranked:
        joined = {**change.settings, **joined} if not joined.keys() & change.settings.keys() else joined
        found = _changed(planner, now, joined, budget)
        if found.fits:
            return found
    return None


def _ranked(changes: Iterable[Saving]) -> tuple[Saving, ...]:
    return tuple(sorted((c for c in changes if c.saves_bytes > 0), key=lambda c: -c.saves_bytes))


def _changed(planner: Planner, now: MemoryPlan, change: Settings, budget: Budget | None) -> Saving:
    then = planner.plan(**change)
    fits = None if budget is None else then.device_bytes <= budget.n_bytes
    saves_bytes = now.device_bytes - then.device_bytes
    return Saving(
        flags=flags_of(change),
        settings=change,
        peak_bytes=then.peak_bytes,
        device_bytes=then.device_bytes,
        saves_bytes=saves_bytes,
        fits=fits,
    )


def flags_of(change: Settings) -> str:
    """The change as flags of the command line."""
    return rendered(_named_change(change), as_flag)


def _named_change(change: Settings) -> str:
    return " ".join(f"no {named(name)}" if value is None else named(name, value) for name, value in change.items())


def _candidates(config: RunConfig, now: MemoryPlan) -> Iterator[Settings]:
    """The settings that might save memory, one change each."""
    yield from _smaller_batches(config)
    if now.seq_len >= 4:
        yield {"seq_len": now.seq_len // 2}
    if not config.optim.gradient_checkpointing:
        yield {"gradient_checkpointing": True}
    if config.data.pack:
        yield {"pack": False}
    if config.evaluation.exact_match is not None:
        yield {"exact_match": None}
    if now.optim != "paged_adamw_8bit":
        yield {"optim": "paged_adamw_8bit"}
    if config.base.bits > 4:
        yield {"full": False, "bits": 4} if config.base.full else {"bits": 4}
    elif not config.base.double_quant:
        yield {"double_quant": True}
    if not config.base.full:
        yield from _more_pieces(config)
        yield from _smaller_adapters(config)


def _more_pieces(config: RunConfig) -> Iterator[Settings]:
    """The lean step, or those of its pieces that are off."""
    if config.lean.lean == "off":
        yield {"lean": "on"}
        return
    for name, value in _pieces(config):
        if value in (False, "off"):
            yield {name: True if value is False else "on"}


def _pieces(config: RunConfig) -> Iterator[tuple[str, Any]]:
    """The switches of the lean step, each with its value on CUDA."""
    resolved = config.lean.resolved("cuda")
    for field in dataclasses.fields(resolved):
        if field.name != "lean":
            yield field.name, getattr(resolved, field.name)


def _smaller_batches(config: RunConfig) -> Iterator[Settings]:
    """Smaller batches, with accumulation so that an optimizer step has the same examples, if that divides."""
    batch, accum = config.optim.batch_size, config.optim.grad_accum
    factors = [f for f in range(2, MAX_ACCUM_FACTOR + 1) if batch % f == 0]
    for factor in sorted({*factors[:1], *factors[-1:]}):
        yield {"batch_size": batch // factor, "grad_accum": accum * factor}
    if batch > 1 and not factors:
        yield {"batch_size": batch // 2}


def _smaller_adapters(config: RunConfig) -> Iterator[Settings]:
    adapter = config.adapter
    if adapter.r > 1:
        yield {"r": adapter.r // 2}
    if adapter.dora:
        yield {"dora": False}
    if adapter.dropout:
        yield {"dropout": 0.0}
    if adapter.adapter_dtype == "fp32":
        yield {"adapter_dtype": "bf16"}


def _without_switches(config: RunConfig, now: MemoryPlan) -> Iterator[Settings]:
    if config.optim.gradient_checkpointing:
        yield {"gradient_checkpointing": False}
    if config.base.bits < 16:
        yield {"bits": 16, "optim": now.optim}
    if config.base.bits == 4 and config.base.double_quant:
        yield {"double_quant": False}
    if now.optim.startswith("paged") or "8bit" in now.optim:
        yield {"optim": "adamw"}
    if config.lean.lean == "on" and not config.base.full:
        yield {"lean": "off"}
        yield from (
            {name: False if value is True else "off"} for name, value in _pieces(config) if value in (True, "on")
        )
