"""What fits: sizes, the search for the largest, and what other settings save."""

from __future__ import annotations

import itertools

import pytest
from families import FAMILIES
from hypothesis import given
from hypothesis import strategies as st

from qlora_kit.config.settings import RunConfig
from qlora_kit.errors import UserError
from qlora_kit.memory import fit, rules
from qlora_kit.memory.fit import Budget, Planner, find_fit, largest, parse_size, savings, switched_on, together

MIB = 1 << 20


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> RunConfig:
    folder = tmp_path_factory.mktemp("tiny")
    FAMILIES["llama"]().save_pretrained(folder)
    flat = {"model": str(folder), "weights": "random", "batch_size": 64, "seq_len": 64, "r": 8, "bits": 16}
    return RunConfig.from_flat({**flat, "gradient_checkpointing": False})


@pytest.fixture(scope="module")
def planner(tiny) -> Planner:
    return Planner(tiny)


@given(number=st.integers(1, 10**6), unit=st.sampled_from(sorted(fit.UNITS)), blank=st.sampled_from(["", " "]))
def test_a_size_is_its_number_times_its_unit_in_any_case(number, unit, blank):
    for text in (f"{number}{blank}{unit}", f"{number}{blank}{unit.lower()}", f" {number}{unit.upper()} "):
        assert parse_size(text) == number * fit.UNITS[unit]


def test_units_are_what_they_say():
    assert [parse_size(t) for t in ("8GiB", "6000MiB", "24GB", "1.5GiB")] == [2**33, 6000 * MIB, 24 * 10**9, 3 * 2**29]


@given(text=st.text(max_size=12))
def test_any_text_is_a_size_or_one_clear_error(text):
    found = size_or_error(text)
    if isinstance(found, UserError):
        assert found.faults[0].setting == "fit"
        assert "fit=" in str(found)
    else:
        assert found > 0


def size_or_error(text: str) -> int | UserError:
    try:
        return parse_size(text)
    except UserError as error:
        return error


@pytest.mark.parametrize(
    ("text", "remedy"),
    [("8BG", "8GB"), ("8GBi", "8GiB"), ("8BiM", "8MiB"), ("8", "8GiB"), ("0GiB", "?"), ("GiB", "8GiB"), ("8G", "8GB")],
)
def test_a_wrong_size_names_the_rule_and_the_nearest(text, remedy):
    with pytest.raises(UserError) as caught:
        parse_size(text)
    assert "GiB" in caught.value.faults[0].rule
    assert remedy in caught.value.faults[0].remedy


def test_an_unknown_gpu_names_the_nearest():
    assert fit.find_gpu("RTX 4090") is rules.GPUS["rtx4090"]
    with pytest.raises(UserError, match=r"Did you mean rtx4090 .*Known: rtx3060"):
        fit.find_gpu("rtx4900")
    with pytest.raises(UserError, match="Known: rtx3060"):
        fit.find_gpu("zzz")


@given(
    steps=st.lists(st.integers(0, 50), min_size=1, max_size=60),
    budget=st.integers(0, 1500),
    guess=st.none() | st.integers(1, 60),
)
def test_the_largest_is_found_whatever_the_slope(steps, budget, guess):
    needs = [0, *itertools.accumulate(steps)]
    found = largest(needs.__getitem__, budget, 0, len(needs), guess)
    assert needs[found] <= budget
    assert found + 1 == len(needs) or needs[found + 1] > budget


@given(fixed=st.integers(0, 10**9), slope=st.integers(1, 10**7), budget=st.integers(0, 10**10))
def test_a_straight_line_takes_few_questions(fixed, slope, budget):
    asked = []

    def need(n: int) -> int:
        asked.append(n)
        return fixed + slope * n

    found = largest(need, budget, 0, 1025)
    assert found == min(max((budget - fixed) // slope, 0), 1024)
    assert len(asked) <= 6


def test_what_fits_is_at_the_border(planner):
    budget = Budget(planner.need_bytes(48, 64) + 100, "test")
    found = find_fit(planner, budget)
    assert [f.seq_len for f in found.batches] == [64, 128]  # the run's own, and the model's positions
    assert found.batches[0].batch_size == 48
    for entry in found.batches:
        assert planner.need_bytes(entry.batch_size, entry.seq_len) == entry.device_bytes <= budget.n_bytes
        assert planner.need_bytes(entry.batch_size + 1, entry.seq_len) > budget.n_bytes
    assert found.batches[0].batch_size >= found.batches[1].batch_size > 0
    assert (found.longest.seq_len, found.longest.at_limit) == (128, True)


def test_the_longest_sequence_is_at_the_border_and_nothing_fits_into_nothing(planner):
    budget = Budget(planner.need_bytes(1, 77), "test")
    found = find_fit(planner, budget)
    assert (found.longest.batch_size, found.longest.at_limit) == (1, False)
    length = found.longest.seq_len
    assert planner.need_bytes(1, length) <= budget.n_bytes < planner.need_bytes(1, length + 1)
    none = find_fit(planner, Budget(MIB, "test"))
    assert [f.batch_size for f in none.batches] == [0, 0]
    assert (none.longest.seq_len, none.longest.device_bytes) == (0, None)


@pytest.mark.slow
def test_more_memory_fits_no_less(planner):
    fits = [find_fit(planner, Budget(n * 100 * MIB, "test")) for n in (6, 7, 9)]
    for less, more in itertools.pairwise(fits):
        assert all(a.batch_size <= b.batch_size for a, b in zip(less.batches, more.batches, strict=True))
        assert less.longest.seq_len <= more.longest.seq_len


@pytest.mark.slow
def test_savings_are_planned_ranked_and_honest(tiny, planner):
    now = planner.plan()
    ranked = savings(planner, Budget(now.device_bytes - 1, "test"))
    assert [c.saves_bytes for c in ranked] == sorted((c.saves_bytes for c in ranked), reverse=True)
    flags = {c.flags for c in ranked}
    wanted = {
        "--gradient-checkpointing",
        "--seq-len 32",
        "--batch-size 32 --grad-accum 2",
        "--batch-size 8 --grad-accum 8",
    }
    assert wanted <= flags
    for change in ranked:
        again = fit.plan(fit.with_settings(tiny, change.settings))
        assert again.device_bytes == change.device_bytes == now.device_bytes - change.saves_bytes
        assert change.saves_bytes > 0
        assert change.fits


@pytest.mark.slow
def test_changes_are_joined_until_they_fit(planner):
    ranked = savings(planner, Budget(1, "test"))
    best = min(change.device_bytes for change in ranked)
    joined = together(planner, Budget(best - MIB, "test"), ranked)
    assert joined is not None
    assert joined.fits
    assert joined.flags.count("--") > ranked[0].flags.count("--")
    assert together(planner, Budget(1, "test"), ranked) is None


def test_switches_that_are_on_are_planned_without(tiny):
    on = fit.with_settings(tiny, {"bits": 4, "gradient_checkpointing": True, "batch_size": 8})
    planner = Planner(on)
    found = {change.flags: change for change in switched_on(planner)}
    assert "--gradient-checkpointing" in found
    assert "--bits 4" in found
    without = fit.plan(fit.with_settings(on, {"gradient_checkpointing": False}))
    change = found["--gradient-checkpointing"]
    assert without.device_bytes - planner.plan().device_bytes == change.saves_bytes > 0


def test_a_plan_is_made_once(tiny):
    ticks = []
    planner = Planner(tiny, tick=ticks.append)
    assert planner.plan(batch_size=2) is planner.plan(batch_size=2)
    assert ticks == [1]
    assert planner.n_plans == 1


def test_full_fine_tuning_is_offered_adapters(tiny):
    full = fit.with_settings(tiny, {"full": True, "batch_size": 1})
    flags = [change.flags for change in savings(Planner(full), None)]
    assert "--no-full --bits 4" in flags
    assert not any("--r " in text for text in flags)
