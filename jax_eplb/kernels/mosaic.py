"""The grouped product and its gradients on Hopper GPUs.

Axes: M rows sorted by group, L layers, G groups, D in, N columns of the weights, F out (N, or N / 2
where a gated activation joins gate and up).
"""

import functools

import jax
import jax.numpy as jnp

from jax_eplb.kernels.activation import activation_named
from jax_eplb.kernels.mosaic_tiles import Tiles
from jax_eplb.kernels.stack import stack_gradient
from jax_eplb.kernels.tile_table import STEP

# Pairs take 5 to 9 percent off the time of large products. Where a group has fewer rows
# than a tile of 128, there is nothing to share, and tiles of 64 leave more of the shared memory's
# bandwidth to the weights. Measured on an H100.
_TALL, _SHORT = Tiles(block_m=128, pair=True), Tiles(block_m=64)


def mosaic(rows, weights, group_sizes, layer, activation: str | None = None):
    """One persistent kernel; a named activation is applied in it, to float32 sums."""
    if (missing := unsupported(rows, weights, activation)) is not None:
        raise ValueError(f"grouped_matmul implementation 'mosaic' needs {missing}")
    if activation is None:
        return _product(rows, weights, group_sizes, layer)
    return _activated(rows, weights, group_sizes, layer, activation)


def unsupported(rows, weights, activation: str | None = None) -> str | None:
    """What the kernel needs and these arrays lack, or None.

    >>> unsupported(jnp.zeros((8, 64), jnp.bfloat16), jnp.zeros((2, 64, 100), jnp.bfloat16))
    'both widths of the weights to be multiples of 64, not 64 and 100'
    """
    if rows.dtype != jnp.bfloat16 or weights.dtype != jnp.bfloat16:
        return f"rows and weights in bfloat16, not {rows.dtype} and {weights.dtype}"
    if not rows.size or not weights.size:
        return f"at least one row and one group, not {rows.shape} and {weights.shape}"
    gated = activation is not None and activation_named(activation).gated
    *_, depth, width = weights.shape
    width = width // 2 if gated else width
    if depth % STEP or width % STEP:
        halves = " (each half of the second)" if gated else ""
        return f"both widths of the weights to be multiples of 64{halves}, not {depth} and {width}"
    return None


def _multiply(rows, weights, group_sizes, layer, activation: str | None = None, **options):
    # Imported where needed: JAX for Windows comes without it.
    from jax_eplb.kernels.mosaic_kernel import mosaic_product

    num_blocks = _multiprocessors()
    if activation is not None:
        named = activation_named(activation)
        options |= {"activation": named.function, "gated": named.gated}
    tiles = _TALL if len(rows) >= _TALL.block_m * len(group_sizes) else _SHORT
    return mosaic_product(
        rows, weights, group_sizes, layer, tiles, num_blocks=num_blocks, **options
    )


def _multiprocessors() -> int:
    """Of the GPU, and of an H100 where the program is only lowered."""
    return getattr(jax.devices()[0], "core_count", None) or 132


@jax.custom_vjp
def _product(rows, weights, group_sizes, layer):
    return _multiply(rows, weights, group_sizes, layer)


def _product_forward(*operands):
    return _product(*operands), operands


def _product_backward(operands, grad):
    from jax_eplb.kernels.mosaic_gradient import mosaic_weight_gradient

    rows, weights, group_sizes, layer = operands
    grad_rows = _multiply(grad, weights, group_sizes, layer, transpose_weights=True)
    grad_weights = mosaic_weight_gradient(rows, grad, group_sizes, num_blocks=_multiprocessors())
    return grad_rows, stack_gradient(grad_weights, weights, layer), None, None


_product.defvjp(_product_forward, _product_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _activated(rows, weights, group_sizes, layer, activation):
    return _multiply(rows, weights, group_sizes, layer, activation)


def _activated_forward(rows, weights, group_sizes, layer, activation):
    # The gradient needs what enters the activation, so here it is written out.
    def composed(rows, weights):
        return activation_named(activation)(_product(rows, weights, group_sizes, layer))

    return jax.vjp(composed, rows, weights)


def _activated_backward(activation, transpose, grad):
    return *transpose(grad), None, None


_activated.defvjp(_activated_forward, _activated_backward)
