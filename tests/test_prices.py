"""Prices: what is proposed is possible, apart where it says so, and near the best there is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_eplb.planner.prices import Changes, promising_changes
from tests.placement_cases import random_tables_without_duplicates

pytestmark = [pytest.mark.slow, pytest.mark.light_compile]
# One expert has two replicas; as many layers in every call.
E, S, P, L, W = 11, 12, 4, 24, 3
propose = jax.jit(promising_changes)


def problem():
    """Tables and loads of the windows, [L, E, W], as parts of the mean rank's."""
    generator = np.random.default_rng(0)
    table = random_tables_without_duplicates(generator, L, E, S, P)
    load = generator.lognormal(0, 1, (L, E, 1)) * generator.lognormal(0, 0.2, (L, E, W))
    return table, load / load.sum(axis=1, keepdims=True) * P


def heights_of(table, load):
    """Tokens of each rank under the even split, float64[L, P, W]."""
    count = np.stack([np.bincount(row, minlength=E) for row in table])
    share = load / count[..., None]
    tokens = np.take_along_axis(share, table[..., None], axis=1)
    return tokens.reshape(L, P, -1, W).sum(axis=2)


def changes_of(table, load) -> Changes:
    height = jnp.array(heights_of(table, load), jnp.float32)
    padded = jnp.array(np.pad(load, ((0, 0), (0, 1), (0, 0))), jnp.float32)
    sure = jnp.zeros(L), jnp.int32(0)
    return Changes(
        *map(np.asarray, propose(jnp.array(table), padded, height, jnp.ones((P, 1)), *sure))
    )


def every(changes, table):
    """Each that is possible: layer, place in the order, the change, the layer's table."""
    for layer, i in zip(*np.nonzero(changes.possible), strict=True):
        here, there, newcomer = (int(t[layer, i]) for t in changes[:3])
        yield layer, i, here, there, newcomer, table[layer], table[layer].reshape(P, -1)


def test_proposed_changes_break_no_rule():
    table, load = problem()
    changes = changes_of(table, load)
    kinds = set()
    for _, _, here, there, newcomer, row, ranks in every(changes, table):
        mine = ranks[here // 3]
        assert newcomer not in mine
        kinds.add(there < 0)
        if there < 0:
            assert (row == row[here]).sum() > 1
        else:
            assert newcomer == row[there]
            assert row[here] not in ranks[there // 3]
    assert kinds == {True, False}


def test_the_first_touch_ranks_of_their_own():
    table, load = problem()
    changes = changes_of(table, load)
    touched = [[] for _ in range(L)]
    for layer, i, here, there, *_ in every(changes, table):
        if i < changes.num_apart[layer]:
            touched[layer] += [here // 3] if there < 0 else [here // 3, there // 3]
    assert any(touched)
    assert all(len(set(ranks)) == len(ranks) for ranks in touched)


def test_some_proposed_swap_gains_most_of_what_any_gains():
    table, load = problem()
    changes = changes_of(table, load)
    before = heights_of(table, load).max(axis=1).mean(axis=1)

    def gain(here, there):
        """Of a swap in each layer, in the mean over windows of the fullest rank."""
        new, layers = table.copy(), np.arange(L)
        new[layers, here], new[layers, there] = table[layers, there], table[layers, here]
        return before - heights_of(new, load).max(axis=1).mean(axis=1)

    proposed = [
        np.where(possible, gain(here, np.maximum(there, 0)), 0.0)
        for here, there, possible in zip(
            changes.here.T, changes.there.T, changes.possible.T, strict=True
        )
    ]
    best = np.max([gain(s, t) for s in range(S) for t in range(s)], axis=0)
    assert np.max(proposed, axis=0).sum() > 0.8 * best.sum()
