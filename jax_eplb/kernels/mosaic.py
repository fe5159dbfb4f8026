"""The grouped product and its gradients on Hopper GPUs.

Axes: M rows sorted by group, L layers, G groups, D in, N columns of the weights, F out (N, or N / 2
where a gated activation joins gate and up).
"""

import functools
import math

import jax
import jax.numpy as jnp

from jax_eplb.kernels.activation import activation_named
from jax_eplb.kernels.mosaic_tiles import Tiles
from jax_eplb.kernels.stack import stack_gradient
from jax_eplb.kernels.tile_table import STEP

# Where a group's weights are large, pairs take 3 to 9 percent off the time of a product; small ones
# come from the cache, and sharing them costs 1 to 3 percent. Where a group has fewer rows than a
# tile of 128, tiles of 64 leave more of the shared memory's bandwidth to the weights. Measured on
# an H100.
_TALL, _SHORT = Tiles(block_m=128), Tiles(block_m=64)
_LARGE, _TALL_PAIR = 1 << 23, Tiles(block_m=128, pair=True)  # more than so many weights of a group
# Read the rows more often, but more evenly sized rounds can be worth it: a fifth of the time of
# 2,048 rows in 9 groups, 7168 -> 2048.
_NARROW = Tiles(block_m=128, block_n=192, pair=True)


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
    depth, width = weights.shape[:1:-1] if options.get("transpose_weights") else weights.shape[2:]
    sizes = len(rows), len(group_sizes), depth, width
    tiles = _tiles(*sizes, options.get("gated", False), num_blocks)
    return mosaic_product(
        rows, weights, group_sizes, layer, tiles, num_blocks=num_blocks, **options
    )


def _tiles(
    num_rows: int, num_groups: int, depth: int, width: int, gated: bool, num_blocks: int
) -> Tiles:
    """For products of this size on so many multiprocessors."""
    if num_rows < _TALL.block_m * num_groups:
        return _SHORT

    def columns_of_a_block(tiles: Tiles) -> int:
        # A group's last tile of rows is half empty, in the mean.
        rows_of_tiles = num_rows / tiles.block_m + num_groups / 2
        return tiles.block_n * math.ceil(rows_of_tiles * -(-width // tiles.block_n) / num_blocks)

    tall = _TALL_PAIR if depth * width > _LARGE else _TALL
    # Half of 192 columns, of gate and of up each, would be no multiple of 64.
    saves = not gated and columns_of_a_block(_NARROW) < 0.9 * columns_of_a_block(tall)
    return _NARROW if saves else tall


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
