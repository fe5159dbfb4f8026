"""A stable sort of small numbers by counting, made of few and short launches on a GPU.

Axes: I items, N values that they may have, B blocks of C items.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jax_eplb.kernels.varying import varying_like

_BLOCK = 256


class Sorted(NamedTuple):
    """A stable sort; items whose value is N or more come last."""

    order: Int[Array, "I"]  # the item at each place
    place: Int[Array, "I"]  # the place of each item
    counts: Int[Array, "N"]  # items of each value


def counting_sort(values: Int[Array, "I"], num_values: int) -> Sorted:
    """Sort items by values of 0 to `num_values`, the last for those that are not counted.

    On GPUs and TPUs by comparing each item with those of its block, on CPUs by `argsort`.

    >>> counting_sort(jnp.array([2, 0, 3, 2]), 3)._asdict()  # doctest: +NORMALIZE_WHITESPACE
    {'order': Array([1, 0, 3, 2], dtype=int32), 'place': Array([1, 0, 3, 2], dtype=int32),
     'counts': Array([1, 0, 2], dtype=int32)}
    """

    def varying(sort):
        # A sort's second result counts as the same on all devices, whatever it was sorted by.
        return lambda values: Sorted(*(varying_like(x, values) for x in sort(values, num_values)))

    values = jnp.minimum(values, num_values).astype(jnp.int32)
    return jax.lax.platform_dependent(
        values, cpu=varying(_by_argsort), default=varying(by_counting)
    )


def _by_argsort(values, num_values: int) -> Sorted:
    order = jnp.argsort(values, stable=True).astype(jnp.int32)
    counts = jnp.zeros(num_values, jnp.int32).at[values].add(1, mode="drop")
    return Sorted(order, _inverse(order), counts)


def by_counting(values: Int[Array, "I"], num_values: int) -> Sorted:
    """An item's place: smaller items, then equal ones of earlier blocks, then of its own."""
    num_items = len(values)
    blocks = -(-num_items // _BLOCK)
    # What fills the last block up comes after everything.
    padded = jnp.pad(values, (0, blocks * _BLOCK - num_items), constant_values=num_values + 1)
    padded = padded.reshape(blocks, _BLOCK)
    value = jnp.arange(num_values + 1, dtype=jnp.int32)
    of_block = (padded[:, :, None] == value[None, None]).sum(1, dtype=jnp.int32)  # [B, N+1]
    index = jnp.arange(_BLOCK)
    earlier = (index[None, :] < index[:, None])[None]  # [1, C, C]
    same = (padded[:, :, None] == padded[:, None, :]) & earlier
    rank = same.sum(2, dtype=jnp.int32)  # [B, C]

    block = jnp.arange(blocks)
    before = (block[None, :] < block[:, None])[:, :, None]  # [B, B, 1]
    above = jnp.where(before, of_block[None], 0).sum(1)  # [B, N+1]
    counts = of_block.sum(0)
    smaller = jnp.where(value[None, :] < value[:, None], counts[None], 0).sum(1)  # [N+1]
    base = (above + smaller[None])[block[:, None], jnp.minimum(padded, num_values)]
    place = (base + rank).reshape(-1)[:num_items]
    return Sorted(_inverse(place), place, counts[:num_values])


def _inverse(permutation: Int[Array, "I"]) -> Int[Array, "I"]:
    index = jnp.arange(len(permutation), dtype=jnp.int32)
    return jnp.zeros_like(index).at[permutation].set(index, unique_indices=True)
