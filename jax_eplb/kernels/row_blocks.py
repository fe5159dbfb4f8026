"""Row-wise functions whose result for a row does not depend on the other rows, bit for bit.

XLA picks the blocking of a product, and the vectorisation of a sum, by the number of rows; so the
same token gives other bits in a batch of another size. Blocks of one size take that choice away.
Axis: M rows.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

BLOCK_ROWS = 32


def by_row_blocks(function: Callable[..., Any], *rows: Array, block_rows: int = BLOCK_ROWS) -> Any:
    """`function(*rows)`, where each row of the results depends on its own row alone.

    On CPU the function runs on blocks of `block_rows` rows, so that no bit of a result depends on
    how many rows there are; elsewhere it runs once. Every array, given or returned, has M as
    first axis.

    >>> by_row_blocks(lambda x: x / x.sum(axis=1, keepdims=True), jnp.ones((3, 2))).tolist()
    [[0.5, 0.5], [0.5, 0.5], [0.5, 0.5]]
    """

    def in_blocks(*rows):
        num_rows = len(rows[0])
        blocks = -(-num_rows // block_rows)

        def split(x):
            padding = [(0, blocks * block_rows - num_rows)] + [(0, 0)] * (x.ndim - 1)
            return jnp.pad(x, padding).reshape(blocks, block_rows, *x.shape[1:])

        def join(x):
            return x.reshape(blocks * block_rows, *x.shape[2:])[:num_rows]

        results = jax.lax.map(lambda block: function(*block), [split(x) for x in rows])
        return jax.tree.map(join, results)

    return jax.lax.platform_dependent(*rows, cpu=in_blocks, default=function)
