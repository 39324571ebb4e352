"""What the phases were to show: each promise a figure made from their rows, with its bound; and the table of them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from step import judged

from gpu.journal import DONE, Found
from gpu.phases import MODELS

GIB = 1 << 30
DOES_NOT_FIT = float("inf")  # bytes
STOCK_OF = dict.fromkeys(
    ("speed-unsloth", "speed-peft", "speed-cudnn"), "speed-llama"
)  # the phase with stock's row of their case
Row = Mapping[str, Any]
Rows = Mapping[str, list[dict[str, Any]]]  # by phase


@dataclass(frozen=True)
class Promise:
    """A figure and its bound; `figure` gives None where the rows do not hold it. Without a bound it is only shown."""

    says: str
    phases: tuple[str, ...]  # that the figure is made of
    figure: Callable[[Rows], float | None]
    at_most: float | None = None
    at_least: float | None = None
    unit: str = ""


@dataclass(frozen=True)
class Verdict:
    """How a promise came out."""

    promise: Promise
    value: float | None
    outcome: str  # held | fell short … | shown | missing …

    @property
    def fell_short(self) -> bool:
        return self.outcome.startswith("fell short")


def judge(promise: Promise, found: Mapping[str, Found]) -> Verdict:
    """Hold `promise` against what was found."""
    undone = [(name, found[name].status if name in found else "not run") for name in promise.phases]
    rows = {name: go.rows for name, go in found.items()}
    try:
        value = promise.figure(rows)
    except (KeyError, TypeError, ZeroDivisionError):  # rows are another process's: one that is odd costs its own line
        value = None
    if value is None:
        why = "; ".join([*(f"{name} {status}" for name, status in undone if status != DONE), *_odd(promise, rows)])
        return Verdict(promise, None, f"missing: {why or 'its rows do not hold it'}")
    partly = "" if all(status == DONE for _, status in undone) else " (of a part)"
    return Verdict(promise, value, _outcome(promise, value) + partly)


def _odd(promise: Promise, rows: Rows) -> list[str]:
    """The contenders of its phases that failed or are void."""
    of_phases = (row for phase in promise.phases for row in contenders(rows, phase))
    return [f"{row['contender']} {row['status']}" for row in of_phases if row.get("status", "ok") != "ok"]


def _outcome(promise: Promise, value: float) -> str:
    short_by = _short_by(promise, value)
    if short_by is None:
        return "shown"
    if value == DOES_NOT_FIT:
        return "fell short: does not fit"
    return "held" if short_by <= 0 else f"fell short by {shown(short_by, promise.unit)}"


def _short_by(promise: Promise, value: float) -> float | None:
    if promise.at_most is not None:
        return value - promise.at_most
    return None if promise.at_least is None else promise.at_least - value


def shown(value: float, unit: str) -> str:
    """A figure as it stands in the table."""
    if value == DOES_NOT_FIT:
        return "does not fit"
    if unit == "%":
        return f"{value:.2%}"
    text = f"{value:,.0f}" if value == int(value) and abs(value) < 1e6 and not unit else f"{value:,.3f}"
    return f"{text} {unit}".strip()


def table(found: Mapping[str, Found]) -> tuple[str, bool]:
    """The table of all promises, as Markdown, and whether any fell short."""
    verdicts = [judge(promise, found) for promise in PROMISES]
    lines = ["| what | value | bound | outcome |", "|---|--:|--:|---|"]
    for verdict in verdicts:
        promise = verdict.promise
        value = "" if verdict.value is None else shown(verdict.value, promise.unit)
        lines.append(f"| {promise.says} | {value} | {_bound(promise)} | {verdict.outcome} |")
    wheres = {(w["device"], w["commit"]): w for w in (go.where for go in found.values() if go.where)}
    lines += ["", *(f"{_where(where)}." for where in wheres.values())]
    return "\n".join(lines) + "\n", any(verdict.fell_short for verdict in verdicts)


def _bound(promise: Promise) -> str:
    if promise.at_most is not None:
        return f"≤ {shown(promise.at_most, promise.unit)}"
    return "" if promise.at_least is None else f"≥ {shown(promise.at_least, promise.unit)}"


def _where(where: Row) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    return f"{where['device']}; {versions}; commit {where['commit']}"


# --------------------------------------------------------------------------- figures


def _one(rows: Iterable[Row], **wanted: Any) -> Row | None:
    return next((row for row in rows if all(row.get(name) == value for name, value in wanted.items())), None)


def contenders(rows: Rows, phase: str) -> list[dict[str, Any]]:
    """The rows of a phase's contenders; void where the losses are not those of stock on the same case."""
    stock = _one(rows.get(STOCK_OF.get(phase, phase), ()), contender="stock", status="ok")
    own = [row for row in rows.get(phase, ()) if "contender" in row]
    return own if stock is None else [row if row is stock else judged([dict(stock), dict(row)])[1] for row in own]


def _contender(rows: Rows, phase: str, name: str) -> Row | None:
    return _one(contenders(rows, phase), contender=name, status="ok")


def _ratio(key: str, of: tuple[str, str], to: tuple[str, str]) -> Callable[[Rows], float | None]:
    """`key` of one contender over that of another, each named by phase and name."""

    def figure(rows: Rows) -> float | None:
        one, other = _contender(rows, *of), _contender(rows, *to)
        return None if one is None or other is None else one[key] / other[key]

    return figure


def _field(phase: str, key: str, scale: float = 1.0, **wanted: Any) -> Callable[[Rows], float | None]:
    """`key` of the first row of `phase` that has it and is as `wanted`."""

    def figure(rows: Rows) -> float | None:
        row = next((r for r in rows.get(phase, ()) if key in r and _one([r], **wanted) is not None), None)
        return None if row is None else row[key] / scale

    return figure


def planner_errors(rows: Rows) -> list[float]:
    """The absolute errors of the planner's cases that were measured."""
    return [abs(row["error"]) for model in MODELS for row in rows.get(f"planner-{model}", ()) if "error" in row]


def _over_errors(of: Callable[[list[float]], float]) -> Callable[[Rows], float | None]:
    return lambda rows: of(errors) if (errors := planner_errors(rows)) else None


def _counts(rows: Rows, phase: str) -> Mapping[str, int] | None:
    """How many tests came out how, once all of them are over."""
    return next((row["all"] for row in rows.get(phase, ()) if "all" in row), None)


def _failed(phase: str) -> Callable[[Rows], float | None]:
    """The tests of `phase` that failed, or could not be read; where it ended early, those by then if any."""

    def figure(rows: Rows) -> float | None:
        counts = _counts(rows, phase)
        if counts is None:
            return float(sum(row.get("outcome") == "failed" for row in rows.get(phase, ()))) or None
        failed = counts.get("failed", 0) + counts.get("uncollected", 0)
        return float(failed) if failed or counts.get("passed") else None  # where none ran, nothing was shown

    return figure


def _skipped_tests(rows: Rows) -> float | None:
    counts = _counts(rows, "tests")
    return None if counts is None else float(counts.get("skipped", 0))


def _passed_tests(rows: Rows) -> float | None:
    passed = sum(row.get("outcome") == "passed" for row in rows.get("tests", ()))
    return float(passed) if passed else None


def _peak_within(phase: str) -> Callable[[Rows], float | None]:
    """What a run under a cap reserved, in GiB; infinite where it did not fit."""

    def figure(rows: Rows) -> float | None:
        for row in rows.get(phase, ()):
            if row.get("status") == "does not fit":
                return DOES_NOT_FIT
            if row.get("status") == "trained":
                return float(row["reserved_bytes"] / GIB)
        return None

    return figure


def _useless_pieces(rows: Rows) -> float | None:
    """Pieces of the lean step without which it is neither slower nor larger (by more than 1 %)."""
    whole = _one(rows.get("ablation", ()), without=None, status="ok")
    others = [row for row in rows.get("ablation", ()) if row.get("without") and row.get("status") == "ok"]
    if whole is None or not others:
        return None
    no_gain = [all(row[key] <= 1.01 * whole[key] for key in ("step_s", "peak_bytes")) for row in others]
    return float(sum(no_gain))


MODELS_PHASES = tuple(f"planner-{model}" for model in MODELS)
LEAN_LLAMA, STOCK_LLAMA, UNSLOTH = ("speed-llama", "lean"), ("speed-llama", "stock"), ("speed-unsloth", "unsloth")
LEAN_GPT2, STOCK_GPT2 = ("speed-gpt2", "lean"), ("speed-gpt2", "stock")
PEFT_LOOP = ("speed-peft", "peft-loop")
SPEEDS, BESIDE_PEFT = ("speed-llama", "speed-unsloth"), ("speed-llama", "speed-peft")

PROMISES = (
    Promise("GPU tests that fail", ("tests",), _failed("tests"), at_most=0),
    Promise("GPU tests that pass", ("tests",), _passed_tests, at_least=1),
    Promise("GPU tests that were skipped", ("tests",), _skipped_tests),
    Promise("memory of paged states that is not freed (tests)", ("paging",), _failed("paging"), at_most=0),
    Promise("planner: cases measured", MODELS_PHASES, _over_errors(lambda e: float(len(e))), at_least=24),
    Promise(
        "planner: median error of the peak", MODELS_PHASES, _over_errors(statistics.median), at_most=0.01, unit="%"
    ),
    Promise("planner: worst error of the peak", MODELS_PHASES, _over_errors(max), at_most=0.03, unit="%"),
    Promise("llama-3.1-8b, 2 × 2048, reserved inside 6 GiB", ("fit-6gib",), _peak_within("fit-6gib"), 6.0, unit="GiB"),
    Promise("llama-3.1-8b, 1 × 32,768, r = 32, inside 8 GiB", ("fit-8gib",), _peak_within("fit-8gib"), 8.0, unit="GiB"),
    Promise("llama-3-8b: peak, of stock", ("speed-llama",), _ratio("peak_bytes", LEAN_LLAMA, STOCK_LLAMA), 0.45),
    Promise("llama-3-8b: time of a step, of stock", ("speed-llama",), _ratio("step_s", LEAN_LLAMA, STOCK_LLAMA), 1.0),
    Promise("gpt2-large: peak, of stock", ("speed-gpt2",), _ratio("peak_bytes", LEAN_GPT2, STOCK_GPT2), 0.2),
    Promise("gpt2-large: time of a step, of stock", ("speed-gpt2",), _ratio("step_s", LEAN_GPT2, STOCK_GPT2), 1.0),
    Promise("llama-3-8b: peak, of a plain PEFT loop", BESIDE_PEFT, _ratio("peak_bytes", LEAN_LLAMA, PEFT_LOOP), 1.0),
    Promise("llama-3-8b: time, of a plain PEFT loop", BESIDE_PEFT, _ratio("step_s", LEAN_LLAMA, PEFT_LOOP), 1.0),
    Promise("llama-3-8b: peak, of Unsloth's", SPEEDS, _ratio("peak_bytes", LEAN_LLAMA, UNSLOTH), 1.0),
    Promise("llama-3-8b: time of a step, of Unsloth's", SPEEDS, _ratio("step_s", LEAN_LLAMA, UNSLOTH), 1.0),
    Promise(
        "llama-3-8b: time with cuDNN's attention, of flash",
        ("speed-llama", "speed-cudnn"),
        _ratio("step_s", ("speed-cudnn", "lean"), LEAN_LLAMA),
    ),
    Promise("GPU busy, of a step's time", ("kernels",), _field("kernels", "busy_share"), at_least=0.9, unit="%"),
    Promise("kernels launched in a step", ("kernels",), _field("kernels", "launches")),
    Promise("real run: steps after the kill that were lost", ("real-run",), _field("real-run", "lost_steps"), 0),
    Promise(
        "real run: largest difference of a loss from the run that was not killed",
        ("real-run",),
        _field("real-run", "loss_gap"),
        0.01,
        unit="%",
    ),
    Promise(
        "real run: states paged after the resume, of those before",
        ("real-run",),
        _field("real-run", "paged_share"),
        at_least=1.0,
    ),
    Promise("real run: error of the predicted peak", ("real-run",), _field("real-run", "plan_error"), 0.03, unit="%"),
    Promise("real run: proof of the release passed", ("real-run",), _field("real-run", "proof_passed"), at_least=1),
    Promise("pieces of the lean step that bring nothing here", ("ablation",), _useless_pieces),
)
