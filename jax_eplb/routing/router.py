"""Router logits to experts and their weights.

Axes: T tokens, K choices per token, E experts.
"""

from typing import NamedTuple

import jax
from jaxtyping import Array, Float, Int


class Routes(NamedTuple):
    """The experts that each token chose, the likeliest first, and how much each one counts."""

    experts: Int[Array, "T K"]
    weights: Float[Array, "T K"]


def softmax_top_k(
    logits: Float[Array, "T E"], experts_per_token: int, *, renormalize: bool = True
) -> Routes:
    """Softmax over all experts, then the K likeliest (Mixtral, Qwen3-MoE, OLMoE).

    With `renormalize` the K weights sum to 1. Ties go to the lowest expert.

    >>> routes = softmax_top_k(jax.numpy.array([[0.0, 2.0, 2.0]]), 2)
    >>> routes.experts.tolist(), routes.weights.tolist()
    ([[1, 2]], [[0.5, 0.5]])
    """
    probabilities = jax.nn.softmax(logits, axis=-1)
    weights, experts = jax.lax.top_k(probabilities, experts_per_token)
    if renormalize:
        weights = weights / weights.sum(axis=-1, keepdims=True)
    return Routes(experts, weights)
