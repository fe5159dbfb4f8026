"""Bound: what no placement can beat under the even split.

Axes: L layers, E experts, S slots, P ranks.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jax_eplb.placement import max_replicas
from jax_eplb.planner.replicate import replicate


@functools.partial(jax.jit, static_argnames=("num_slots", "num_ranks"))
def lower_bound(load: Float[Array, "L E"], *, num_slots: int, num_ranks: int) -> Float[Array, "L"]:
    """The larger of two bounds on the fullest rank, as an imbalance; 0 where there is no load.

    The fullest rank holds at least the mean, and at least the largest replica, which greedy
    replication makes as small as it can be. What the sizes of all replicas together imply is not
    in it, so the true optimum may lie above.

    >>> lower_bound(jnp.array([[90.0, 10, 10, 10]]), num_slots=6, num_ranks=3).tolist()
    [0.0]
    >>> lower_bound(jnp.array([[90.0, 10, 10, 10]]), num_slots=4, num_ranks=2).tolist()
    [0.5]
    """
    count = replicate(load, num_slots, max_replicas(load.shape[1], num_slots, num_ranks))
    largest = (load / count.astype(jnp.float32)).max(axis=1)
    mean = load.sum(axis=1) / num_ranks
    return jnp.maximum(largest - mean, 0.0) / jnp.where(mean > 0, mean, 1.0)
