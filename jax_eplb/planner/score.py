"""Score: the imbalance that a placement gives, one function for each split.

Axes: W windows, L layers, E experts, S slots, P ranks; `...` windows or nothing.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jax_eplb.split import balanced_split, even_split, slowness_of, sum_by_rank

# Half of what the layer takes, since many windows are to be scored.
_STEPS = 20


def even_heights(
    load: Float[Array, "*windows L E"],
    slot_to_expert: Int[Array, "L S"],
    num_ranks: int,
    capacity: Float[Array, "P"] | None = None,
) -> Float[Array, "*windows L P"]:
    """Tokens / capacity of each rank under the even split; see `slowness_of` for the scale."""
    tokens = even_split(load, slot_to_expert, load.shape[-1])
    return _by_speed(sum_by_rank(tokens, num_ranks), capacity)


def score_even(
    load: Float[Array, "*windows L E"],
    slot_to_expert: Int[Array, "L S"],
    num_ranks: int,
    capacity: Float[Array, "P"] | None = None,
) -> Float[Array, "L"]:
    """Imbalance under the even split, the mean over the windows with tokens.

    With `capacity`, of the ranks' times: tokens / capacity, against a perfect division.

    >>> score_even(jnp.array([[3.0, 1.0]]), jnp.array([[0, 1]]), 2).tolist()
    [0.5]
    """
    heights = even_heights(load, slot_to_expert, num_ranks, capacity)
    return _mean_imbalance(heights, load)


def score_balanced(
    load: Float[Array, "*windows L E"],
    slot_to_expert: Int[Array, "L S"],
    num_ranks: int,
    capacity: Float[Array, "P"] | None = None,
) -> Float[Array, "L"]:
    """Imbalance under the balanced split, the mean over the windows with tokens.

    At most about 0.0005 above that of the best division (see `balanced_split`).

    >>> score_balanced(jnp.array([[3.0, 2.0, 1.0]]), jnp.array([[0, 1, 0, 2]]), 2).tolist()
    [0.0]
    """
    tokens = balanced_split(
        load, slot_to_expert, load.shape[-1], num_ranks, capacity=capacity, num_steps=_STEPS
    )
    return _mean_imbalance(_by_speed(sum_by_rank(tokens, num_ranks), capacity), load)


def _by_speed(
    rank_tokens: Float[Array, "*windows L P"], capacity: Float[Array, "P"] | None
) -> Float[Array, "*windows L P"]:
    if capacity is None:
        return rank_tokens
    slowness = slowness_of(capacity, rank_tokens.shape[-1])[:, 0]
    return rank_tokens * jnp.broadcast_to(slowness, rank_tokens.shape)


def _mean_imbalance(
    heights: Float[Array, "*windows L P"], load: Float[Array, "*windows L E"]
) -> Float[Array, "L"]:
    total = load.sum(axis=-1)
    mean = total / heights.shape[-1]
    each = jnp.where(total > 0, heights.max(axis=-1) / jnp.where(mean > 0, mean, 1.0) - 1, 0.0)
    if load.ndim == 2:
        return each
    seen = (total > 0).astype(jnp.float32).sum(axis=0)
    return each.sum(axis=0) / jnp.maximum(seen, 1.0)
