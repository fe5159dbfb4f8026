"""The grouped matrix product: sorted rows, each times the weights of its group.

Axes: M rows sorted by group, G groups, D in, F out, B rows of a block.
Rows past the sum of the group sizes are padding: their results are zero and so are their
gradients. A row's result depends on the row and its group's weights alone, bit for bit, in every
implementation but `ragged_dot` and `reference`.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jax_eplb.kernels.varying import zeros_varying_like

# Large enough to keep a core's vector units busy, small enough that a group of a few rows, the
# usual case while decoding, wastes little. Measured with benchmarks/grouped_matmul.py.
CPU_BLOCK_ROWS = 32
GPU_BLOCK_ROWS = 128
# `gathered` copies one group's weights per block; past this it would crowd out the model.
GATHERED_BYTES = 2**28


def grouped_matmul(
    rows: Float[Array, "M D"],
    weights: Float[Array, "G D F"],
    group_sizes: Int[Array, "G"],
    *,
    implementation: str | None = None,
) -> Float[Array, "M F"]:
    """Multiply each row with its group's weights; differentiable in rows and weights.

    `implementation` is a name of `IMPLEMENTATIONS`, or None for the best one on the backend that
    the program is lowered for.

    >>> rows, weights = jnp.ones((3, 2)), jnp.array([[[1.0], [1.0]], [[2.0], [3.0]]])
    >>> grouped_matmul(rows, weights, jnp.array([1, 1])).tolist()
    [[2.0], [5.0], [0.0]]
    """
    if implementation is not None:
        check_implementation(implementation)
        return IMPLEMENTATIONS[implementation](rows, weights, group_sizes)
    blocks = _block_bound(rows.shape[0], weights.shape[0], GPU_BLOCK_ROWS)
    copied = blocks * weights[0].size * weights.dtype.itemsize
    accelerated = gathered if copied <= GATHERED_BYTES else ragged_dot
    return jax.lax.platform_dependent(rows, weights, group_sizes, cpu=blocked, default=accelerated)


def check_implementation(name: str) -> None:
    """Raise ValueError unless `name` is one of `IMPLEMENTATIONS`."""
    if name not in IMPLEMENTATIONS:
        known = ", ".join(sorted(IMPLEMENTATIONS))
        raise ValueError(f"unknown grouped_matmul implementation {name!r}; use one of {known}")


def reference(rows, weights, group_sizes):
    """Every row times every group's weights, then one picked: plain, and slow."""
    group = _group_of_rows(rows.shape[0], group_sizes)
    every = jnp.einsum("md,gdf->mgf", rows, weights)
    picked = jnp.take_along_axis(every, jnp.minimum(group, len(weights) - 1)[:, None, None], 1)
    return jnp.where((group < len(weights))[:, None], picked[:, 0], 0)


def ragged_dot(rows, weights, group_sizes):
    """`jax.lax.ragged_dot`, with the padding rows defined."""
    out = jax.lax.ragged_dot(rows, weights, group_sizes)
    return jnp.where(_is_used(rows.shape[0], group_sizes)[:, None], out, 0)


@jax.custom_vjp
def gathered(rows, weights, group_sizes):
    """One batched product over blocks of 128 rows, each with a copy of its group's weights."""
    return _gathered_rows(rows, weights, group_sizes, "nbd,ndf->nbf")


def _gathered_forward(rows, weights, group_sizes):
    return gathered(rows, weights, group_sizes), (rows, weights, group_sizes)


def _gathered_backward(residuals, grad):
    rows, weights, group_sizes = residuals
    grad_rows = _gathered_rows(grad, weights, group_sizes, "nbf,ndf->nbd")
    group, index = _block_rows(len(rows), group_sizes)
    row_blocks, grad_blocks = _take_rows(rows, index), _take_rows(grad, index)
    by_block = jnp.einsum("nbd,nbf->ndf", row_blocks, grad_blocks)
    # A product with zeros and ones: scattered additions to a few groups would wait for each other.
    member = group[None] == jnp.arange(len(weights), dtype=jnp.int32)[:, None]  # [G, blocks]
    grad_weights = jnp.einsum("gn,ndf->gdf", member.astype(by_block.dtype), by_block)
    return grad_rows, grad_weights, None


gathered.defvjp(_gathered_forward, _gathered_backward)


@jax.custom_vjp
def blocked(rows, weights, group_sizes):
    """A loop over the used blocks of 32 rows only: work grows with the rows, not the groups."""
    return _blocked_rows(rows, weights, group_sizes, weight_axis=0)


def _blocked_forward(rows, weights, group_sizes):
    return blocked(rows, weights, group_sizes), (rows, weights, group_sizes)


def _blocked_backward(residuals, grad):
    rows, weights, group_sizes = residuals
    grad_rows = _blocked_rows(grad, weights, group_sizes, weight_axis=1)
    return grad_rows, _blocked_weights(rows, grad, weights, group_sizes), None


blocked.defvjp(_blocked_forward, _blocked_backward)

IMPLEMENTATIONS: dict[str, Callable] = {
    "reference": reference,
    "blocked": blocked,
    "gathered": gathered,
    "ragged_dot": ragged_dot,
}


class _Blocks(NamedTuple):
    """Where each group's rows and blocks begin; the last entry is the total."""

    row_start: Int[Array, "G+1"]
    block_start: Int[Array, "G+1"]


def _blocks(group_sizes: Int[Array, "G"], block_rows: int) -> _Blocks:
    def starts(sizes):
        return jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(sizes, dtype=jnp.int32)])

    return _Blocks(starts(group_sizes), starts(-(-group_sizes // block_rows)))


def _block_bound(num_rows: int, num_groups: int, block_rows: int) -> int:
    # Each non-empty group may end in one block that is not full.
    return num_rows // block_rows + min(num_groups, num_rows)


def _block(blocks: _Blocks, i, block_rows: int):
    """Block i's group, first row, and its group's end; an unused block is empty."""
    last = len(blocks.block_start) - 2
    group = jnp.searchsorted(blocks.block_start[1:], i, side="right").astype(jnp.int32)
    used = group <= last
    group = jnp.minimum(group, last)
    start = blocks.row_start[group] + (i - blocks.block_start[group]) * block_rows
    return group, start, jnp.where(used, blocks.row_start[group + 1], 0)


def _block_rows(num_rows: int, group_sizes: Int[Array, "G"]):
    """The group of each block of 128 rows, and the rows in it; M past the group's end."""
    blocks = _blocks(group_sizes, GPU_BLOCK_ROWS)
    bound = _block_bound(num_rows, len(group_sizes), GPU_BLOCK_ROWS)
    group, start, end = jax.vmap(lambda i: _block(blocks, i, GPU_BLOCK_ROWS))(jnp.arange(bound))
    index = start[:, None] + jnp.arange(GPU_BLOCK_ROWS, dtype=jnp.int32)[None]  # [blocks, B]
    return group, jnp.where(index < end[:, None], index, num_rows)


def _take_rows(rows, index):
    return rows.at[index].get(mode="fill", fill_value=0)


def _gathered_rows(rows, weights, group_sizes, subscripts: str):
    group, index = _block_rows(len(rows), group_sizes)
    product = jnp.einsum(subscripts, _take_rows(rows, index), weights[group])
    out = zeros_varying_like((len(rows), product.shape[2]), product.dtype, rows, weights)
    return out.at[index].set(product, mode="drop")


def _group_of_rows(num_rows: int, group_sizes: Int[Array, "G"]) -> Int[Array, "M"]:
    """The group of each row; G for padding."""
    ends = jnp.cumsum(group_sizes)
    return jnp.searchsorted(ends, jnp.arange(num_rows), side="right").astype(jnp.int32)


def _is_used(num_rows: int, group_sizes: Int[Array, "G"]) -> Bool[Array, "M"]:
    return jnp.arange(num_rows) < group_sizes.sum()


def _blocked_rows(rows, weights, group_sizes, *, weight_axis: int):
    """Each block times its group's weights, contracted over `weight_axis` of a [D, F] matrix."""
    num_rows = rows.shape[0]
    width = weights.shape[2 - weight_axis]
    blocks = _blocks(group_sizes, CPU_BLOCK_ROWS)
    padded = jnp.pad(rows, ((0, CPU_BLOCK_ROWS), (0, 0)))

    def step(i, out):
        group, start, _ = _block(blocks, i, CPU_BLOCK_ROWS)
        block = jax.lax.dynamic_slice_in_dim(padded, start, CPU_BLOCK_ROWS)
        product = jax.lax.dot_general(block, weights[group], (((1,), (weight_axis,)), ((), ())))
        # A block that runs past its group's end writes rows of the next group, whose own block
        # comes later and overwrites them.
        return jax.lax.dynamic_update_slice_in_dim(out, product, start, 0)

    shape = (num_rows + CPU_BLOCK_ROWS, width)
    dtype = jnp.result_type(rows, weights)
    start = zeros_varying_like(shape, dtype, rows, weights, group_sizes)
    out = jax.lax.fori_loop(0, blocks.block_start[-1], step, start)
    return jnp.where(_is_used(num_rows, group_sizes)[:, None], out[:num_rows], 0)


def _blocked_weights(rows, grad, weights, group_sizes):
    """The gradient of the weights: each block's rowsᵀ · grad, added to its group's."""
    blocks = _blocks(group_sizes, CPU_BLOCK_ROWS)
    padded_rows = jnp.pad(rows, ((0, CPU_BLOCK_ROWS), (0, 0)))
    padded_grad = jnp.pad(grad, ((0, CPU_BLOCK_ROWS), (0, 0)))

    def step(i, out):
        group, start, end = _block(blocks, i, CPU_BLOCK_ROWS)
        own = (start + jnp.arange(CPU_BLOCK_ROWS) < end)[:, None]
        block = jax.lax.dynamic_slice_in_dim(padded_rows, start, CPU_BLOCK_ROWS)
        block_grad = jax.lax.dynamic_slice_in_dim(padded_grad, start, CPU_BLOCK_ROWS)
        return out.at[group].add(jnp.where(own, block, 0).T @ jnp.where(own, block_grad, 0))

    start = zeros_varying_like(weights.shape, weights.dtype, rows, grad, weights, group_sizes)
    return jax.lax.fori_loop(0, blocks.block_start[-1], step, start)
