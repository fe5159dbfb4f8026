"""What stays and what moves: few slots, where it is worth it, and what nodes and groups ask for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_eplb.planner.from_previous import from_previous
from jax_eplb.planner.score import score_even
from jax_eplb.planner.sizes import Sizes
from jax_eplb.planner.topology import cross_node_share
from jax_eplb.split import even_split
from tests.greedy_reference import duplicates, imbalance_of
from tests.placement_cases import random_tables_without_duplicates, risk_by_counting

pytestmark = pytest.mark.light_compile

# Four ranks on two nodes, four groups of two experts; as many layers in every call.
E, S, P, Q, G, L = 8, 12, 4, 2, 4, 24
PLAIN = Sizes(S, P, "even", "fast", "search", 1, 1, False)
GROUPED = PLAIN._replace(num_nodes=Q, num_groups=G)
SPREAD = GROUPED._replace(spread=True)  # with a price of groups off their node


@functools.partial(jax.jit, static_argnames="sizes")
def _changed(load, table, most, capacity, weight, sizes):
    def score(slots):
        return score_even(load, slots, P, capacity)

    return from_previous(load[None], table, most, capacity, weight, sizes, score)


def changed(load, table, most, sizes=PLAIN, capacity=(1.0,) * P, weight=None):
    """The table and its imbalance; a limit for all layers or one for each."""
    most = jnp.array(np.broadcast_to(most, L), jnp.int32)
    weight = None if weight is None else jnp.float32(weight)
    table, load = jnp.array(table, jnp.int32), jnp.array(load, jnp.float32)
    slots, imbalance = _changed(load, table, most, jnp.array(capacity), weight, sizes)
    return np.asarray(slots, np.int64), np.asarray(imbalance)


def problem(seed=0):
    generator = np.random.default_rng(seed)
    table = random_tables_without_duplicates(generator, L, E, S, P)
    return generator.lognormal(0, 1, (L, E)).astype(np.float32), table


@pytest.mark.slow
def test_a_layer_changes_within_its_limit_and_by_more_than_it_must_gain():
    load, table = problem()
    most = np.arange(L) % 8
    slots, imbalance = changed(load, table, most)
    moves = (slots != table).sum(axis=1)
    assert (moves <= most).all()
    before, after = (imbalance_of(load, t, P) for t in (table, slots))
    np.testing.assert_allclose(imbalance, after, atol=1e-5)
    assert (before - after)[moves > 0].min() > 0.01
    # What it ended with is not worth a change any more, most of the time.
    again, _ = changed(load, slots, most)
    assert (again != slots).any(axis=1).sum() < (moves > 0).sum() / 2


@pytest.mark.slow
def test_an_even_load_on_a_whole_placement_moves_nothing():
    # Experts 0 to 3 have two replicas and twice the load.
    table = np.tile(np.arange(S) % E, (L, 1))
    slots, imbalance = changed(np.tile([2, 2, 2, 2, 1, 1, 1, 1], (L, 1)), table, S)
    np.testing.assert_array_equal(slots, table)
    np.testing.assert_allclose(imbalance, 0, atol=1e-6)


@pytest.mark.slow
def test_a_lost_expert_comes_back_and_a_dead_rank_is_emptied_whatever_the_limit():
    load, table = problem()
    lost = np.where(table == 0, np.where(np.arange(S) % 4 == 0, 1, 2), table)
    slots, _ = changed(load, lost, 0)
    assert (slots == 0).any(axis=1).all()
    assert ((slots != lost).sum(axis=1) == 1).all()
    slots, _ = changed(load, table, 0, capacity=(1.0, 1.0, 0.0, 1.0))
    assert (slots.reshape(L, P, -1)[:, 2] == E).all()
    assert all(set(row.tolist()) == set(range(E + 1)) for row in slots)


@pytest.mark.slow
def test_replicas_stay_on_two_nodes_or_come_there_within_the_limit():
    load, table = problem()
    for most in (0, 2, 4, S):
        slots, _ = changed(load, table, most, SPREAD, weight=0.0)
        before, after = (risk_by_counting(t, E, Q) for t in (table, slots))
        assert ((slots != table).sum(axis=1) <= most).all()
        assert (after.sum(axis=1) <= before.sum(axis=1)).all()
        assert not duplicates(slots, P).any()
        if most == S:
            assert not after.any()
            # And stays so under another load, which is worth moves again.
            other = problem(1)[0]
            then, _ = changed(other, slots, 6, SPREAD, weight=0.0)
            assert not risk_by_counting(then, E, Q).any()
            assert (then != slots).any(axis=1).sum() > L / 4
            better = imbalance_of(other, slots, P) - imbalance_of(other, then, P)
            assert (better >= -1e-6).all()


def away(load, table):
    tokens = even_split(load, table, E)
    return np.asarray(
        cross_node_share(tokens, jnp.array(table), num_experts=E, num_groups=G, num_nodes=Q)
    )


# Experts 0 to 3, of groups 0 and 1, on node 0.
ON_NODES = np.tile([0, 1, 2, 3, 0, 1, 4, 5, 6, 7, 4, 5], (L, 1))


@pytest.mark.slow
def test_a_higher_price_keeps_more_tokens_at_home():
    load, table = problem()
    safe = ~risk_by_counting(table, E, Q).any(axis=1)
    total = []
    for weight in (0.0, 0.5, 5.0):
        slots, imbalance = changed(load, table, 6, SPREAD, weight=weight)
        before = imbalance_of(load, table, P) + weight * away(load, table)
        after = imbalance + weight * away(load, slots)
        assert (after[safe] <= before[safe] + 1e-5).all()
        total.append(away(load, slots).mean())
    assert total[0] > total[1] > total[2]


@pytest.mark.slow
def test_groups_stay_on_their_nodes_and_are_brought_there_where_moves_suffice():
    load, table = problem()
    for most in (0, 4, S):
        slots, _ = changed(load, ON_NODES, most, GROUPED)
        assert (away(load, slots) < 1e-6).all()
        slots, _ = changed(load, table, most, GROUPED)
        moves = (slots != table).sum(axis=1)
        assert (moves <= most).all()
        # A layer is brought there or left alone.
        assert ((away(load, slots) < 1e-6) | (moves == 0)).all()
        assert all(set(row.tolist()) == set(range(E)) for row in slots)
        assert not duplicates(slots, P).any()
    assert (moves > 0).any()
