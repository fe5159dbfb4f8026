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


# Compiled whole: one operation after another, each would be a program of its own.
activate = jax.jit(lambda name, x: ACTIVATIONS[name](x), static_argnums=0)


def values(dtype=np.float32):
    return (5 * np.random.default_rng(0).normal(size=(50, 12))).astype(dtype)


@pytest.mark.parametrize("name", GATED)
def test_a_gated_one_takes_gate_and_up_from_the_halves(name):
    gate, up = np.split(values(), 2, axis=1)
    expected = jax.jit(GATED[name])(gate, up)
    np.testing.assert_allclose(activate(name, values()), expected, rtol=1e-5, atol=1e-5)


def test_gelu_is_its_tanh_form():
    expected = jax.nn.gelu(values(), approximate=True)
    np.testing.assert_allclose(activate("gelu", values()), expected, rtol=1e-5, atol=1e-5)


def test_clamped_swiglu_bounds_gate_above_and_up_on_both_sides():
    def one(gate, up):
        return activate("clamped_swiglu", np.array([[gate, up]], np.float32))

    assert one(100.0, 2.0) == one(7.0, 2.0)
    assert one(1.0, 100.0) == one(1.0, 7.0)
    assert one(1.0, -100.0) == one(1.0, -7.0)
    assert one(-100.0, 3.0) != one(-7.0, 3.0)
    np.testing.assert_allclose(one(2.0, 3.0), 4 * 2 / (1 + np.exp(-1.702 * 2)), rtol=1e-6)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_zeros_stay_zero_and_large_values_finite(name):
    found = activate(name, np.repeat(np.float32([[0], [-1e4]]), 4, axis=1))
    assert not np.asarray(found)[0].any()
    assert np.isfinite(found).all()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_sixteen_bits_are_rounded_once(name):
    exact = activate(name, values(jnp.bfloat16).astype(np.float32))
    rounded = np.asarray(exact).astype(jnp.bfloat16)
    np.testing.assert_array_equal(activate(name, values(jnp.bfloat16)), rounded)


def test_an_unknown_one_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match="'relu'; use one of swiglu, clamped_swiglu, geglu, gelu"):
        activation_named("relu")
