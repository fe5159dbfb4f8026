"""Speed: ranks that are not equally fast, or gone.

Axes: P ranks.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float


def slowness_of(capacity: Float[Array, "P"] | None, num_ranks: int) -> Float[Array, "P 1"]:
    """1 / capacity, 0 for a rank that holds nothing; ones without a capacity.

    Scaled so that the ranks' capacities add up to P: a height is then what a rank of average speed
    would need the same time for.

    >>> slowness_of(jnp.array([3.0, 1.0, 0.0, 0.0]), 4).ravel().tolist()
    [0.25, 0.75, 0.0, 0.0]
    """
    if capacity is None:
        return jnp.ones((num_ranks, 1), jnp.float32)
    capacity = jnp.asarray(capacity, jnp.float32)
    live = capacity > 0
    scaled = capacity * (num_ranks / jnp.maximum(capacity.sum(), 1e-30))
    return jnp.where(live, 1 / jnp.where(live, scaled, 1.0), 0.0)[:, None]
