"""A bare array of counts: what it does not say is given, taken from a placement, or a default."""

from typing import Any, cast

import numpy as np
import pytest

from jax_eplb.formats.arrays import check_options, known_experts, recording_from_array
from jax_eplb.placement import Placement


def counts(windows=3, layers=4, width=5) -> np.ndarray:
    return np.arange(1, windows * layers * width + 1).reshape(windows, layers, width)


def recording(array: np.ndarray, **options):
    return recording_from_array(array, source="a.npy", **options)


def placement(num_layers=4, num_experts=5, num_slots=6) -> Placement:
    return Placement.default(
        num_experts=num_experts,
        num_slots=num_slots,
        num_ranks=2,
        layer_ids=range(3, 3 + num_layers),
    )


def test_without_options_it_counts_choices_by_expert():
    read = recording(counts())
    np.testing.assert_array_equal(read.counts, counts())
    assert (read.unit, read.num_experts, read.experts_per_token) == ("experts", 5, 1)
    assert (read.iterations, read.layer_ids) == ((0, 1, 2), (0, 1, 2, 3))
    assert read.source == "a.npy"


def test_an_array_of_two_axes_is_one_window():
    np.testing.assert_array_equal(recording(counts()[0]).counts, counts()[:1])


def test_more_counts_than_experts_are_slots():
    assert recording(counts(), num_experts=4).unit == "slots"
    assert recording(counts(), num_experts=5).unit == "experts"
    assert recording(counts(), unit="slots").unit == "slots"


def test_a_placement_says_experts_layers_and_slots():
    active = placement()
    read = recording(counts(width=6), active_placement=active)
    assert (read.unit, read.num_experts, read.layer_ids) == ("slots", 5, (3, 4, 5, 6))
    assert read.placement is active
    assert recording(counts(), active_placement=active).unit == "experts"


def test_idle_windows_and_layers_are_left_out_only_where_asked():
    array = counts()
    array[1] = 0
    array[:, :2] = 0
    kept = recording(array, drop_idle=True)
    np.testing.assert_array_equal(kept.counts, array[[0, 2]][:, 2:])
    assert (kept.iterations, kept.layer_ids) == ((0, 2), (2, 3))
    np.testing.assert_array_equal(recording(array).counts, array)


def test_the_layers_that_are_left_are_the_placements():
    array = counts()
    array[:, 0] = 0
    read = recording(array, drop_idle=True, active_placement=placement(num_layers=3))
    assert read.layer_ids == (3, 4, 5)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.ones(3, int), r"the counts have shape \(3,\); expected \[windows, layers, experts\]"),
        (np.ones((1, 1, 1, 1), int), r"the counts have shape \(1, 1, 1, 1\)"),
        (np.ones((2, 0, 3), int), r"the counts have shape \(2, 0, 3\)"),
        (np.ones((2, 3)), "the counts are float64; expected integers"),
        (np.ones((2, 3), bool), "the counts are bool; expected integers"),
        (-counts(), "iteration 2, layer 3, expert 4: negative count -60"),
    ],
)
def test_each_fault_of_the_array_has_its_message(array, message):
    with pytest.raises(ValueError, match=rf"^a\.npy: {message}"):
        recording(array)


def test_an_array_that_counted_nothing_is_refused():
    with pytest.raises(ValueError, match=r"^a\.npy: all counts are 0; nothing was recorded"):
        recording(np.zeros((2, 3, 4), int), drop_idle=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_experts": 6}, "counts of 5 experts, but num_experts is 6"),
        ({"num_experts": 6, "unit": "slots"}, "counts of 5 slots cannot hold 6 experts"),
        ({"num_experts": 4, "unit": "experts"}, "counts of 5 experts, but num_experts is 4"),
        (
            {"num_experts": 4, "active_placement": placement()},
            "the placement is for 5 experts, the recording for 4",
        ),
        (
            {"unit": "slots", "active_placement": placement()},
            "the placement has 6 slots, the counts 5; give the placement that was active",
        ),
        ({"active_placement": placement(num_layers=2)}, r"the placement's layers \(3, 4\) are not"),
    ],
)
def test_options_that_conflict_are_refused(options, message):
    with pytest.raises(ValueError, match=rf"^a\.npy: {message}"):
        recording(counts(), **options)


def test_options_are_checked_by_themselves():
    options: Any = {"unit": "slots", "num_experts": None, "experts_per_token": 2}
    assert check_options(options) is options
    with pytest.raises(ValueError, match="unit is 'tokens'; use 'experts' or 'slots'"):
        check_options({"unit": cast(Any, "tokens")})
    for name in ("num_experts", "experts_per_token"):
        with pytest.raises(ValueError, match=f"{name} is 0; it must be at least 1"):
            check_options(cast(Any, {name: 0}))


def test_the_number_of_experts_is_given_or_the_placements():
    assert known_experts({}) is None
    assert known_experts({"active_placement": placement()}) == 5
    assert known_experts({"num_experts": 7, "active_placement": placement()}) == 7
