"""The rows of one slot in all banks, laid side by side, so that a move is one copy, not one a bank.

Arrays of one type that are spread over the same axes of the mesh share a pack.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_eplb.moving.banks import Spread


def members(banks: Sequence[Any], spread: Spread) -> dict[tuple[Any, tuple[str, ...]], list[int]]:
    """Which banks share a pack, by carrier and axes."""
    found: dict[tuple[Any, tuple[str, ...]], list[int]] = {}
    for index, (bank, inner) in enumerate(zip(banks, spread.inner, strict=True)):
        names = [n if isinstance(n, tuple) else (n,) for n in inner if n is not None]
        used = {name for several in names for name in several}
        axes = tuple(name for name in spread.mesh.axis_names if name in used)
        found.setdefault((carrier(bank.dtype), axes), []).append(index)
    return found


def carrier(dtype) -> Any:
    """The type that numbers of `dtype` travel in, as bits: so all of one size can go together.

    Bits also keep what a CPU would change by computing with wider numbers, such as a NaN's.

    >>> carrier(jnp.bfloat16)
    dtype('uint16')
    """
    dtype = jnp.dtype(dtype)
    plain = jnp.issubdtype(dtype, jnp.number) and not jnp.issubdtype(dtype, jnp.complexfloating)
    if plain and jax.dtypes.itemsize_bits(dtype) in (8, 16, 32):
        return jnp.dtype(f"uint{8 * dtype.itemsize}")
    return dtype


def specs(banks: Sequence[Any], spread: Spread) -> list[Any]:
    """How packs [P, width] are spread: a row of each rank, in the parts that its devices hold."""
    return [P(spread.axis_name, axes or None) for _, axes in members(banks, spread)]


def widths(banks: Sequence[Any], spread: Spread) -> list[tuple[int, Any]]:
    """(width, type) of packs [P, width]."""
    outer = 2 if spread.stacked else 1
    return [
        (sum(math.prod(banks[index].shape[outer:]) for index in indexes), dtype)
        for (dtype, _), indexes in members(banks, spread).items()
    ]


@functools.cache
def gather(mesh: Mesh, given: tuple[P, ...]) -> Callable[[Sequence[jax.Array]], list[jax.Array]]:
    """A program that brings packs of these specs to every rank: all P rows, in the same parts."""
    shardings = [NamedSharding(mesh, P(None, *spec[1:])) for spec in given]
    return jax.jit(lambda packed: [*packed], out_shardings=shardings)


def pack(rows: Sequence[jax.Array], banks: Sequence[jax.Array], spread: Spread) -> list[jax.Array]:
    """This device's part of a slot in each bank, as packs [1, width]."""
    return [
        jnp.concatenate([_as(rows[index], dtype).reshape(1, -1) for index in indexes], axis=1)
        for (dtype, _), indexes in members(banks, spread).items()
    ]


def unpack(
    packs: Sequence[jax.Array], banks: Sequence[jax.Array], spread: Spread
) -> list[jax.Array]:
    """The inverse of `pack`: of banks [(L,) N, …] the rows […]."""
    rows: dict[int, jax.Array] = {}
    outer = 2 if spread.stacked else 1
    for packed, indexes in zip(packs, members(banks, spread).values(), strict=True):
        start = 0
        for index in indexes:
            shape = banks[index].shape[outer:]
            size = math.prod(shape)
            part = packed[0, start : start + size].reshape(shape)
            rows[index] = _as(part, banks[index].dtype)
            start += size
    return [rows[index] for index in range(len(banks))]


def _as(x: jax.Array, dtype) -> jax.Array:
    return x if x.dtype == dtype else jax.lax.bitcast_convert_type(x, dtype)
