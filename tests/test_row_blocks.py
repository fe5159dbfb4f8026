import functools

import jax
import numpy as np
import pytest

from jax_eplb.kernels import by_row_blocks


def project(weights):
    def function(rows):
        mixed = rows @ weights
        return jax.nn.softmax(mixed, axis=1), mixed.sum(axis=1)

    return function


@pytest.mark.parametrize("count", [0, 1, 31, 32, 33, 100])
def test_any_number_of_rows_gives_what_the_function_gives(count):
    generator = np.random.default_rng(count)
    rows = generator.normal(size=(count, 6)).astype(np.float32)
    function = project(generator.normal(size=(6, 9)).astype(np.float32))
    likely, total = jax.jit(functools.partial(by_row_blocks, function))(rows)
    expected = jax.jit(function)(rows)
    np.testing.assert_allclose(likely, expected[0], rtol=1e-5)
    np.testing.assert_allclose(total, expected[1], rtol=1e-4, atol=1e-5)


def test_no_bit_of_a_row_depends_on_how_many_rows_there_are():
    generator = np.random.default_rng(0)
    rows = generator.normal(size=(77, 48)).astype(np.float32)
    weights = generator.normal(size=(48, 33)).astype(np.float32)

    @jax.jit
    def run(rows):
        return by_row_blocks(project(weights), rows)

    whole = run(rows)
    for part in (slice(0, 1), slice(5, 6), slice(40, 77), slice(3, 19)):
        for got, expected in zip(run(rows[part]), whole, strict=True):
            np.testing.assert_array_equal(got, expected[part])


def test_the_gradient_passes_through_the_blocks():
    rows = np.random.default_rng(1).normal(size=(40, 3)).astype(np.float32)
    grad = jax.grad(lambda x: by_row_blocks(lambda r: r**3, x, block_rows=8).sum())
    grad = jax.jit(grad)(rows)
    np.testing.assert_allclose(grad, 3 * rows**2, rtol=1e-6)
