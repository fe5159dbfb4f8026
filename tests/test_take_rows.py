import functools

import jax
import numpy as np
import pytest

from jax_eplb.kernels import take_rows
from jax_eplb.kernels.take_rows import take_rows_by_kernel

pytestmark = pytest.mark.light_compile


# Compiled whole: one operation after another, each would be a program of its own.
taken = jax.jit(take_rows, static_argnums=2)
taken_by_kernel = jax.jit(
    functools.partial(take_rows_by_kernel, interpret=jax.default_backend() == "cpu"),
    static_argnums=2,
)


@functools.partial(jax.jit, static_argnums=3)
def gradient(rows, index, cotangent, copies=1):
    return jax.vjp(lambda rows: take_rows(rows, index, copies), rows)[1](cotangent)[0]


@pytest.mark.parametrize("shape", [(5, 700), (1, 512), (40, 3)])
@pytest.mark.parametrize("size", [1, 8, 21])
def test_the_kernel_copies_what_plain_indexing_does(shape, size):
    rows = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    index = np.random.default_rng(0).integers(0, len(rows), size, np.int32)
    np.testing.assert_array_equal(taken_by_kernel(rows, index), rows[index])


def test_an_index_may_count_copies_of_rows_and_past_the_last_there_is_the_last():
    rows = np.arange(6, dtype=np.float32).reshape(3, 2)
    index = np.array([0, 3, 5, 6, 8, 9], np.int32)
    expected = rows[[0, 1, 1, 2, 2, 2]]
    np.testing.assert_array_equal(taken(rows, index, 3), expected)
    np.testing.assert_array_equal(taken_by_kernel(rows, index, 3), expected)
    grad = gradient(rows, index, np.ones((6, 2), np.float32), 3)
    np.testing.assert_array_equal(grad, [[1, 1], [2, 2], [3, 3]])


def test_a_rows_gradient_is_the_sum_over_its_copies():
    rows, index = np.ones((3, 2), np.float32), np.array([2, 0, 2, 2], np.int32)
    cotangent = np.arange(8, dtype=np.float32).reshape(4, 2)
    grad = gradient(rows, index, cotangent)
    np.testing.assert_array_equal(grad, [[2, 3], [0, 0], [10, 13]])


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (3, 2, 2), (3,)])
def test_any_shape_is_taken(shape):
    index = np.zeros(0 if shape[0] == 0 else 2, np.int32)
    assert taken(np.ones(shape, np.float32), index).shape == (len(index), *shape[1:])
