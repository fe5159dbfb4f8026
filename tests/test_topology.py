"""Groups on nodes: against brute force over all ways to deal few groups, and plain NumPy."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_eplb.planner.topology import (
    count_by_node,
    cross_node_share,
    groups_to_nodes,
    home_nodes,
    nodes_in_force,
)

pytestmark = pytest.mark.light_compile

# Two experts in each of six groups, on two nodes; as many layers in every call.
E, G, Q, L = 12, 6, 2, 24
SIZES = {"num_experts": E, "num_groups": G, "num_nodes": Q}


in_force = jax.jit(functools.partial(nodes_in_force, **SIZES))


def draw_load():
    return np.random.default_rng(0).lognormal(0, 1, (L, E)).astype(np.float32)


@jax.jit
def order_of(load, speeds):
    """The experts by node, int32[L, Q, E / Q]."""
    return groups_to_nodes(load, num_groups=G, num_nodes=Q, capacity=speeds).reshape(L, Q, -1)


@pytest.mark.slow
def test_groups_stay_whole_and_nodes_are_nearly_as_even_as_can_be():
    load = draw_load()
    order = np.asarray(order_of(load, jnp.ones(Q)))
    np.testing.assert_array_equal(np.sort(order.reshape(L, E)), np.tile(np.arange(E), (L, 1)))
    for one, other in order // (E // G):
        assert not set(one.tolist()) & set(other.tolist())
    total = load.sum(axis=1)
    groups = load.reshape(L, G, -1).sum(axis=2)
    halves = [groups[:, half].sum(axis=1) for half in itertools.combinations(range(G), G // Q)]
    best = np.min([np.maximum(half, total - half) for half in map(np.array, halves)], axis=0)
    node_load = np.take_along_axis(load, order.reshape(L, E), axis=1).reshape(L, Q, -1).sum(axis=2)
    assert (node_load.max(axis=1) >= best * (1 - 1e-6)).all()
    assert (node_load.max(axis=1) / best).mean() < 1.01


@pytest.mark.slow
def test_a_fast_node_gets_the_heavy_groups():
    load = np.tile(np.repeat([9.0, 1, 2, 8, 1, 7], E // G), (L, 1)).astype(np.float32)
    order = np.asarray(order_of(load, jnp.array([1.0, 6.0])))
    assert (order // (E // G) == np.repeat([[1, 2, 4], [0, 3, 5]], E // G, axis=1)).all()


@pytest.mark.slow
def test_home_nodes_are_where_the_order_puts_each_expert():
    order = order_of(draw_load(), jnp.ones(Q))
    home = np.asarray(home_nodes(order.reshape(L, E), Q))
    for layer, node, place in np.ndindex(*order.shape):
        assert home[layer, order[layer, node, place]] == node


def away_by_counting(tokens, table):
    """The part of the tokens that is not on its group's main node, one slot at a time."""
    shares = []
    for row, row_tokens in zip(table, tokens, strict=True):
        served = np.zeros((G, Q))
        for slot, expert in enumerate(row):
            if expert < E:
                served[expert // (E // G), slot * Q // len(row)] += row_tokens[slot]
        shares.append(1 - served.max(axis=1).sum() / max(served.sum(), 1e-30))
    return np.where(tokens.sum(axis=1) > 0, shares, 0.0)


def test_the_share_served_elsewhere_is_a_recount():
    generator = np.random.default_rng(1)
    table = generator.integers(0, E + 1, (L, 16)).astype(np.int32)
    tokens = np.where(table < E, generator.random((L, 16)), 0.0).astype(np.float32)
    tokens[0] = 0
    found = jax.jit(functools.partial(cross_node_share, **SIZES))(tokens, table)
    np.testing.assert_allclose(found, away_by_counting(tokens, table), atol=1e-6)


@pytest.mark.slow
def test_groups_on_nodes_are_found_again():
    order = np.asarray(order_of(draw_load(), jnp.ones(Q)))
    # One rank a node, without a spare slot.
    found = in_force(order.reshape(L, E))
    np.testing.assert_array_equal(np.sort(found.reshape(L, Q, -1)), np.sort(order))


@pytest.mark.parametrize("row", [[0] * 12, list(range(12)), [11, 0] * 6])
def test_any_placement_gives_each_node_its_part_of_the_experts(row):
    found = np.asarray(in_force(np.tile(np.array(row, np.int32), (L, 1))))
    assert sorted(found[0].tolist()) == list(range(E))
    halves = found[0].reshape(Q, -1) // (E // G)
    assert not set(halves[0].tolist()) & set(halves[1].tolist())


def test_empty_slots_are_not_counted():
    assert count_by_node(jnp.array([[0, 2, 2, 1]]), 2, 2).tolist() == [[[1, 0], [0, 1]]]
