"""Plans from a placement in force, with limits and capacities: what moves, and what compiles.

One set of sizes and options, so that two programs serve every test.
"""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_eplb.placement import Placement
from jax_eplb.planner import frontier, plan
from tests.greedy_reference import duplicates, imbalance_of

pytestmark = pytest.mark.light_compile

E, S, P, L = 8, 12, 4, 12
plan_it = functools.partial(plan, num_slots=S, num_ranks=P, effort="fast")
FORCE = Placement.default(num_experts=E, num_slots=S, num_ranks=P, num_layers=L)
ALIKE, DEAD = (1.0,) * P, (1.0, 1.0, 0.0, 1.0)


def load_of(seed=0):
    return np.random.default_rng(seed).lognormal(0, 1, (L, E)).astype(np.float32)


def slots_of(result):
    return np.asarray(result.placement.slot_to_expert, np.int64)


def few(load, most=4, previous=FORCE, capacity=ALIKE):
    return plan_it(load, previous=previous, max_moves=most, capacity=capacity)


@pytest.mark.slow
def test_more_moves_buy_less_imbalance_and_the_figures_are_a_recount():
    load, before = load_of(), np.asarray(FORCE.slot_to_expert)
    plans = list(frontier(load, FORCE, [0, 2, 6, S], effort="fast", capacity=ALIKE))
    for most, result in zip([0, 2, 6, S], plans, strict=True):
        table = slots_of(result)
        moves = np.asarray(result.moves)
        np.testing.assert_array_equal(moves, (table != before).sum(axis=1))
        assert (moves <= most).all()
        np.testing.assert_allclose(result.imbalance, imbalance_of(load, table, P), atol=1e-5)
        assert (np.asarray(result.lower_bound) <= np.asarray(result.imbalance)).all()
        assert not duplicates(table, P).any()
        Placement.from_slots(table, num_experts=E, num_ranks=P)
    by_layer = np.stack([result.imbalance for result in plans])
    assert (np.diff(by_layer, axis=0) <= 0).all()
    assert by_layer[-1].mean() < 0.5 * by_layer[0].mean()


@pytest.mark.slow
def test_limits_that_fall_are_kept_to_as_well():
    plans = list(frontier(load_of(), FORCE, [S, 2, 0], effort="fast", capacity=ALIKE))
    for most, result in zip([S, 2, 0], plans, strict=True):
        assert (np.asarray(result.moves) <= most).all()


@pytest.mark.slow
def test_a_load_that_did_not_change_moves_nothing():
    load = load_of()
    settled = few(load, S)
    for most in (2, S):
        again = few(load, most, previous=few(load, S, previous=settled.placement).placement)
        moves, gain = np.asarray(again.moves), np.asarray(settled.imbalance - again.imbalance)
        assert (moves[gain < 0.01] == 0).all()
        assert (moves == 0).mean() > 0.8


def test_names_of_ranks_do_not_matter():
    order = np.array([2, 0, 3, 1])
    table = np.asarray(FORCE.slot_to_expert).reshape(L, P, -1)
    load = load_of()
    usual, renamed = (few(load, previous=t.reshape(L, S)) for t in (table, table[:, order]))
    np.testing.assert_allclose(renamed.imbalance, usual.imbalance, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(renamed.moves, usual.moves)
    # Two equal replicas of an expert are a tie, so some layers choose another.
    ours, theirs = (slots_of(result).reshape(L, P, -1) for result in (usual, renamed))
    assert (ours[:, order] == theirs).all(axis=(1, 2)).sum() > L / 2


def test_a_rank_that_is_gone_and_comes_back():
    load = load_of()
    gone = few(load, 0, capacity=DEAD)
    table = slots_of(gone).reshape(L, P, -1)
    assert (table[:, 2] == E).all()
    assert all(set(row.ravel().tolist()) == set(range(E + 1)) for row in table)
    assert np.isfinite(np.asarray(gone.imbalance)).all()
    # Its slots are filled again, whatever the limit, and the others stay.
    back = few(load, 0, previous=gone.placement)
    after = slots_of(back).reshape(L, P, -1)
    assert after.max() < E
    assert np.asarray(back.moves).tolist() == [S // P] * L
    np.testing.assert_array_equal(np.delete(after, 2, axis=1), np.delete(table, 2, axis=1))
    assert not duplicates(after.reshape(L, S), P).any()


@pytest.mark.parametrize("load", [np.zeros((L, E)), np.eye(L, E) * 1e9, np.ones((L, E))])
def test_no_load_one_hot_expert_and_ties_leave_whole_placements(load):
    for capacity in (ALIKE, DEAD):
        result = few(load, 3, capacity=capacity)
        table = slots_of(result)
        live = np.repeat(np.array(capacity) > 0, S // P)
        assert all(set(row[live].tolist()) == set(range(E)) for row in table)
        assert np.isfinite(np.asarray(result.imbalance)).all()
        assert (np.asarray(result.lower_bound) <= np.asarray(result.imbalance)).all()


def test_other_values_of_every_argument_compile_nothing(caplog):
    few(load_of())
    caplog.clear()
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        few(load_of(1), 7, capacity=DEAD)
        few(load_of(2).astype(np.int32), np.arange(L), previous=np.asarray(FORCE.slot_to_expert))
    names = [r.message for r in caplog.records if "Finished XLA compilation" in r.message]
    assert not names


@pytest.mark.slow
def test_it_works_under_jit_and_vmap():
    load = jnp.array(load_of())
    table, capacity = FORCE.slot_to_expert, jnp.array(ALIKE)

    def one(load, table, most):
        result = plan_it(load, previous=table, max_moves=most, capacity=capacity)
        return result.placement.slot_to_expert, result.moves

    expected = few(load_of())
    two = (load.reshape(2, -1, E), table.reshape(2, -1, S), jnp.array([4, 4], jnp.int32))
    slots, moves = jax.jit(jax.vmap(one))(*two)
    np.testing.assert_array_equal(slots.reshape(L, S), expected.placement.slot_to_expert)
    np.testing.assert_array_equal(moves.reshape(L), expected.moves)


def test_layers_keep_the_numbers_of_the_placement_in_force():
    ids = tuple(range(3, 3 + L))
    previous = Placement(FORCE.slot_to_expert, E, P, ids)
    assert few(load_of(), previous=previous).placement.layer_ids == ids


@pytest.mark.parametrize("options", [{"num_groups": 4, "num_nodes": 3}, {"num_nodes": 3}])
def test_deepseeks_plans_fall_back_where_nodes_do_not_divide_the_groups(options):
    load = load_of()
    plain = plan_it(load, method="deepseek")
    fallen = plan_it(load, method="deepseek", **options)
    np.testing.assert_array_equal(slots_of(fallen), slots_of(plain))
    assert fallen.cross_node is None
