"""The grouped product in its plainest form.

Axes: M rows, L layers, G groups, D in, F out.
"""

import jax.numpy as jnp

from jax_eplb.kernels.groups import group_of_rows
from jax_eplb.kernels.stack import layer_of


def reference(rows, weights, group_sizes, layer):
    """Every row times every group's weights, then one picked: plain, and slow."""
    weights = layer_of(weights, layer)
    group = group_of_rows(rows.shape[0], group_sizes)
    every = jnp.einsum("md,gdf->mgf", rows, weights)
    picked = jnp.take_along_axis(every, jnp.minimum(group, len(weights) - 1)[:, None, None], 1)
    return jnp.where((group < len(weights))[:, None], picked[:, 0], 0)
