import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_eplb.kernels import take_rows
from jax_eplb.kernels.take_rows import take_rows_by_kernel


@pytest.mark.parametrize("shape", [(5, 700), (1, 512), (40, 3)])
@pytest.mark.parametrize("size", [1, 8, 21])
def test_the_kernel_copies_what_plain_indexing_does(shape, size):
    rows = jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape)
    index = jax.random.randint(jax.random.key(0), (size,), 0, len(rows))
    on_cpu = jax.default_backend() == "cpu"
    found = take_rows_by_kernel(rows, index, interpret=on_cpu)
    np.testing.assert_array_equal(found, rows[index])


def test_an_index_may_count_copies_of_rows_and_past_the_last_there_is_the_last():
    rows, index = jnp.arange(6.0).reshape(3, 2), jnp.array([0, 3, 5, 6, 8, 9])
    on_cpu = jax.default_backend() == "cpu"
    expected = rows[jnp.array([0, 1, 1, 2, 2, 2])]
    np.testing.assert_array_equal(take_rows(rows, index, 3), expected)
    np.testing.assert_array_equal(take_rows_by_kernel(rows, index, 3, interpret=on_cpu), expected)
    grad = jax.vjp(lambda rows: take_rows(rows, index, 3), rows)[1](jnp.ones((6, 2)))[0]
    np.testing.assert_array_equal(grad, [[1, 1], [2, 2], [3, 3]])


def test_a_rows_gradient_is_the_sum_over_its_copies():
    rows, index = jnp.ones((3, 2)), jnp.array([2, 0, 2, 2])
    cotangent = jnp.arange(8.0).reshape(4, 2)
    grad = jax.vjp(lambda rows: take_rows(rows, index), rows)[1](cotangent)[0]
    np.testing.assert_array_equal(grad, [[2, 3], [0, 0], [10, 13]])


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (3, 2, 2), (3,)])
def test_any_shape_is_taken(shape):
    index = jnp.zeros(0 if shape[0] == 0 else 2, jnp.int32)
    assert take_rows(jnp.ones(shape), index).shape == (len(index), *shape[1:])
