import jax.numpy as jnp
import numpy as np
import pytest

from jax_eplb.moe.feed_forward import (
    ExpertWeights,
    SharedWeights,
    expert_feed_forward,
    shared_feed_forward,
)


def expected(rows, gate_up, down):
    gate, up = np.split(np.asarray(rows, np.float64) @ np.asarray(gate_up), 2, axis=1)
    return (gate / (1 + np.exp(-gate)) * up) @ np.asarray(down)


def drawn(*shapes):
    generator = np.random.default_rng(0)
    return [jnp.asarray(generator.normal(size=shape), jnp.float32) for shape in shapes]


@pytest.mark.parametrize("kernel", [None, "reference", "gathered"])
def test_each_row_passes_through_the_expert_of_its_slot_and_padding_stays_zero(kernel):
    rows, gate_up, down = drawn((9, 4), (3, 4, 10), (3, 5, 4))
    out = expert_feed_forward(
        rows, ExpertWeights(gate_up, down), jnp.array([4, 0, 3]), kernel=kernel
    )
    np.testing.assert_allclose(out[:4], expected(rows[:4], gate_up[0], down[0]), rtol=1e-4)
    np.testing.assert_allclose(out[4:7], expected(rows[4:7], gate_up[2], down[2]), rtol=1e-4)
    assert not np.asarray(out[7:]).any()


def test_the_shared_expert_serves_every_row():
    rows, gate_up, down = drawn((50, 4), (4, 10), (5, 4))
    out = shared_feed_forward(rows, SharedWeights(gate_up, down))
    np.testing.assert_allclose(out, expected(rows, gate_up, down), rtol=1e-4, atol=1e-5)
