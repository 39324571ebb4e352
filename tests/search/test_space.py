"""What is searched: numbers that have several values."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_kit.errors import UserError
from qlora_kit.search.space import Space, folder_name, label_of


def test_numbers_may_be_several_and_everything_else_is_as_in_a_run():
    space = Space.from_flat({"r": "4,8", "lr": [1e-4, "1e-3"], "alpha": "16", "targets": "q_proj,v_proj"})
    assert space.values == {"r": (4, 8), "lr": (1e-4, 1e-3)}
    assert space.config.adapter.r == 4
    assert space.config.adapter.targets == ("q_proj", "v_proj")
    points = space.points()
    assert points == [{"r": 4, "lr": 1e-4}, {"r": 4, "lr": 1e-3}, {"r": 8, "lr": 1e-4}, {"r": 8, "lr": 1e-3}]
    config = space.config_of(points[3])
    assert (config.adapter.r, config.optim.lr, config.adapter.alpha) == (8, 1e-3, 16.0)
    assert label_of(points[3]) == "r = 8, lr = 0.001"


@pytest.mark.parametrize(
    ("flat", "messages"),
    [
        ({"r": "0,4,-1"}, ["r = 0", "r = -1", "at least 1"]),
        ({"r": "4,x,8", "lr": "1e-4,0"}, ["r = 'x'", "whole number", "lr = 0.0"]),
        ({"r": "4,8,4"}, ["r = '4'", "is given twice"]),
        ({"r": "4,"}, ["r = ''"]),
        ({"r": "8"}, ["r = 8", "nothing to choose from"]),
        ({"r": "4,8", "seed": "1,2"}, ["seed = "]),
        ({"r": "4,8", "seq_len": "32,64"}, ["seq_len = "]),
        ({"r": "4,8", "rr": "1"}, ["rr = ", "Did you mean r?"]),
        ({"bits": "4,16", "full": "true"}, ["full = ", "bits=4"]),
    ],
)
def test_every_fault_of_every_value_is_said_at_once(flat, messages):
    with pytest.raises(UserError) as caught:
        Space.from_flat(flat)
    for message in messages:
        assert message in str(caught.value)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(1, 10**6), min_size=2, max_size=4, unique=True),
    st.lists(st.floats(1e-12, 1e3), min_size=2, max_size=4, unique=True),
)
def test_each_combination_comes_once_and_has_a_folder_of_its_own(ranks, rates):
    space = Space.from_flat({"r": ranks, "lr": ",".join(map(repr, rates))})
    naive = [{"r": r, "lr": lr} for r in ranks for lr in rates]
    assert space.points() == naive
    assert len({folder_name(point) for point in naive}) == len(naive)
