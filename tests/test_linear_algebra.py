"""Inverses by sweeping: of matrices of one block and of several, whole and not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_eplb.linear_algebra import symmetric_inverse

pytestmark = pytest.mark.light_compile


@pytest.mark.parametrize("size", [1, 2, 8, 36, 64, 65, 128, 200])
def test_it_is_numpys_to_the_condition_number(size):
    generator = np.random.default_rng(size)
    factor = generator.normal(size=(2, size, size)) / np.sqrt(size)
    matrix = np.eye(size) + factor @ factor.swapaxes(1, 2)
    found = jax.jit(jax.vmap(symmetric_inverse))(jnp.asarray(matrix, jnp.float32))
    expected = np.linalg.inv(matrix)
    worst = np.finfo(np.float32).eps * np.linalg.cond(matrix).max()
    np.testing.assert_allclose(found, expected, atol=8 * worst)


def test_the_identity_stays_exactly():
    np.testing.assert_array_equal(symmetric_inverse(jnp.eye(70)), np.eye(70))
