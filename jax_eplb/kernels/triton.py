"""The grouped product and its gradients on NVIDIA GPUs of any generation, and for any shape.

Axes: M rows sorted by group, L layers, G groups, D in, N out, I tiles of rows.

Three Pallas kernels in Triton's terms: one program for each tile of the result, with masks where a
tile reaches past its group or the matrix. On a CPU they are interpreted, which is slow and right.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jax_eplb.kernels.groups import group_starts
from jax_eplb.kernels.stack import stack_gradient
from jax_eplb.kernels.tile_table import tile_table
from jax_eplb.kernels.varying import equally_varying, varying_like

_BLOCK_M, _BLOCK_N, _BLOCK_K = 64, 128, 32
_PARAMETERS = plgpu.CompilerParams(num_warps=4, num_stages=3)


@jax.custom_vjp
def triton(rows, weights, group_sizes, layer):
    """One program for each tile of 64 rows of a group."""
    return _product(rows, weights, group_sizes, layer, transpose_weights=False)


def _forward(*operands):
    return triton(*operands), operands


def _backward(operands, grad):
    rows, weights, group_sizes, layer = operands
    grad_rows = _product(grad, weights, group_sizes, layer, transpose_weights=True)
    grad_weights = _weight_gradient(rows, grad, group_sizes)
    return grad_rows, stack_gradient(grad_weights, weights, layer), None, None


triton.defvjp(_forward, _backward)


def _call(kernel, shape, dtype, grid, *arguments):
    """Run `kernel` over `grid`: compiled on a GPU, interpreted elsewhere."""
    # Inside `shard_map` a kernel's operands and result must vary over the same axes.
    arguments = equally_varying(arguments)
    varying = jax.typeof(arguments[0]).manual_axis_type
    out = jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=varying)
    run = functools.partial(pl.pallas_call, kernel, out_shape=out, grid=grid)
    return jax.lax.platform_dependent(
        *arguments, cuda=run(compiler_params=_PARAMETERS), default=run(interpret=True)
    )


def _product(rows, weights, group_sizes, layer, *, transpose_weights: bool):
    num_rows = len(rows)
    width = weights.shape[2 if transpose_weights else 3]
    if num_rows == 0:
        return jnp.zeros((0, width), rows.dtype)
    table = tile_table(num_rows, group_sizes, _BLOCK_M)
    grid = len(table.group), pl.cdiv(width, _BLOCK_N)
    kernel = functools.partial(_product_kernel, transpose_weights=transpose_weights)
    operands = *table[:4], layer.reshape(1), rows, weights
    return _call(kernel, (num_rows, width), rows.dtype, grid, *operands)


def _product_kernel(
    group, start, begin, end, layer, x_ref, w_ref, out_ref, *, transpose_weights: bool
):
    depth, num_groups, width = x_ref.shape[1], w_ref.shape[1], out_ref.shape[1]
    tile, layer = pl.program_id(0), layer[0]
    group, start, begin, end = group[tile], start[tile], begin[tile], end[tile]
    rows, columns = pl.ds(start, _BLOCK_M), pl.ds(pl.program_id(1) * _BLOCK_N, _BLOCK_N)
    row = jnp.arange(_BLOCK_M)[:, None]
    own_rows = (begin <= row) & (row < end)  # [block M, 1]
    own_columns = (pl.program_id(1) * _BLOCK_N + jnp.arange(_BLOCK_N) < width)[None]

    def stage(k, total):
        deep = pl.ds(k * _BLOCK_K, _BLOCK_K)
        own_deep = k * _BLOCK_K + jnp.arange(_BLOCK_K) < depth
        x = plgpu.load(x_ref.at[rows, deep], mask=own_rows & own_deep[None], other=0)
        at = (columns, deep) if transpose_weights else (deep, columns)
        own = own_deep[:, None] & own_columns
        w = plgpu.load(
            w_ref.at[layer, group, *at], mask=own.T if transpose_weights else own, other=0
        )
        return total + _dot(x, w, trans_b=transpose_weights)

    steps = jnp.where((group < num_groups) & (begin < end), jnp.int32(pl.cdiv(depth, _BLOCK_K)), 0)
    total = jnp.zeros((_BLOCK_M, _BLOCK_N), jnp.float32)
    total = jax.lax.fori_loop(jnp.int32(0), steps, stage, total)
    plgpu.store(out_ref.at[rows, columns], total.astype(out_ref.dtype), mask=own_rows & own_columns)


def _weight_gradient(rows, grad, group_sizes):
    shape = len(group_sizes), rows.shape[1], grad.shape[1]
    if len(rows) == 0:
        return varying_like(jnp.zeros(shape, rows.dtype), rows, grad, group_sizes)
    grid = shape[0], pl.cdiv(shape[1], _BLOCK_M), pl.cdiv(shape[2], _BLOCK_N)
    starts = group_starts(group_sizes)
    return _call(_gradient_kernel, shape, rows.dtype, grid, starts, rows, grad)


def _gradient_kernel(starts, x_ref, y_ref, out_ref):
    group = pl.program_id(0)
    begin, end = starts[group], starts[group + 1]
    at_m, at_n = pl.program_id(1) * _BLOCK_M, pl.program_id(2) * _BLOCK_N
    own_m = (at_m + jnp.arange(_BLOCK_M) < x_ref.shape[1])[None]
    own_n = (at_n + jnp.arange(_BLOCK_N) < y_ref.shape[1])[None]

    def stage(k, total):
        start = begin + k * _BLOCK_K
        rows = pl.ds(start, _BLOCK_K)
        own = (start + jnp.arange(_BLOCK_K) < end)[:, None]
        x = plgpu.load(x_ref.at[rows, pl.ds(at_m, _BLOCK_M)], mask=own & own_m, other=0)
        y = plgpu.load(y_ref.at[rows, pl.ds(at_n, _BLOCK_N)], mask=own & own_n, other=0)
        return total + _dot(x, y, trans_a=True)

    total = jnp.zeros((_BLOCK_M, _BLOCK_N), jnp.float32)
    total = jax.lax.fori_loop(jnp.int32(0), pl.cdiv(end - begin, _BLOCK_K), stage, total)
    at = group, pl.ds(at_m, _BLOCK_M), pl.ds(at_n, _BLOCK_N)
    plgpu.store(out_ref.at[at], total.astype(out_ref.dtype), mask=own_m.T & own_n)


def _dot(a, b, **transposed):
    # Highest: else float32 would be rounded to tf32.
    return plgpu.dot(a, b, precision=jax.lax.Precision.HIGHEST, **transposed).astype(jnp.float32)
