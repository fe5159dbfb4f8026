import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jax_eplb import Placement, Recording, count_experts
from jax_eplb.load import Recorder
from tests.placement_cases import random_table, seeds

pytestmark = pytest.mark.light_compile


counted = jax.jit(count_experts, static_argnums=1)


@given(st.sampled_from([(0, 2, 4), (1, 1, 1), (20, 3, 9)]), seeds)
def test_the_count_is_numpys_and_leaves_padding_out(drawn, seed):
    tokens, choices, experts = drawn
    generator = np.random.default_rng(seed)
    chosen = generator.integers(0, experts, (tokens, choices)).astype(np.int32)
    mask = generator.random(tokens) < 0.6
    counts = counted(chosen, experts, mask)
    np.testing.assert_array_equal(counts, np.bincount(chosen[mask].ravel(), minlength=experts))
    counts = counted(chosen, experts)
    np.testing.assert_array_equal(counts, np.bincount(chosen.ravel(), minlength=experts))


def test_counts_are_int32_under_jit():
    counts = counted(jnp.array([[0, 1], [1, 1]]), 3)
    assert counts.tolist() == [1, 3, 0]
    assert counts.dtype == jnp.int32


def recording(counts=None, **keywords):
    counts = np.arange(12).reshape(2, 2, 3) if counts is None else counts
    return Recording(counts, **{"num_experts": 3, "experts_per_token": 2} | keywords)


def placement(**keywords):
    sizes = {"num_experts": 3, "num_slots": 4, "num_ranks": 2, "num_layers": 2} | keywords
    return Placement.default(**sizes)


def test_layers_and_iterations_are_numbered_from_zero_unless_named():
    assert recording().layer_ids == (0, 1)
    assert recording(iterations=(7, 9)).iterations == (7, 9)
    assert recording(np.ones((1, 1, 3), np.int32)).counts.dtype == np.int64


negative = np.zeros((2, 2, 3), int)
negative[1, 0, 2] = -4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"counts": np.ones((2, 3), int)}, "run 7: counts have shape (2, 3); expected [windows"),
        ({"counts": np.ones((0, 2, 3), int)}, "counts have shape (0, 2, 3)"),
        ({"unit": "tokens"}, "unit is 'tokens'; use 'experts' or 'slots'"),
        ({"counts": np.ones((2, 2, 3))}, "counts are float64; expected integers"),
        ({"layer_ids": (1,)}, "1 layer ids for 2 layers"),
        ({"iterations": (1, 2, 3)}, "3 iterations, 2 windows"),
        ({"counts": negative, "iterations": (5, 6), "layer_ids": (3, 4)},
         "iteration 6, layer 3, expert 2: negative count -4"),
        ({"num_experts": 4}, "counts of 3 experts, but num_experts is 4"),
        ({"num_experts": 4, "unit": "slots"}, "counts of 3 slots cannot hold 4 experts"),
        ({"placement": placement(num_experts=4)}, "is for 4 experts, the recording for 3"),
        ({"placement": placement(layer_ids=(3, 4))}, "the placement's layers (3, 4) are not"),
        ({"placement": placement(), "unit": "slots"}, "the placement has 4 slots, the counts 3"),
        ({"rank_tokens": np.ones((2, 1, 4), int)}, "rank tokens have shape (2, 1, 4)"),
    ],
)  # fmt: skip
def test_a_faulty_recording_is_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        recording(**arguments, source="run 7")
    assert str(caught.value).startswith("run 7: ")


@given(st.integers(1, 3), st.integers(1, 6), st.integers(0, 2), seeds)
def test_counts_by_slot_become_counts_by_expert_under_the_placement_that_was_active(
    layers, experts, redundant, seed
):
    generator = np.random.default_rng(seed)
    slots = -(-(experts + redundant) // 2) * 2
    table = random_table(generator, layers, experts, slots, 2)
    active = Placement.from_slots(table, num_experts=experts, num_ranks=2)
    counts = generator.integers(0, 50, (2, layers, slots))
    kept = recording(counts, unit="slots", num_experts=experts, placement=active)
    expected = np.zeros((2, layers, experts), int)
    for window, layer, slot in np.ndindex(counts.shape):
        expected[window, layer, table[layer, slot]] += counts[window, layer, slot]
    np.testing.assert_array_equal(kept.expert_counts(), expected)


def test_counts_by_slot_without_a_placement_are_not_taken_for_experts():
    with pytest.raises(ValueError, match="which expert sat in a slot is not recorded"):
        recording(unit="slots").expert_counts()


def test_a_part_keeps_its_iteration_numbers_and_ranks():
    ranks = np.arange(8).reshape(2, 2, 2)
    kept = recording(iterations=(100, 200), rank_tokens=ranks, placement=placement())
    part = kept.between(150, 201)
    assert part.iterations == (200,)
    np.testing.assert_array_equal(part.counts, kept.counts[1:])
    np.testing.assert_array_equal(part.rank_tokens, ranks[1:])
    assert kept.between().iterations == kept.between(100).iterations == (100, 200)
    assert kept.keep([1, 0]).iterations == (200, 100)


def test_the_stop_of_a_range_is_not_in_it():
    with pytest.raises(ValueError, match="no iteration is left; it holds iterations 100 to 200"):
        recording(iterations=(100, 200)).between(101, 200)


def test_small_iterations_can_be_left_out():
    # Three and thirty choices a layer, two for each token.
    counts = np.array([[[1, 1, 1]], [[10, 10, 10]]])
    assert recording(counts).with_at_least(15).iterations == (1,)
    assert recording(counts).with_at_least(1).iterations == (0, 1)


def recorder(**keywords):
    return Recorder(num_experts=3, experts_per_token=2, layer_ids=(4, 5), **keywords)


def step(i, ranks=2):
    """Counts [P, L, E] and rank tokens [P, L] that tell their iteration."""
    counts = jnp.full((ranks, 2, 3), i, jnp.int32) + jnp.arange(3, dtype=jnp.int32)[None, None]
    return counts, jnp.array([[i, i + 1]] * ranks, jnp.int32)


def test_the_recorder_keeps_a_half_open_range_and_sums_over_the_routing_ranks():
    kept = recorder(start=2, stop=4)
    for i in range(6):
        kept.record(*step(i))
    made = kept.recording()
    assert (made.iterations, made.layer_ids, kept.iteration) == ((2, 3), (4, 5), 6)
    assert made.counts[0].tolist() == [[4, 6, 8], [4, 6, 8]]
    assert made.rank_tokens.tolist()[1] == [[3, 3], [4, 4]]  # [L, P]


def test_the_recorder_keeps_every_iteration_of_a_long_run_in_order():
    kept = recorder()
    for i in range(Recorder._WAITING + 5):
        kept.record(*step(i))
    made = kept.recording()
    assert made.iterations == tuple(range(Recorder._WAITING + 5))
    np.testing.assert_array_equal(made.counts[:, 0, 0], 2 * np.arange(len(made.iterations)))


def test_nothing_recorded_is_an_error_with_the_range():
    kept = recorder(start=5, stop=9)
    kept.record(*step(0))
    with pytest.raises(ValueError, match="had 1 iterations, and those from 5 to 9 were to be kept"):
        kept.recording()


@pytest.mark.parametrize("limits", [{"start": -1}, {"start": 3, "stop": 3}])
def test_an_empty_or_negative_range_is_refused(limits):
    with pytest.raises(ValueError, match="use 0 ≤ start < stop"):
        recorder(**limits)
