"""The functions of pairs: valid whatever the sizes."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from jax_eplb.planner import pair_functions

pytestmark = pytest.mark.light_compile


@pytest.mark.parametrize("divisible", [False, True])
def test_no_two_sizes_that_fit_are_worth_more_than_a_rank(divisible):
    functions = np.asarray(pair_functions._functions(divisible))[:-1]
    size = jnp.linspace(0, 1, 400, endpoint=False)
    tables = [
        functions[:, np.asarray(pair_functions._cell(size, jnp.full(400, count), divisible))]
        for count in (1.0, 2.0)
    ]
    fits = np.add.outer(size, size) < 1
    for one, other in itertools.product(tables, repeat=2):
        assert (one[:, :, None] + other[:, None])[:, fits].max() <= 1 + 1e-6
    assert (tables[1] <= tables[0]).all()
