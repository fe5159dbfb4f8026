import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_eplb.routing import softmax_top_k


def test_weights_are_the_softmax_over_all_experts_unless_renormalised():
    logits = jnp.log(jnp.array([[1.0, 6.0, 3.0], [5.0, 1.0, 4.0]]))
    plain = softmax_top_k(logits, 2, renormalize=False)
    assert plain.experts.tolist() == [[1, 2], [0, 2]]
    np.testing.assert_allclose(plain.weights, [[0.6, 0.3], [0.5, 0.4]], rtol=1e-6)
    np.testing.assert_allclose(
        softmax_top_k(logits, 2).weights, [[2 / 3, 1 / 3], [5 / 9, 4 / 9]], rtol=1e-6
    )


def test_ties_go_to_the_lowest_expert():
    assert softmax_top_k(jnp.zeros((2, 5)), 3).experts.tolist() == [[0, 1, 2]] * 2
    assert softmax_top_k(jnp.array([[1.0, 2.0, 2.0, 1.0]]), 3).experts.tolist() == [[1, 2, 0]]


@pytest.mark.parametrize("choices", [1, 3, 7])
def test_the_router_agrees_with_numpy(choices):
    logits = np.random.default_rng(choices).normal(size=(40, 7)) * 4
    routes = softmax_top_k(jnp.asarray(logits, jnp.float32), choices)
    order = np.argsort(-logits, axis=1, kind="stable")[:, :choices]
    np.testing.assert_array_equal(routes.experts, order)
    likely = np.exp(np.take_along_axis(logits, order, 1))
    np.testing.assert_allclose(routes.weights, likely / likely.sum(1, keepdims=True), rtol=1e-5)


def test_large_logits_do_not_overflow():
    routes = softmax_top_k(jnp.array([[1e4, -1e4, 1e4 - 1]]), 2)
    np.testing.assert_allclose(routes.weights, jax.nn.softmax(jnp.array([[1.0, 0.0]])), rtol=1e-6)
