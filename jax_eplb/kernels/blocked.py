"""The grouped product as a loop over blocks of rows, for the CPU.

Axes: M rows sorted by group, L layers, G groups, D in, F out, B rows of a block.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jax_eplb.kernels.groups import group_starts, is_used
from jax_eplb.kernels.stack import stack_gradient
from jax_eplb.kernels.varying import zeros_varying_like

# Large enough to keep a core's vector units busy, small enough that a group of a few rows, the
# usual case while decoding, wastes little. Measured with benchmarks/grouped_matmul.py.
BLOCK_ROWS = 32


@jax.custom_vjp
def blocked(rows, weights, group_sizes, layer):
    """A loop over the used blocks of 32 rows only: work grows with the rows, not the groups."""
    return _product(rows, weights, group_sizes, layer, weight_axis=0)


def _forward(*operands):
    return blocked(*operands), operands


def _backward(operands, grad):
    rows, weights, group_sizes, layer = operands
    grad_rows = _product(grad, weights, group_sizes, layer, weight_axis=1)
    grad_weights = _weight_gradient(rows, grad, weights, group_sizes)
    return grad_rows, stack_gradient(grad_weights, weights, layer), None, None


blocked.defvjp(_forward, _backward)


class _Blocks(NamedTuple):
    """Where each group's rows and blocks begin; the last entry is the total."""

    row_start: Int[Array, "G+1"]
    block_start: Int[Array, "G+1"]


def _blocks(group_sizes: Int[Array, "G"]) -> _Blocks:
    return _Blocks(group_starts(group_sizes), group_starts(-(-group_sizes // BLOCK_ROWS)))


def _block(blocks: _Blocks, i):
    """Block i's group, first row, and its group's end."""
    group = jnp.searchsorted(blocks.block_start[1:], i, side="right").astype(jnp.int32)
    start = blocks.row_start[group] + (i - blocks.block_start[group]) * BLOCK_ROWS
    return group, start, blocks.row_start[group + 1]


def _product(rows, weights, group_sizes, layer, *, weight_axis: int):
    """Each block times its group's weights, contracted over `weight_axis` of a [D, F] matrix."""
    num_rows = rows.shape[0]
    width = weights.shape[3 - weight_axis]
    blocks = _blocks(group_sizes)
    padded = jnp.pad(rows, ((0, BLOCK_ROWS), (0, 0)))

    def step(i, out):
        group, start, _ = _block(blocks, i)
        block = jax.lax.dynamic_slice_in_dim(padded, start, BLOCK_ROWS)
        own = weights[layer, group]
        product = jax.lax.dot_general(block, own, (((1,), (weight_axis,)), ((), ())))
        # A block that runs past its group's end writes rows of the next group, whose own block
        # comes later and overwrites them.
        return jax.lax.dynamic_update_slice_in_dim(out, product, start, 0)

    shape = (num_rows + BLOCK_ROWS, width)
    dtype = jnp.result_type(rows, weights)
    start = zeros_varying_like(shape, dtype, rows, weights, group_sizes)
    out = jax.lax.fori_loop(0, blocks.block_start[-1], step, start)
    return jnp.where(is_used(num_rows, group_sizes)[:, None], out[:num_rows], 0)


def _weight_gradient(rows, grad, weights, group_sizes):
    """The gradient of the layer's weights: each block's rowsᵀ · grad, added to its group's."""
    blocks = _blocks(group_sizes)
    padded_rows = jnp.pad(rows, ((0, BLOCK_ROWS), (0, 0)))
    padded_grad = jnp.pad(grad, ((0, BLOCK_ROWS), (0, 0)))

    def step(i, out):
        group, start, end = _block(blocks, i)
        own = (start + jnp.arange(BLOCK_ROWS) < end)[:, None]
        block = jax.lax.dynamic_slice_in_dim(padded_rows, start, BLOCK_ROWS)
        block_grad = jax.lax.dynamic_slice_in_dim(padded_grad, start, BLOCK_ROWS)
        return out.at[group].add(jnp.where(own, block, 0).T @ jnp.where(own, block_grad, 0))

    start = zeros_varying_like(weights.shape[1:], weights.dtype, rows, grad, weights, group_sizes)
    return jax.lax.fori_loop(0, blocks.block_start[-1], step, start)
