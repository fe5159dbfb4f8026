import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_eplb.kernels import logits
from jax_eplb.kernels.logits import in_parts


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


def test_on_a_gpu_products_and_those_of_the_gradient_are_of_bfloat16_parts():
    def loss(tokens, router):
        return (in_parts(tokens, router) ** 2).sum()

    arrays = drawn(128, 64, 8, jnp.bfloat16)
    traced = jax.jit(jax.grad(loss, argnums=(0, 1))).trace(*arrays)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("num_primitive_operations = 6") == text.count("dot_general") == 3
