"""Weights of several layers in one array, of which a product needs one layer.

Axes: L layers, G groups, D in, F out.
"""

import jax
from jaxtyping import Array, Float, Int, Num

from jax_eplb.kernels.varying import zeros_varying_like


def layer_of(stack: Num[Array, "L *shape"], layer: Int[Array, ""]) -> Num[Array, "*shape"]:
    """The layer, cut out: for small arrays, and products that cannot read it where it is."""
    return jax.lax.dynamic_index_in_dim(stack, layer, keepdims=False)


def stack_gradient(
    gradient: Float[Array, "G D F"], stack: Float[Array, "L G D F"], layer: Int[Array, ""]
) -> Float[Array, "L G D F"]:
    """The gradient of a stack, from that of the only layer that was read.

    >>> ones = jax.numpy.ones((1, 1, 2))
    >>> stack_gradient(ones, jax.numpy.zeros((3, 1, 1, 2)), 1).reshape(3, 2).tolist()
    [[0.0, 0.0], [1.0, 1.0], [0.0, 0.0]]
    """
    zeros = zeros_varying_like(stack.shape, gradient.dtype, gradient)
    return jax.lax.dynamic_update_index_in_dim(zeros, gradient, layer, axis=0)
