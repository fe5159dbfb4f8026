"""The how-manieth of its kind: the counting behind dealing, exchanging and grouping."""

import jax.numpy as jnp
from jaxtyping import Array, Int


def occurrence(ids: Int[Array, "M"], num_ids: int) -> Int[Array, "M"]:
    """How many equal ids stand before each one; ids are in 0 .. num_ids - 1.

    >>> occurrence(jnp.array([2, 0, 2, 2, 0]), 3).tolist()
    [0, 0, 1, 2, 1]
    """
    order = jnp.argsort(ids, stable=True)
    count = jnp.zeros(num_ids, jnp.int32).at[ids].add(1)
    first = jnp.cumsum(count) - count
    in_order = jnp.arange(ids.size, dtype=jnp.int32) - first[ids[order]]
    return jnp.zeros(ids.size, jnp.int32).at[order].set(in_order, unique_indices=True)
