"""Products in full float32, and inverses made of them."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

_BLOCK = 64  # rows whose products pay, on matrices of more


def exact_matmul(
    one: Float[Array, "*batch A B"], other: Float[Array, "*batch B C"]
) -> Float[Array, "*batch A C"]:
    """In full float32 on a GPU too, where the default may be TF32.

    >>> exact_matmul(jnp.ones((1, 1, 2)), jnp.ones((1, 2, 1))).tolist()
    [[[2.0]]]
    """
    return jnp.matmul(one, other, precision="highest")


def symmetric_inverse(matrix: Float[Array, "N N"]) -> Float[Array, "N N"]:
    """Of a positive definite matrix; wrong by some units in the last place times its condition.

    Not by LAPACK: on a CPU it has threads of its own, as many as cores, and where several processes
    share a machine these wait for each other a hundred times longer than a small inverse takes.

    >>> symmetric_inverse(jnp.array([[2.0, 1.0], [1.0, 1.0]])).tolist()
    [[1.0, -1.0], [-1.0, 2.0]]
    """
    size = len(matrix)
    if size <= _BLOCK:
        return _swept(matrix, 1)
    whole = -(-size // _BLOCK) * _BLOCK
    filled = jnp.eye(whole, dtype=matrix.dtype).at[:size, :size].set(matrix)
    return _swept(filled, _BLOCK)[:size, :size]


def _swept(matrix: Float[Array, "N N"], block: int) -> Float[Array, "N N"]:
    """All rows swept, a block at a time (Goodnight, "A tutorial on the SWEEP operator", 1979)."""

    def sweep(turn, a):
        at = turn * block
        rows = jax.lax.dynamic_slice_in_dim(a, at, block)
        pivot = jax.lax.dynamic_slice_in_dim(rows, at, block, axis=1)
        inverse = 1 / pivot if block == 1 else _swept(pivot, 1)
        scaled = exact_matmul(inverse, rows)
        a = a - exact_matmul(rows.T, scaled)
        a = jax.lax.dynamic_update_slice(a, scaled, (at, 0))
        a = jax.lax.dynamic_update_slice(a, scaled.T, (0, at))
        return jax.lax.dynamic_update_slice(a, -inverse, (at, at))

    return -jax.lax.fori_loop(0, len(matrix) // block, sweep, matrix)
