"""XLA's own grouped product. Axes: M rows, L layers, G groups, D in, F out."""

import jax
import jax.numpy as jnp

from jax_eplb.kernels.groups import is_used
from jax_eplb.kernels.stack import layer_of


def ragged_dot(rows, weights, group_sizes, layer):
    """`jax.lax.ragged_dot` of the layer, with the padding rows defined."""
    out = jax.lax.ragged_dot(rows, layer_of(weights, layer), group_sizes)
    return jnp.where(is_used(rows.shape[0], group_sizes)[:, None], out, 0)
