"""Choose: between plans, in each layer by itself.

Axes: L layers, S slots.
"""

from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

_Tree = TypeVar("_Tree")


def choose_layers(which: Bool[Array, "L"], one: _Tree, other: _Tree) -> _Tree:
    """`one` in the layers marked, `other` in the rest: trees of arrays whose first axis is L.

    >>> one, other = jnp.array([[1], [2]]), jnp.array([[3], [4]])
    >>> choose_layers(jnp.array([True, False]), one, other).tolist()
    [[1], [4]]
    """

    def choose(one, other):
        return jnp.where(which.reshape(-1, *[1] * (one.ndim - 1)), one, other)

    return jax.tree.map(choose, one, other)


def lowest_of(
    candidates: Int[Array, "candidates L S"], heights: Float[Array, "candidates L"], number: int
) -> Int[Array, "number L S"]:
    """So many of each layer's candidates, the lowest first.

    >>> lowest_of(jnp.array([[[0]], [[1]]]), jnp.array([[2.0], [1.0]]), 1).tolist()
    [[[1]]]
    """
    order = jnp.argsort(heights, axis=0, stable=True)[:number]
    return jnp.take_along_axis(candidates, order[..., None], axis=0)
