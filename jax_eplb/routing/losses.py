"""What training adds to keep experts busy alike: balance losses, z-loss, and the bias rule.

Axes: B sequences, T tokens, K choices per token, E experts; `…` stands for any leading axes, as
layers. Masks are False for padding, which counts nowhere. No tokens give a loss of 0.

A loss of all ranks' tokens is made of sums: add up the counts and the scores of the ranks (or
micro-batches), divide, and give both to `balance`. The product of means is not the mean of
products, so averaging the ranks' own losses is another loss, which asks each rank to be balanced.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jax_eplb.load import count_experts


def balance(
    expert_tokens: Int[Array, "*layers E"], mean_scores: Float[Array, "*layers E"]
) -> Float[Array, "*layers"]:
    """E · Σ f_e · P_e, f the share of the choices and P the mean of the scores, by expert.

    It is 1 where all experts share alike, up to E where one has all. The gradient comes through
    the scores alone, each weighed by how busy its expert is. `mean_scores` sum to 1.

    >>> float(balance(jnp.array([2, 2]), jnp.array([0.7, 0.3])))
    1.0
    >>> float(balance(jnp.array([4, 0]), jnp.array([0.75, 0.25])))
    1.5
    """
    total = jnp.maximum(expert_tokens.sum(axis=-1, keepdims=True), 1)
    share = expert_tokens.astype(jnp.float32) / total.astype(jnp.float32)
    return expert_tokens.shape[-1] * (share * mean_scores).sum(axis=-1)


def load_balancing_loss(
    logits: Float[Array, "*layers T E"],
    experts_per_token: int,
    mask: Bool[Array, "T"] | None = None,
) -> Float[Array, ""]:
    """Switch Transformer's loss for top-K routers, as `transformers` computes it for Mixtral.

    That is K times `balance`, so K where all experts share alike. Counts and scores of all layers
    are pooled before they are multiplied, as they are there; `jax.vmap` gives a loss by layer.

    >>> float(load_balancing_loss(jnp.zeros((3, 4)), 2))
    2.0
    """
    layers = tuple(range(logits.ndim - 2))
    expert_tokens = top_k_counts(logits, experts_per_token, mask).sum(axis=layers)
    mean_scores = masked_mean(normalized_scores(logits), mask).mean(axis=layers)
    return experts_per_token * balance(expert_tokens, mean_scores)


def sequence_balance_loss(
    logits: Float[Array, "B T E"],
    experts_per_token: int,
    mask: Bool[Array, "B T"] | None = None,
    *,
    scores: str = "sigmoid",
) -> Float[Array, ""]:
    """DeepSeek-V3's complementary loss: each sequence balanced in itself, averaged over them.

    As in the paper (arXiv:2412.19437, equations 17 to 20), the counts are of the K best scores,
    without the selection bias. Sequences of padding alone are left out of the average.

    >>> float(sequence_balance_loss(jnp.zeros((2, 3, 4)), 1))  # ties: all choose expert 0
    1.0
    """
    expert_tokens = top_k_counts(logits, experts_per_token, mask)  # [B, E]
    by_sequence = balance(expert_tokens, masked_mean(normalized_scores(logits, scores), mask))
    has_tokens = None if mask is None else mask.any(axis=1)
    return masked_mean(by_sequence[:, None], has_tokens)[0]


def router_z_loss(
    logits: Float[Array, "*layers T E"], mask: Bool[Array, "*layers T"] | None = None
) -> Float[Array, "*layers"]:
    """ST-MoE's z-loss, the mean over tokens of logsumexp(logits)²: it keeps the logits small.

    >>> round(float(router_z_loss(jnp.zeros((3, 4)))), 4)  # log(4)²
    1.9218
    """
    squares = jax.nn.logsumexp(logits.astype(jnp.float32), axis=-1) ** 2
    return masked_mean(squares[..., None], mask)[..., 0]


def normalized_scores(
    logits: Float[Array, "*layers T E"], scores: str = "softmax"
) -> Float[Array, "*layers T E"]:
    """The scores of each token ("softmax" or "sigmoid"), divided by their sum; float32.

    >>> normalized_scores(jnp.array([[0.0, 0.0]]), "sigmoid").tolist()
    [[0.5, 0.5]]
    """
    if scores not in ("softmax", "sigmoid"):
        raise ValueError(f"scores is {scores!r}; choose 'softmax' or 'sigmoid'")
    logits = logits.astype(jnp.float32)
    # The softmax of logarithms is their scores over the sum, with no score too small for it.
    return jax.nn.softmax(jax.nn.log_sigmoid(logits) if scores == "sigmoid" else logits, axis=-1)


def top_k_counts(
    logits: Float[Array, "*layers T E"],
    experts_per_token: int,
    mask: Bool[Array, "..."] | None = None,
) -> Int[Array, "*layers E"]:
    """How many tokens have each expert among their K best; ties go to the lowest expert.

    >>> top_k_counts(jnp.array([[1.0, 3.0, 2.0], [0.0, 5.0, 0.0]]), 2).tolist()
    [1, 2, 1]
    """
    *layers, num_tokens, num_experts = logits.shape
    _, experts = jax.lax.top_k(jax.lax.stop_gradient(logits), experts_per_token)
    counted = jnp.broadcast_to(True if mask is None else mask, (*layers, num_tokens))
    count = jax.vmap(lambda experts, counted: count_experts(experts, num_experts, counted))
    flat = math.prod(layers)
    by_layer = count(
        experts.reshape(flat, num_tokens, experts_per_token), counted.reshape(flat, num_tokens)
    )
    return by_layer.reshape(*layers, num_experts)


def masked_mean(
    values: Float[Array, "*layers T C"], mask: Bool[Array, "..."] | None = None
) -> Float[Array, "*layers C"]:
    """The mean over tokens whose mask is True; 0 where there are none.

    >>> masked_mean(jnp.array([[1.0], [3.0], [9.0]]), jnp.array([True, True, False])).tolist()
    [2.0]
    """
    counted = jnp.broadcast_to(True if mask is None else mask, values.shape[:-1])[..., None]
    total = jnp.where(counted, values, 0).sum(axis=-2)
    return total / jnp.maximum(counted.sum(axis=-2).astype(values.dtype), 1)


def update_selection_bias(
    bias: Float[Array, "*layers E"], expert_tokens: Int[Array, "*layers E"], rate: float
) -> Float[Array, "*layers E"]:
    """DeepSeek-V3's rule in place of a loss: `rate` up for experts below the mean, down above it.

    After each step, with the counts of all ranks. DeepSeek-V3 used a rate of 0.001 and, at the
    end of training, 0.

    >>> update_selection_bias(jnp.zeros(4), jnp.array([9, 1, 5, 5]), 0.5).tolist()
    [-0.5, 0.5, 0.0, 0.0]
    """
    total = expert_tokens.sum(axis=-1, keepdims=True)
    # Whole numbers compare exactly: above the mean is above it rounded down, and so below.
    below = expert_tokens < -(-total // expert_tokens.shape[-1])
    above = expert_tokens > total // expert_tokens.shape[-1]
    return bias + rate * (below.astype(bias.dtype) - above.astype(bias.dtype))
