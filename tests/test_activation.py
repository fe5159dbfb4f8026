import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_eplb.kernels import ACTIVATIONS, activation_named

pytestmark = pytest.mark.light_compile

GATED = {
    "swiglu": lambda gate, up: jax.nn.silu(gate) * up,
    "geglu": lambda gate, up: jax.nn.gelu(gate, approximate=True) * up,
}


def values(dtype=jnp.float32):
    return jax.random.normal(jax.random.key(0), (50, 12), dtype) * 5


@pytest.mark.parametrize("name", GATED)
def test_a_gated_one_takes_gate_and_up_from_the_halves(name):
    gate, up = jnp.split(values(), 2, axis=1)
    expected = GATED[name](gate, up)
    np.testing.assert_allclose(ACTIVATIONS[name](values()), expected, rtol=1e-5, atol=1e-5)


def test_gelu_is_its_tanh_form():
    expected = jax.nn.gelu(values(), approximate=True)
    np.testing.assert_allclose(ACTIVATIONS["gelu"](values()), expected, rtol=1e-5, atol=1e-5)


def test_clamped_swiglu_bounds_gate_above_and_up_on_both_sides():
    def one(gate, up):
        return ACTIVATIONS["clamped_swiglu"](jnp.array([[gate, up]]))

    assert one(100.0, 2.0) == one(7.0, 2.0)
    assert one(1.0, 100.0) == one(1.0, 7.0)
    assert one(1.0, -100.0) == one(1.0, -7.0)
    assert one(-100.0, 3.0) != one(-7.0, 3.0)
    np.testing.assert_allclose(one(2.0, 3.0), 4 * 2 * jax.nn.sigmoid(1.702 * 2.0), rtol=1e-6)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_zeros_stay_zero_and_large_values_finite(name):
    assert not ACTIVATIONS[name](jnp.zeros((3, 4))).any()
    assert jnp.isfinite(ACTIVATIONS[name](jnp.full((1, 4), -1e4))).all()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_sixteen_bits_are_rounded_once(name):
    exact = ACTIVATIONS[name](values(jnp.bfloat16).astype(jnp.float32)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(ACTIVATIONS[name](values(jnp.bfloat16)), exact)


def test_an_unknown_one_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match="'relu'; use one of swiglu, clamped_swiglu, geglu, gelu"):
        activation_named("relu")
