"""Loop carries inside `shard_map`: as varying as the values that they will meet."""

import jax
import jax.numpy as jnp
from jaxtyping import Array


def zeros_varying_like(shape: tuple[int, ...], dtype, *like: Array) -> Array:
    """Zeros that vary over every mesh axis that some array of `like` varies over.

    A loop inside `shard_map` must carry values of one type, and a plain `jnp.zeros` counts as
    equal on all devices while what the loop adds to it does not.
    """
    axes = frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in like))
    zeros = jnp.zeros(shape, dtype)
    return jax.lax.pcast(zeros, tuple(axes), to="varying") if axes else zeros
