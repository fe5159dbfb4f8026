"""Replicas over nodes: nobody is put at risk, and what can be mended within the moves is."""

import jax.numpy as jnp
import numpy as np
import pytest

from jax_eplb.planner.changes import Limits
from jax_eplb.planner.spread import at_risk, spread_over_nodes
from tests.greedy_reference import duplicates
from tests.placement_cases import random_tables_without_duplicates, risk_by_counting

pytestmark = pytest.mark.light_compile

# Four ranks on two nodes; as many layers in every call.
E, S, P, Q, L = 6, 12, 4, 2, 24
HALVES = [0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5]  # all replicas of each expert on one node


def spread(table, load, least=1, max_moves=2 * S, capacity=(1.0,) * P):
    """One layer or all; every limit given, so that `least` alone compiles anew."""
    table = jnp.array(np.broadcast_to(table, (L, S)), jnp.int32)
    load = jnp.array(np.broadcast_to(load, (L, E)), jnp.float32)
    limits = Limits(jnp.array(capacity), table, jnp.full(L, max_moves, jnp.int32))
    sizes = {"num_ranks": P, "num_nodes": Q}
    return np.asarray(spread_over_nodes(table, load, **sizes, limits=limits, least=least))


@pytest.mark.slow
@pytest.mark.parametrize("max_moves", [0, 1, 2, 5, S])
def test_fewer_experts_are_at_risk_and_no_rule_is_broken(max_moves):
    generator = np.random.default_rng(max_moves)
    table = random_tables_without_duplicates(generator, L, E, S, P)
    result = spread(table, generator.lognormal(0, 1, (L, E)), least=2, max_moves=max_moves)
    before, after = risk_by_counting(table, E, Q, 2), risk_by_counting(result, E, Q, 2)
    found = at_risk(jnp.array(result), num_experts=E, num_nodes=Q, least=2)
    np.testing.assert_array_equal(found, after)
    assert not (after & ~before).any()
    assert not duplicates(result, P).any()
    assert ((result != table).sum(axis=1) <= max_moves).all()
    assert all(set(row.tolist()) == set(range(E)) for row in result)
    # Each move mends one expert, where a replica can be spared.
    left = {0: before.sum(), 1: before.sum() - 1, S: 0}
    assert after.sum() <= left.get(max_moves, before.sum())


def test_swaps_keep_the_replicas():
    result = spread(HALVES, np.ones(E))
    np.testing.assert_array_equal(np.sort(result)[0], np.sort(HALVES))
    assert not risk_by_counting(result, E, Q).any()


@pytest.mark.slow
def test_without_a_swap_a_third_replica_is_given_up():
    # Experts 0 and 5 have one replica, 3 and 4 have three.
    table = np.array([0, 1, 2, 3, 4, 5, 3, 4, 1, 3, 4, 2])
    load = [9.0, 1, 1, 1, 2, 9]
    [slot] = np.flatnonzero(spread(table, load, least=2, max_moves=1)[0] != table)
    assert table[slot] in (3, 4)
    assert not risk_by_counting(spread(table, load, least=2), E, Q, 2).any()


@pytest.mark.parametrize("max_moves", [0, 1])
def test_a_swap_needs_two_moves(max_moves):
    assert spread(HALVES, np.ones(E), max_moves=max_moves)[0].tolist() == HALVES


def test_a_rank_that_holds_nothing_stays_empty():
    table = [*HALVES[:9], E, E, E]
    result = spread(table, np.ones(E), capacity=(1.0, 1.0, 1.0, 0.0))
    assert (result[:, 9:] == E).all()
    # Of the three experts with two replicas each goes to the other node.
    assert not risk_by_counting(result, E, Q).any()
