"""Rows by index: the gather that brings tokens into the order of their experts.

Axes: T rows to choose from, M rows chosen, D their width.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Int, Num

from jax_eplb.kernels.varying import equally_varying, varying_like

_ROWS, _COLUMNS = 8, 512  # that one program copies


@jax.custom_vjp
def take_rows(rows: Num[Array, "T D"], index: Int[Array, "M"]) -> Num[Array, "M D"]:
    """`rows[index]`, index within bounds; by a kernel of our own on NVIDIA GPUs.

    >>> take_rows(jnp.array([[1, 2], [3, 4]]), jnp.array([1, 1, 0])).tolist()
    [[3, 4], [3, 4], [1, 2]]
    """

    def plain(rows, index):
        return rows.at[index].get(mode="promise_in_bounds")

    if jax.default_backend() != "gpu" or rows.ndim != 2 or not rows.size or not index.size:
        return plain(rows, index)
    return jax.lax.platform_dependent(rows, index, cuda=take_rows_by_kernel, default=plain)


def _forward(rows, index):
    return take_rows(rows, index), (rows, index)


def _backward(residuals, grad):
    rows, index = residuals
    return varying_like(jnp.zeros_like(rows), grad).at[index].add(grad), None


take_rows.defvjp(_forward, _backward)


def take_rows_by_kernel(rows, index, *, interpret: bool = False):
    """One program for 8 rows and 512 columns; 1.5 to 1.8 times as fast as XLA on an H100."""
    rows, index = equally_varying((rows, index))
    num_rows, width = len(index), rows.shape[1]

    def kernel(rows_ref, index_ref, out_ref):
        at = pl.ds(pl.program_id(0) * _ROWS, _ROWS)
        row = pl.program_id(0) * _ROWS + jnp.arange(_ROWS)
        column = pl.program_id(1) * _COLUMNS + jnp.arange(_COLUMNS)
        source = plgpu.load(index_ref.at[at], mask=row < num_rows, other=0)
        own = (row < num_rows)[:, None] & (column < width)[None]
        values = plgpu.load(rows_ref.at[source[:, None], column[None]], mask=own, other=0)
        columns = pl.ds(pl.program_id(1) * _COLUMNS, _COLUMNS)
        plgpu.store(out_ref.at[at, columns], values, mask=own)

    varying = jax.typeof(rows).manual_axis_type
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((num_rows, width), rows.dtype, manual_axis_type=varying),
        grid=(pl.cdiv(num_rows, _ROWS), pl.cdiv(width, _COLUMNS)),
        compiler_params=plgpu.CompilerParams(num_warps=4),
        interpret=interpret,
    )(rows, index.astype(jnp.int32))
