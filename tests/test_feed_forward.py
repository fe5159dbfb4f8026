import jax
import numpy as np
import pytest

from jax_eplb.moe.feed_forward import (
    ExpertWeights,
    SharedWeights,
    expert_feed_forward,
    shared_feed_forward,
)

pytestmark = pytest.mark.light_compile


def expected(rows, gate_up, down):
    gate, up = np.split(np.asarray(rows, np.float64) @ np.asarray(gate_up), 2, axis=1)
    return (gate / (1 + np.exp(-gate)) * up) @ np.asarray(down)


# Compiled whole: one operation after another, each would be a program of its own.
expert_feed_forward = jax.jit(expert_feed_forward, static_argnames=("kernel", "activation"))
shared_feed_forward = jax.jit(shared_feed_forward)


def drawn(*shapes):
    generator = np.random.default_rng(0)
    return [generator.normal(size=shape).astype(np.float32) for shape in shapes]


@pytest.mark.parametrize("kernel", [None, "reference", "ragged_dot"])
def test_each_row_passes_through_the_expert_of_its_slot_and_padding_stays_zero(kernel):
    rows, gate_up, down = drawn((9, 4), (3, 4, 10), (3, 5, 4))
    out = expert_feed_forward(
        rows, ExpertWeights(gate_up, down), np.array([4, 0, 3]), kernel=kernel
    )
    np.testing.assert_allclose(out[:4], expected(rows[:4], gate_up[0], down[0]), rtol=1e-4)
    np.testing.assert_allclose(out[4:7], expected(rows[4:7], gate_up[2], down[2]), rtol=1e-4)
    assert not np.asarray(out[7:]).any()


@pytest.mark.slow
def test_a_layer_of_a_stack_gives_what_it_gives_alone():
    rows, *arrays = drawn((9, 4), (2, 4, 10), (2, 5, 4), (2, 10), (2, 4))
    weights, sizes = ExpertWeights(*arrays), np.array([3, 4])
    stack = jax.tree.map(lambda x: np.stack([x + np.float32(np.nan), x]), weights)
    found = expert_feed_forward(rows, stack._replace(layer=np.int32(1)), sizes)
    np.testing.assert_array_equal(found, expert_feed_forward(rows, weights, sizes))


def test_the_shared_expert_serves_every_row():
    rows, gate_up, down = drawn((50, 4), (4, 10), (5, 4))
    out = shared_feed_forward(rows, SharedWeights(gate_up, down))
    np.testing.assert_allclose(out, expected(rows, gate_up, down), rtol=1e-4, atol=1e-5)


def test_a_gated_shared_expert_counts_as_much_as_its_gate_says():
    rows, gate_up, down, gate = drawn((50, 4), (4, 10), (5, 4), (4, 1))
    out = shared_feed_forward(rows, SharedWeights(gate_up, down, gate))
    share = 1 / (1 + np.exp(-np.asarray(rows, np.float64) @ np.asarray(gate)))
    np.testing.assert_allclose(out, share * expected(rows, gate_up, down), rtol=1e-4, atol=1e-5)


def test_biases_and_an_ungated_activation_pass_through():
    rows, up, down, up_bias, down_bias = drawn((9, 4), (2, 4, 5), (2, 5, 4), (2, 5), (2, 4))
    weights = ExpertWeights(up, down, up_bias, down_bias)
    out = expert_feed_forward(rows, weights, np.array([3, 4]), activation="gelu")
    for group, own in enumerate((slice(0, 3), slice(3, 7))):
        hidden = np.asarray(rows[own], np.float64) @ np.asarray(up[group]) + np.asarray(
            up_bias[group]
        )
        cubed = hidden + 0.044715 * hidden**3
        hidden = 0.5 * hidden * (1 + np.tanh(np.sqrt(2 / np.pi) * cubed))
        right = hidden @ np.asarray(down[group]) + np.asarray(down_bias[group])
        np.testing.assert_allclose(out[own], right, rtol=1e-4, atol=1e-5)
    assert not np.asarray(out[7:]).any()
