import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jax_eplb.planner.pack import pack, separate
from tests.greedy_reference import duplicates, greedy_pack, greedy_replicate, rank_load_of

pytestmark = pytest.mark.light_compile

# (E, S, P): few spare slots, many, one slot a rank, all experts nearly everywhere.
SHAPES = [(6, 8, 4), (5, 12, 4), (3, 6, 6), (7, 18, 3)]


def slots_of(load, count, num_ranks):
    """int64[L, S] by `pack`."""
    packed = pack(
        jnp.asarray(load, jnp.float32),
        jnp.asarray(count, jnp.int32),
        num_slots=int(count[0].sum()),
        num_ranks=num_ranks,
    )
    return np.asarray(packed, np.int64)


def counts_of(slots, num_experts):
    return np.stack([np.bincount(row, minlength=num_experts) for row in slots])


@st.composite
def problems(draw):
    """Two layers of loads, with any replication of at most P replicas."""
    num_experts, num_slots, num_ranks = draw(st.sampled_from(SHAPES))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    load = generator.integers(0, draw(st.sampled_from([2, 5, 1000])), (2, num_experts))
    count = np.ones((2, num_experts), int)
    for row in count:
        for _ in range(num_slots - num_experts):
            row[generator.choice(np.flatnonzero(row < num_ranks))] += 1
    return load, count, num_ranks


@pytest.mark.slow
@given(problems())
def test_every_rank_is_full_and_holds_no_expert_twice(problem):
    load, count, num_ranks = problem
    slots = slots_of(load, count, num_ranks)
    np.testing.assert_array_equal(counts_of(slots, load.shape[1]), count)
    assert duplicates(slots, num_ranks).tolist() == [0, 0]


@pytest.mark.slow
@given(problems())
def test_packing_is_the_greedy_where_the_greedy_holds_no_expert_twice(problem):
    load, count, num_ranks = problem
    greedy = greedy_pack(load.astype(np.float32), count, num_ranks)
    clean = duplicates(greedy, num_ranks) == 0
    slots = slots_of(load, count, num_ranks)
    np.testing.assert_array_equal(slots[clean], greedy[clean])


@pytest.mark.slow
def test_many_layers_agree_with_the_greedy_bit_for_bit():
    load = np.random.default_rng(0).lognormal(0, 1, (8, 64)).astype(np.float32)
    count = greedy_replicate(load, 72)
    greedy = greedy_pack(load, count, 8)
    clean = duplicates(greedy, 8) == 0
    assert clean.sum() >= 4
    np.testing.assert_array_equal(slots_of(load, count, 8)[clean], greedy[clean])


def test_a_replica_left_for_a_rank_that_has_its_expert_is_swapped_away():
    # Rank 0 takes expert 0, rank 1 fills up with 1, 2 and 3: rank 0 is left for both halves of 4.
    load, count = np.array([[10, 3, 3, 3, 2]]), np.array([[1, 1, 1, 1, 2]])
    greedy = greedy_pack(load.astype(np.float32), count, 2)
    assert greedy.tolist() == [[0, 4, 4, 1, 2, 3]]
    assert slots_of(load, count, 2).tolist() == [[0, 4, 1, 4, 2, 3]]


def test_separate_mends_a_placement_with_every_expert_twice_on_a_rank():
    crowded = np.repeat(np.arange(12), 2)[None]  # ranks of 6 slots hold 3 experts each
    mended = separate(
        jnp.asarray(crowded, jnp.int32),
        jnp.ones((1, 12), jnp.float32),
        num_ranks=4,
        may_differ=jnp.array([True]),
    )
    assert duplicates(crowded, 4).tolist() == [12]
    assert duplicates(np.asarray(mended), 4).tolist() == [0]
    np.testing.assert_array_equal(counts_of(np.asarray(mended), 12), counts_of(crowded, 12))


def test_separate_leaves_sound_layers_alone():
    slots = jnp.array([[0, 0, 1, 2], [0, 1, 0, 2]], jnp.int32)
    share = jnp.array([[4.0, 2, 1], [4, 2, 1]])
    mended = separate(slots, share, num_ranks=2, may_differ=jnp.array([True, False]))
    assert duplicates(np.asarray(mended), 2).tolist() == [0, 0]
    assert mended[1].tolist() == [0, 1, 0, 2]


def test_separate_ends_where_an_expert_has_more_replicas_than_ranks():
    slots = jnp.array([[0, 0, 0, 1]], jnp.int32)
    mended = separate(slots, jnp.ones((1, 2)), num_ranks=2, may_differ=jnp.array([True]))
    assert sorted(mended[0].tolist()) == [0, 0, 0, 1]


def test_loads_of_a_billion_tokens_pack_evenly():
    load = 10**9 - np.random.default_rng(1).integers(0, 10**6, (2, 48))
    slots = slots_of(load, np.ones((2, 48), int), 6)
    tokens = rank_load_of(load, slots, 6)
    assert tokens.max() / tokens.mean() == pytest.approx(1, abs=1e-3)
