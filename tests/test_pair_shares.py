from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jax_eplb.routing.leveling import describe
from jax_eplb.routing.pair_shares import level_pairs, whole_share
from jax_eplb.tables import leveling_operator
from tests.placement_cases import seeds

pytestmark = pytest.mark.light_compile

RANKS, PER_RANK, ROWS = 3, 4, 16  # the rows past the ranks are padding
# Slots of experts that have several: two, three and four of them; the last two are none.
SLOTS = np.array([0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 12])
TABLE = np.array([0, 1, 2, 3, 0, 1, 2, 4, 1, 2, 2, 5])


def case(seed: int, largest: int):
    """Tokens of each slot's expert on each rank, quotas that add up, and what is fixed."""
    generator = np.random.default_rng(seed)
    expert = np.append(TABLE, -1)[SLOTS]
    alone = -1 - np.arange(SLOTS.size)
    expert, rank = np.where(expert < 0, (alone, alone), (expert, SLOTS // PER_RANK))
    counts = np.zeros((ROWS, 6), np.int64)
    counts[:RANKS] = generator.integers(0, largest + 1, (RANKS, 6))
    counts[generator.integers(RANKS)] *= generator.integers(2)
    tokens, quota = counts.sum(axis=0), np.zeros(SLOTS.size, np.int64)
    for each in (0, 1, 2):
        slots = np.flatnonzero(expert == each)
        odds = generator.dirichlet(np.full(slots.size, 0.5))
        quota[slots] = generator.multinomial(tokens[each], odds)
    own = np.where(expert >= 0, counts[:, np.maximum(expert, 0)], 0)
    fixed = np.zeros((ROWS, SLOTS.size))
    fixed[:RANKS] = generator.integers(0, largest + 1, (RANKS, RANKS + 1))[:, np.maximum(rank, 0)]
    of_expert = np.where(expert >= 0, tokens[np.maximum(expert, 0)], 0)
    leveling = leveling_operator(jnp.asarray(SLOTS), jnp.asarray(TABLE), PER_RANK)
    return own, quota, of_expert, fixed, leveling, expert, rank


def leveled(own, quota, of_expert, fixed, leveling, expert, rank) -> np.ndarray:
    numbers = (jnp.asarray(x, jnp.int32) for x in (quota, of_expert, own))
    replicas = describe(jnp.asarray(expert), jnp.asarray(rank))
    fixed = jnp.asarray(fixed, jnp.float32)
    with mock.patch.object(jnp, "dot", rounded_dot):
        found = level_pairs(*numbers, fixed, RANKS, leveling, replicas)
    return np.asarray(found, np.float64)


def rounded_dot(left, right, exactly=jnp.dot):
    """As a GPU does it, of numbers with 11 bits."""
    return exactly(*(jax.lax.reduce_precision(x, 8, 10) for x in (left, right)))


cases = st.builds(case, seeds, st.sampled_from([2, 100, 2**20, 2**28]))


@pytest.mark.slow
@given(cases)
def test_neither_tokens_nor_quotas_are_overdrawn(drawn):
    own, quota, _, _, _, expert, _ = drawn
    shares = leveled(*drawn)
    assert (shares >= 0).all()
    assert (shares.sum(axis=0) <= quota).all()
    for each in (0, 1, 2):
        (first, *_) = slots = np.flatnonzero(expert == each)
        assert (shares[:, slots].sum(axis=1) <= own[:, first]).all()
    # And little is left for the last step to hand out.
    assert shares.sum() >= (1 - 2.0**-8) * quota.sum() - 1e-3


@pytest.mark.slow
@given(cases)
def test_all_ranks_together_fill_the_quotas_to_the_token(drawn):
    own, quota, _, _, _, expert, rank = drawn
    shares = leveled(*drawn)
    whole = np.floor(shares).astype(np.int64)
    quota_left = quota - whole.sum(axis=0)
    before, share_before = (np.cumsum(x, axis=0) - x for x in (own, whole))
    replicas = describe(jnp.asarray(expert), jnp.asarray(rank))
    found = np.zeros((RANKS, SLOTS.size), np.int64)
    for each in range(RANKS):
        arrays = whole[each], share_before[each], own[each], before[each], quota_left
        found[each] = whole_share(*(jnp.asarray(x, jnp.int32) for x in arrays), replicas)
    assert (found >= 0).all()
    np.testing.assert_array_equal(found.sum(axis=0), quota)
    for each in (0, 1, 2):
        (first, *_) = slots = np.flatnonzero(expert == each)
        np.testing.assert_array_equal(found[:, slots].sum(axis=1), own[:RANKS, first])
    assert (np.abs(found - shares[:RANKS]) <= 2 + 0.01 * own[:RANKS]).all()
