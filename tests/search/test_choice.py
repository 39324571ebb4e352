"""The one-standard-error rule, and what is read of a finished run."""

from __future__ import annotations

import math

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from qlora_kit.search.choice import FINISHED, Tried, best_of, choose, higher_is_better, metric_of

VALUES = st.floats(-1e3, 1e3, allow_nan=False).map(lambda v: round(v, 3))


def tried(rank: int, values, state: str = FINISHED) -> Tried:
    return Tried(point={"r": rank}, rank=rank, state=state, values=tuple(values))


def naive_choice(candidates, higher):
    """Word for word: of those no worse than one standard error below the best, the smallest rank."""
    sign = 1 if higher else -1
    scored = []
    for rank, values in candidates:
        k = len(values)
        mean = math.fsum(values) / k
        variance = math.fsum((v - mean) ** 2 for v in values) / (k - 1)
        scored.append((rank, sign * mean, math.sqrt(variance) / math.sqrt(k)))
    best = max(score for _, score, _ in scored)
    error = next(e for _, score, e in scored if score == best)
    smallest = min(rank for rank, score, _ in scored if score >= best - error)
    margins = [abs(score - (best - error)) for _, score, _ in scored]
    return smallest, best, error, margins


@settings(deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.integers(1, 64), st.lists(VALUES, min_size=3, max_size=3)), min_size=1, max_size=6),
    st.booleans(),
)
def test_the_choice_equals_the_rule_spelled_out(candidates, higher):
    smallest, best, error, margins = naive_choice(candidates, higher)
    scores = sorted({round(m, 9) for m in margins})
    assume(all(m == error or m > 1e-9 for m in scores))  # none so near the border that rounding decides
    means = [math.fsum(values) / 3 for _, values in candidates]
    assume(len({round(m, 9) for m in means}) == len(means))  # one is the best
    combinations = [tried(rank, values) for rank, values in candidates]
    chosen = choose(combinations, higher)
    sign = 1 if higher else -1
    assert chosen.rank == smallest
    assert sign * chosen.mean >= best - error - 1e-9
    assert sign * best_of(combinations, higher).mean == pytest.approx(best)


def test_a_smaller_rank_within_one_standard_error_wins_and_one_beyond_does_not():
    large = tried(32, [0.90, 0.92, 0.94])  # standard error 0.0115
    near, far = tried(8, [0.91, 0.91, 0.91]), tried(4, [0.90, 0.90, 0.90])
    assert choose([large, near, far], higher=True) == near
    assert choose([large, far], higher=True) == large


def test_of_equal_ranks_the_better_mean_is_taken():
    one, other = tried(8, [0.5, 0.6, 0.7]), tried(8, [0.55, 0.6, 0.68])
    assert choose([one, other], higher=True) == other
    assert choose([one, other], higher=False) == one


def test_what_did_not_finish_is_never_chosen():
    stopped = tried(2, [0.99], "stopped as worse than the median after 1 folds")
    assert choose([stopped, tried(8, [0.5, 0.6])], higher=True).rank == 8


def test_metrics_are_read_by_their_usual_names_from_what_a_run_reports():
    results = {
        "steps": 5,
        "eval_loss": 1.5,
        "train_loss": 1.0,
        "exact_match_before": 0.0,
        "exact_match_after": 0.25,
        "peak_bytes": 100,
        "peak_phase": "step",
        "phase_peak_bytes": {"step": 100, "loading": 90},
        "metrics": {"f1": 0.5, "report": {"macro": 0.4}},
        "folder": "x",
        "nothing": None,
    }
    assert metric_of(results, "eval_loss") == metric_of(results, "loss") == 1.5
    assert metric_of(results, "exact_match") == 0.25
    assert metric_of(results, "f1") == 0.5
    assert metric_of(results, "macro") == 0.4
    for absent in ("accuracy", "steps", "step", "loading", "peak_bytes", "train_loss", "folder", "nothing"):
        assert metric_of(results, absent) is None


def test_losses_are_better_lower_and_all_else_higher():
    assert [higher_is_better(m) for m in ("eval_loss", "loss", "perplexity")] == [False] * 3
    assert all(higher_is_better(m) for m in ("exact_match", "accuracy", "f1", "bleu"))
