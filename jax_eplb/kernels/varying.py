"""Values made inside `shard_map`: as varying as the values that they will meet."""

import jax
import jax.numpy as jnp
from jaxtyping import Array


def varying_like(x: Array, *like: Array) -> Array:
    """`x`, counted as varying over every mesh axis that some array of `like` varies over."""
    axes = frozenset().union(*(jax.typeof(y).manual_axis_type.varying for y in like))
    missing = axes - jax.typeof(x).manual_axis_type.varying
    return jax.lax.pcast(x, tuple(missing), to="varying") if missing else x


def equally_varying(tree):
    """The arrays of a tree, each counted as varying over the axes that some array of it does."""
    arrays = jax.tree.leaves(tree)
    return jax.tree.map(lambda x: varying_like(x, *arrays), tree)


def zeros_varying_like(shape: tuple[int, ...], dtype, *like: Array) -> Array:
    """Zeros that vary over every mesh axis that some array of `like` varies over.

    A loop inside `shard_map` must carry values of one type, and a plain `jnp.zeros` counts as
    equal on all devices while what the loop adds to it does not.
    """
    return varying_like(jnp.zeros(shape, dtype), *like)
