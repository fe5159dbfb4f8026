"""Refine: small changes that make the fullest rank emptier, under the even split.

Axes: L layers, E experts, S slots, P ranks, N = S / P slots of a rank. Within the loop the layers
are the last axis, for the reason that `replicate` gives.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jax_eplb.planner.best_change import best_change
from jax_eplb.planner.changes import (
    NO_LIMITS,
    Away,
    Limits,
    Moves,
    Slots,
    apply_change,
)
from jax_eplb.split import count_replicas, slowness_of

# A change must make the fullest rank emptier by more than float32 rounding could feign.
LEAST_GAIN = 1e-6


class _Search(NamedTuple):
    rounds: Int[Array, ""]
    improving: Bool[Array, ""]  # whether the last round helped any layer
    slots: Slots


@functools.partial(jax.jit, static_argnames=("num_ranks", "replace", "num_nodes", "spread"))
def refine(
    slot_to_expert: Int[Array, "L S"],
    load: Float[Array, "L E"],
    *,
    num_ranks: int,
    max_rounds: int | Int[Array, ""],
    replace: bool = False,
    limits: Limits = NO_LIMITS,
    num_nodes: int = 1,
    spread: bool = False,
    least_gain: float | Float[Array, ""] = LEAST_GAIN,
) -> Int[Array, "L S"]:
    """Change the fullest rank and another, at most `max_rounds` times a layer.

    A change swaps a slot of the fullest rank with one of another rank or, with `replace`, gives one
    slot of an expert with several replicas to another expert: a slot of the fullest rank to the
    emptiest expert, or a slot elsewhere to an expert of the fullest rank. Each is the one, of all,
    that leaves the ranks that it touches emptiest; a layer is done when none lowers the fullest
    rank by more than the part `least_gain`. The fullest rank never gets fuller, no rank gets a
    second replica of an expert, no expert loses its last. With `spread`, no swap leaves all of an
    expert's replicas on one of the nodes.

    >>> load = jnp.array([[5.0, 4, 3, 2]])
    >>> refine(jnp.array([[0, 1, 2, 3]]), load, num_ranks=2, max_rounds=8).tolist()
    [[2, 1, 0, 3]]
    """
    num_layers, num_slots = slot_to_expert.shape
    shape = (num_ranks, num_slots // num_ranks, num_layers)
    load = load.astype(jnp.float32)
    count = count_replicas(slot_to_expert, load.shape[1]).astype(jnp.float32)
    share = load / jnp.maximum(count, 1.0)
    weights = jnp.take_along_axis(share, slot_to_expert, axis=1, mode="fill", fill_value=0.0)
    slots = Slots(slot_to_expert.T.reshape(shape), weights.T.reshape(shape), count.T)
    previous = None if limits.previous is None else limits.previous.T.reshape(shape)
    slowness = slowness_of(limits.capacity, num_ranks)
    ids = jnp.arange(num_ranks, dtype=jnp.int32)[:, None]
    load = load.T
    layers = jnp.arange(num_layers)[None, None]
    home = None if limits.home is None else limits.home.T

    def change_once(search: _Search) -> _Search:
        slots = search.slots
        height = slots.weights.sum(axis=1) * slowness  # [P, L]
        top = height.max(axis=0)
        fullest = jnp.where(height == top[None], ids, num_ranks).min(axis=0)
        moves = away = None
        if previous is not None and limits.max_moves is not None:
            moved = (slots.experts != previous).astype(jnp.int32).sum(axis=(0, 1))
            moves = Moves(previous, limits.max_moves - moved)
        if home is not None and limits.cross_node_weight is not None:
            of_slots = home.at[slots.experts, layers].get(mode="fill", fill_value=-1)
            node = ids // (num_ranks // num_nodes)
            away = Away(of_slots, node, limits.cross_node_weight / num_ranks)
        change = best_change(
            slots,
            load,
            slowness,
            height,
            fullest,
            replace=replace,
            moves=moves,
            away=away,
            spread_nodes=num_nodes if spread else 1,
        )
        helps = change.after < top * (1 - least_gain)
        slots = apply_change(slots, load, change, fullest, helps, replace=replace)
        return _Search(search.rounds + 1, helps.any(), slots)

    search = jax.lax.while_loop(
        lambda search: search.improving & (search.rounds < max_rounds),
        change_once,
        _Search(jnp.int32(0), jnp.bool_(True), slots),
    )
    return search.slots.experts.reshape(num_slots, num_layers).T
