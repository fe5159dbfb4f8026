"""Refine: swaps between ranks that make the fullest rank emptier.

Axes: L layers, E experts, S slots, P ranks, N = S / P slots of a rank. Within the loop the layers
are the last axis, for the reason that `replicate` gives.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# A swap must make the fullest rank emptier by more than float32 rounding could feign.
_LEAST_GAIN = 1e-6


class _Search(NamedTuple):
    swaps: Int[Array, ""]  # tried so far
    improving: Bool[Array, ""]  # whether the last round helped any layer
    experts: Int[Array, "P N L"]
    weights: Float[Array, "P N L"]  # tokens of each slot


@functools.partial(jax.jit, static_argnames=("num_ranks", "max_swaps"))
def refine(
    slot_to_expert: Int[Array, "L S"],
    share: Float[Array, "L E"],
    *,
    num_ranks: int,
    max_swaps: int,
) -> Int[Array, "L S"]:
    """Swap a slot of the fullest rank with a slot of another, at most `max_swaps` times a layer.

    `share` holds the tokens of one replica of each expert. Each swap is the one, of all N·S, that
    leaves the fuller of the two ranks emptiest; a layer is done when none helps. The fullest rank
    never gets fuller, and no rank gets a second replica of an expert.

    >>> share = jnp.array([[5.0, 4, 3, 2]])
    >>> refine(jnp.array([[0, 1, 2, 3]]), share, num_ranks=2, max_swaps=8).tolist()
    [[2, 1, 0, 3]]
    """
    num_layers, num_slots = slot_to_expert.shape
    shape = (num_ranks, num_slots // num_ranks, num_layers)
    weights = jnp.take_along_axis(share, slot_to_expert, axis=1)
    start = _Search(
        jnp.int32(0),
        jnp.bool_(True),
        slot_to_expert.T.reshape(shape),
        weights.astype(jnp.float32).T.reshape(shape),
    )
    search = jax.lax.while_loop(
        lambda search: search.improving & (search.swaps < max_swaps), _swap_once, start
    )
    return search.experts.reshape(num_slots, num_layers).T


def _swap_once(search: _Search) -> _Search:
    """The best swap of the fullest rank in every layer, where there is one that helps."""
    num_ranks, per_rank, num_layers = search.experts.shape
    height = search.weights.sum(axis=1)  # [P, L]
    top = height.max(axis=0, keepdims=True)
    ids = jnp.arange(num_ranks, dtype=jnp.int32)[:, None]
    fullest = jnp.where(height == top, ids, num_ranks).min(axis=0)  # [L]
    after, here, there = _best_swap(search, height, fullest)
    helps = after < top[0] * (1 - _LEAST_GAIN)
    here = fullest * per_rank + here
    there = jnp.where(helps, there, here)  # a slot swapped with itself stays
    layers = jnp.arange(num_layers)

    def swap(table):
        flat = table.reshape(-1, num_layers)
        mine, theirs = flat[here, layers], flat[there, layers]
        flat = flat.at[here, layers].set(theirs).at[there, layers].set(mine)
        return flat.reshape(table.shape)

    return _Search(search.swaps + 1, helps.any(), swap(search.experts), swap(search.weights))


def _best_swap(
    search: _Search, height: Float[Array, "P L"], fullest: Int[Array, "L"]
) -> tuple[Float[Array, "L"], Int[Array, "L"], Int[Array, "L"]]:
    """Height of the fuller rank after the best swap, its place on the fullest rank, its partner.

    Goes through the N places of the fullest rank in turn: memory stays at S numbers a layer.
    """
    num_ranks, per_rank, num_layers = search.experts.shape
    own = jnp.take_along_axis(search.experts, fullest[None, None], axis=0)[0]  # [N, L]
    own_weights = jnp.take_along_axis(search.weights, fullest[None, None], axis=0)[0]
    top = height.max(axis=0)[None, None]
    slots = jnp.arange(num_ranks * per_rank, dtype=jnp.int32).reshape(num_ranks, per_rank, 1)

    def hold(i, held):
        return held | (search.experts == own[i][None, None])

    held = jax.lax.fori_loop(0, per_rank, hold, jnp.zeros(search.experts.shape, bool))
    barred = jnp.where(held, jnp.inf, 0.0)  # the fullest rank has this expert already

    def consider(i, best):
        after, here, there = best
        has_own = (search.experts == own[i][None, None]).any(axis=1)  # [P, L]
        other = jnp.where(has_own, jnp.inf, height)[:, None]  # [P, 1, L]
        gain = own_weights[i][None, None] - search.weights  # of the other rank
        height_after = jnp.maximum(top - gain, other + gain) + barred
        lowest = height_after.min(axis=(0, 1))
        at_lowest = height_after == lowest[None, None]
        partner = jnp.where(at_lowest, slots, slots.size).min(axis=(0, 1))
        better = lowest < after
        return (
            jnp.where(better, lowest, after),
            jnp.where(better, i, here),
            jnp.where(better, partner, there),
        )

    nowhere = jnp.zeros(num_layers, jnp.int32)
    start = (jnp.full(num_layers, jnp.inf), nowhere, nowhere)
    return jax.lax.fori_loop(0, per_rank, consider, start)
