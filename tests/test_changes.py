"""Changes carried out: the tables afterwards are those of a recount."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_eplb.planner.changes import (
    REPLACE_HERE,
    REPLACE_THERE,
    SWAP,
    Change,
    Slots,
    apply_change,
)

pytestmark = pytest.mark.light_compile

apply_jitted = jax.jit(apply_change, static_argnames="replace")
# Ranks 0 1 | 0 2 | 3 1, tokens 8 6 4 2, one layer.
TABLE, LOAD = [0, 1, 0, 2, 3, 1], [8.0, 6.0, 4.0, 2.0]


def slots_of(table):
    count = np.bincount(table, minlength=len(LOAD))
    weights = (np.array(LOAD) / count)[table]
    return Slots(
        jnp.array(table, jnp.int32).reshape(3, 2, 1),
        jnp.array(weights, jnp.float32).reshape(3, 2, 1),
        jnp.array(count, jnp.float32)[:, None],
    )


def one(value):
    return jnp.array([value], jnp.int32)


def carry_out(kind, here, there, newcomer=0, wanted=True, replace=True):
    """The tables after a change of rank 0, the fullest."""
    change = Change(jnp.zeros(1), one(kind), one(here), one(there), one(newcomer))
    load = jnp.array(LOAD)[:, None]
    return apply_jitted(slots_of(TABLE), load, change, one(0), jnp.array([wanted]), replace=replace)


@pytest.mark.parametrize(
    ("kind", "here", "there", "newcomer", "expected"),
    [
        (SWAP, 1, 3, 0, [0, 2, 0, 1, 3, 1]),
        (SWAP, 0, 4, 0, [3, 1, 0, 2, 0, 1]),
        # Place 1 of the fullest rank, with a replica of 1, is given to expert 3.
        (REPLACE_HERE, 1, 0, 3, [0, 3, 0, 2, 3, 1]),
        (REPLACE_HERE, 0, 0, 2, [2, 1, 0, 2, 3, 1]),
        # Expert 0 gets slot 5, and expert 1 slot 2.
        (REPLACE_THERE, 0, 5, 0, [0, 1, 0, 2, 3, 0]),
        (REPLACE_THERE, 1, 2, 0, [0, 1, 1, 2, 3, 1]),
    ],
)
def test_the_tables_are_those_of_a_recount(kind, here, there, newcomer, expected):
    # A search that knows only swaps needs less.
    for replace in {True, kind != SWAP}:
        result = carry_out(kind, here, there, newcomer, replace=replace)
        for found, wanted in zip(result, slots_of(expected), strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-6)


@pytest.mark.parametrize("kind", [SWAP, REPLACE_HERE, REPLACE_THERE])
def test_a_change_that_is_not_wanted_changes_nothing(kind):
    result = carry_out(kind, 1, 3, 3, wanted=False)
    for found, before in zip(result, slots_of(TABLE), strict=True):
        np.testing.assert_array_equal(found, before)


def test_an_empty_slot_stays_out_of_the_count():
    slots = slots_of(TABLE)._replace(experts=jnp.array([0, 1, 0, 2, 4, 4]).reshape(3, 2, 1))
    change = Change(jnp.zeros(1), one(SWAP), one(1), one(3), one(0))
    result = apply_jitted(
        slots, jnp.array(LOAD)[:, None], change, one(0), jnp.array([True]), replace=True
    )
    assert result.experts.ravel().tolist() == [0, 2, 0, 1, 4, 4]
    np.testing.assert_array_equal(result.count, slots.count)
