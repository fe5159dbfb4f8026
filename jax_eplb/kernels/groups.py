"""Where groups begin and end among sorted rows. Axes: M rows, G groups."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


def group_starts(group_sizes: Int[Array, "G"]) -> Int[Array, "G+1"]:
    """The first row of each group, then the end of the last one.

    >>> group_starts(jnp.array([2, 0, 3])).tolist()
    [0, 2, 2, 5]
    """
    return jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(group_sizes, dtype=jnp.int32)])


def group_of_rows(num_rows: int, group_sizes: Int[Array, "G"]) -> Int[Array, "M"]:
    """The group of each row; G for padding.

    >>> group_of_rows(4, jnp.array([1, 0, 2])).tolist()
    [0, 2, 2, 3]
    """
    ends = jnp.cumsum(group_sizes)
    return jnp.searchsorted(ends, jnp.arange(num_rows), side="right").astype(jnp.int32)


def is_used(num_rows: int, group_sizes: Int[Array, "G"]) -> Bool[Array, "M"]:
    """Whether a row belongs to a group; the rest is padding."""
    return jnp.arange(num_rows) < group_sizes.sum()
