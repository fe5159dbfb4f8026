import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_eplb.kernels import logits
from jax_eplb.kernels.logits import in_parts, in_three_products


def drawn(num_tokens, depth, num_experts, dtype):
    generator = np.random.default_rng(0)
    tokens = jnp.asarray(generator.normal(size=(num_tokens, depth)), dtype)
    router = generator.normal(size=(depth, num_experts)) / depth**0.5
    return tokens, jnp.asarray(router, jnp.float32)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("shape", [(70, 256, 20), (1, 64, 3), (33, 100, 1), (0, 64, 3)])
def test_they_are_the_product_in_float32(shape, dtype):
    tokens, router = drawn(*shape, dtype)
    found = logits(tokens, router)
    assert found.dtype == jnp.float32
    exact = np.asarray(tokens, np.float64) @ np.asarray(router, np.float64)
    np.testing.assert_allclose(found, exact, rtol=0, atol=3e-6)


@pytest.mark.parametrize("shape", [(70, 256, 20), (5, 2880, 32), (3, 4096, 7)])
def test_three_products_with_parts_of_the_weights_are_the_product_in_float32(shape):
    tokens, router = drawn(*shape, jnp.bfloat16)
    exact = np.asarray(tokens, np.float64) @ np.asarray(router, np.float64)
    np.testing.assert_allclose(in_three_products(tokens, router), exact, rtol=0, atol=3e-6)
    # Parts that are missing would show: two leave 2^-17 of a weight.
    one = np.zeros((1, shape[1]), np.float32)
    one[0, 3] = 1
    found = in_three_products(jnp.asarray(one, jnp.bfloat16), router)
    np.testing.assert_array_equal(found[0], router[3])


def test_many_tokens_take_three_products_on_a_gpu_and_the_gradient_of_six(monkeypatch):
    monkeypatch.setattr(
        sys.modules["jax_eplb.kernels.logits"], "_multiplies_bfloat16", lambda: True
    )

    def products(num_tokens, depth, what=logits):
        arrays = drawn(num_tokens, depth, 8, jnp.bfloat16)
        text = jax.jit(what).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
        return text.count("num_primitive_operations = 6"), text.count("dot_general")

    assert products(1023, 2048) == (1, 1)
    assert products(1024, 2048) == (0, 1)
    assert products(1024, 1031) == (1, 1)  # of no equal pieces

    def gradient(tokens, router):
        return jax.grad(lambda *x: (logits(*x) ** 2).sum(), argnums=(0, 1))(tokens, router)

    assert products(1024, 2048, gradient) == (2, 3)
    with pytest.raises(ValueError, match="1031 features have no divisor"):
        in_three_products(*drawn(2, 1031, 3, jnp.bfloat16))


def test_on_a_gpu_products_and_those_of_the_gradient_are_of_bfloat16_parts():
    def loss(tokens, router):
        return (in_parts(tokens, router) ** 2).sum()

    arrays = drawn(128, 64, 8, jnp.bfloat16)
    traced = jax.jit(jax.grad(loss, argnums=(0, 1))).trace(*arrays)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("num_primitive_operations = 6") == text.count("dot_general") == 3
