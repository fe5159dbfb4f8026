"""Few moves from a placement in force; ranks that are gone and ranks that came back."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_eplb.placement import Placement
from jax_eplb.planner.replan import count_moves, keep_places, repair, replan, replan_over_nodes
from jax_eplb.tables import max_replicas
from tests.greedy_reference import duplicates, imbalance_of
from tests.placement_cases import random_table, random_tables_without_duplicates

pytestmark = pytest.mark.light_compile

# As many layers in every call.
E, S, P, L = 6, 12, 4, 24
keep = jax.jit(keep_places, static_argnums=2)


def problem(seed=0):
    """Tables without two replicas of an expert on a rank, and loads."""
    generator = np.random.default_rng(seed)
    table = random_tables_without_duplicates(generator, L, E, S, P)
    return table, generator.lognormal(0, 1, (L, E)).astype(np.float32)


def repaired(table, load, dead=None):
    """int32[L, P, N], once rank `dead` holds nothing."""
    capacity = (np.arange(P) != dead).astype(np.float32)
    return np.asarray(repair(load, table, num_ranks=P, capacity=capacity)).reshape(L, P, -1)


@pytest.mark.slow
def test_no_more_slots_change_than_allowed_and_no_layer_gets_worse():
    table, load = problem()
    most = np.arange(L, dtype=np.int32) % 7
    result = replan(load[None], table, num_ranks=P, max_moves=most, max_rounds=12)
    result = np.asarray(result, np.int64)
    moves = (result != table).sum(axis=1)
    assert (moves <= most).all()
    assert (moves[most > 1] > 0).any()
    assert (imbalance_of(load, result, P) <= imbalance_of(load, table, P) + 1e-6).all()
    assert not duplicates(result, P).any()
    assert all(set(row.tolist()) == set(range(E)) for row in result)


def test_experts_that_stay_on_a_rank_keep_their_slots():
    old, new = (random_table(np.random.default_rng(seed), L, E, S, P) for seed in range(2))
    result = np.asarray(keep(new, old, P))
    by_rank = (table.reshape(L * P, -1).tolist() for table in (old, new, result))
    for before, wanted, after in zip(*by_rank, strict=True):
        assert sorted(after) == sorted(wanted)
        stay = sum(min(before.count(e), wanted.count(e)) for e in set(before))
        assert sum(b == a for b, a in zip(before, after, strict=True)) == stay


def test_a_placement_keeps_all_its_places():
    table, _ = problem()
    np.testing.assert_array_equal(keep(table, table, P), table)


def test_emptied_slots_do_not_count_as_moves():
    old, new = jnp.array([[0, 1, 2, 3, 0, 1]]), jnp.array([[0, 1, 2, 3, 4, 4]])
    assert count_moves(new, old, 4).tolist() == [0]
    assert count_moves(old, new, 4).tolist() == [2]


def test_repair_empties_a_dead_rank_and_places_what_only_it_held():
    table, load = problem()
    for dead in range(P):
        result = repaired(table, load, dead)
        assert (result[:, dead] == E).all()
        live = np.delete(result, dead, axis=1).reshape(L, -1)
        held = np.delete(table.reshape(L, P, -1), dead, axis=1).reshape(L, -1)
        for now, before in zip(live, held, strict=True):
            assert set(now.tolist()) == set(range(E))
            # One slot for each expert that was only there, and no other.
            assert (now != before).sum() == E - len(set(before.tolist()))


def test_repair_fills_a_rank_that_came_back():
    table, load = problem()
    for back in range(P):
        without = repaired(table, load, back)
        result = repaired(without.reshape(L, S), load)
        assert result.max() < E
        assert not duplicates(result.reshape(L, S)[[0]], P).any()
        np.testing.assert_array_equal(*(np.delete(t, back, axis=1) for t in (result, without)))


def test_an_empty_slot_gets_the_hottest_expert_that_its_rank_lacks():
    row = np.array([0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, E], np.int32)
    load = np.array([8, 9, 2, 7, 6, 1], np.float32)
    result = repaired(np.tile(row, (L, 1)), np.tile(load, (L, 1)))
    # The shares are 4, 4.5, 1, 3.5, 3 and 1.
    assert result[0, 3].tolist() == [3, 4, 1]


def test_a_whole_placement_needs_no_repair():
    table, load = problem()
    np.testing.assert_array_equal(repaired(table, load), table.reshape(L, P, -1))


@pytest.mark.slow
def test_experts_leave_home_only_where_that_is_worth_its_price():
    # Swapping 0 and 2 lowers the imbalance by 1/3, and then half of the tokens are away.
    table = jnp.array([[0, 1, 2, 3]])
    plan = functools.partial(
        replan_over_nodes,
        jnp.array([[4.0, 4, 2, 2]]),
        table,
        table,
        num_ranks=2,
        num_nodes=2,
        home=jnp.array([[0, 0, 1, 1]]),
    )
    # The second is without enough moves.
    for weight, most, moved in ((0.3, 4, 2), (0.3, 1, 0), (1.0, 4, 0)):
        limits = {"max_moves": jnp.array([most]), "cross_node_weight": jnp.float32(weight)}
        assert (plan(**limits) != table).sum() == moved


@pytest.mark.slow
@pytest.mark.parametrize("split", ["even", "balanced"])
def test_an_expert_that_is_twice_on_a_rank_gets_no_more_replicas_than_tables_hold(split):
    # Made for four ranks and served on three: the middle one has some experts twice.
    previous = Placement.default(num_experts=16, num_slots=24, num_ranks=4, num_layers=64)
    load = np.random.default_rng(0).lognormal(0, 1.5, (64, 16)).astype(np.float32)
    most = np.full(64, 24, np.int32)
    table = np.asarray(previous.slot_to_expert)
    result = np.asarray(
        replan(load[None], table, num_ranks=3, max_moves=most, max_rounds=24, split=split)
    )
    replicas = (result[..., None] == np.arange(16)).sum(axis=1)
    assert replicas.min() == 1
    assert replicas.max() == max_replicas(16, 24, 3) == 3
