"""Fresh: a placement from load alone, the best of several ways to replicate.

Axes: W windows, L layers, E experts, S slots, P ranks, N = S / P slots of a rank.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jax_eplb.planner.balanced import refine_balanced
from jax_eplb.planner.changes import Limits
from jax_eplb.planner.choose import lowest_of
from jax_eplb.planner.effort import (
    Effort,
    finalists_for,
    pair_tries_for,
    rounds_for_balanced,
    rounds_for_windows,
    ways_for,
)
from jax_eplb.planner.pack import pack
from jax_eplb.planner.pairs import improve_pairs
from jax_eplb.planner.refine import refine
from jax_eplb.planner.replicate import replicate
from jax_eplb.planner.scenarios import draw_scenarios, enough_scenarios, power_mean
from jax_eplb.planner.score import even_heights
from jax_eplb.planner.windows import refine_windows
from jax_eplb.tables import max_replicas

# See `replicate`.
_WINDOWS_OFFSET = -0.3
_BALANCED_OFFSET = -0.5


class Room(NamedTuple):
    """What there is to fill."""

    num_slots: int
    num_ranks: int
    capacity: Float[Array, "P"] | None
    least: int  # replicas of every expert


def fresh_even(load: Float[Array, "L E"], room: Room, effort: Effort) -> Int[Array, "L S"]:
    """For one load under the even split."""
    spare = room.num_slots - room.least * load.shape[1]
    ways = ways_for(effort, len(load), room.num_slots)
    if room.num_slots <= 2 * room.num_ranks and (0.0, 0.0) not in ways:
        # With few slots a rank the largest replica rules, and offset 0 makes it smallest.
        ways = ((0.0, 0.0), *ways)
    offsets = jnp.array([offset for offset, _ in ways], jnp.float32)
    held_back = jnp.array([math.ceil(part * spare) for _, part in ways], jnp.int32)

    def improve(slots, max_rounds, replace):
        return refine(
            slots,
            load,
            num_ranks=room.num_ranks,
            max_rounds=max_rounds,
            replace=replace and room.least == 1,
            limits=Limits(room.capacity),
        )

    def pack_and_swap(count):
        return improve(_pack(load, count, room), effort.swap_rounds, replace=False)

    # In turn, so that a candidate's tables stay in the processor's cache.
    candidates = jax.lax.map(
        lambda way: pack_and_swap(_replicate(load, room, *way)), (offsets, held_back)
    )
    num_tries = pair_tries_for(effort, room.num_slots)
    if num_tries and room.num_slots == 2 * room.num_ranks and room.capacity is None:
        slots = pack_and_swap(_count_pairs(load, room, num_tries))
        candidates = jnp.concatenate([candidates, slots[None]])

    def height_of(slots):
        return even_heights(load, slots, room.num_ranks, room.capacity).max(axis=-1)

    if not effort.change_rounds:
        return lowest_of(candidates, jax.vmap(height_of)(candidates), 1)[0]
    number = min(finalists_for(effort, len(load), room.num_slots), len(candidates))
    finalists = lowest_of(candidates, jax.vmap(height_of)(candidates), number)
    finalists = jax.lax.map(
        lambda slots: improve(slots, effort.change_rounds, replace=True), finalists
    )
    return lowest_of(finalists, jax.vmap(height_of)(finalists), 1)[0]


def fresh_windows(windows: Float[Array, "W L E"], room: Room, effort: Effort) -> Int[Array, "L S"]:
    """For the mean over iterations of the fullest rank's load, under the even split."""
    number = enough_scenarios(len(windows), effort.scenarios)
    scenarios = draw_scenarios(windows, num_scenarios=number)
    mean = scenarios.mean(axis=0)

    def of_power(power):
        slots = _pack(mean, _replicate(power_mean(scenarios, power), room, _WINDOWS_OFFSET), room)
        slots = refine_windows(
            slots,
            scenarios,
            num_ranks=room.num_ranks,
            max_rounds=rounds_for_windows(effort, room.num_ranks),
            limits=Limits(room.capacity),
        )
        heights = even_heights(scenarios, slots, room.num_ranks, room.capacity)  # [W, L, P]
        return slots, heights.max(axis=-1).mean(axis=0)

    candidates, heights = jax.lax.map(of_power, jnp.array(effort.powers, jnp.float32))
    return lowest_of(candidates, heights, 1)[0]


def fresh_balanced(windows: Float[Array, "W L E"], room: Room, effort: Effort) -> Int[Array, "L S"]:
    """For the mean over iterations of the fullest rank's load, under the balanced split."""
    scenarios = draw_scenarios(windows, num_scenarios=enough_scenarios(len(windows)))
    mean = scenarios.mean(axis=0)
    return refine_balanced(
        _pack(mean, _replicate(mean, room, _BALANCED_OFFSET), room),
        scenarios,
        num_ranks=room.num_ranks,
        max_rounds=rounds_for_balanced(effort, windows.shape[1], room.num_slots, room.num_ranks),
        limits=Limits(room.capacity),
    )


def every_expert_everywhere(num_layers: int, num_experts: int, room: Room) -> Int[Array, "L S"]:
    """Ranks with room for all experts hold them all, and share every load equally."""
    rank = jnp.arange(room.num_slots // room.num_ranks, dtype=jnp.int32) % num_experts
    slots = jnp.tile(rank, (num_layers, room.num_ranks))
    if room.capacity is None:
        return slots
    return jnp.where(jnp.repeat(room.capacity > 0, len(rank))[None], slots, num_experts)


def _replicate(
    load: Float[Array, "L E"],
    room: Room,
    offset: Float[Array, ""] | float = 0.0,
    held_back: Int[Array, ""] | int = 0,
) -> Int[Array, "L E"]:
    live = None
    if room.capacity is not None:
        ranks = (room.capacity > 0).astype(jnp.int32).sum()
        live = ranks * (room.num_slots // room.num_ranks), ranks
    bound = max_replicas(load.shape[1], room.num_slots, room.num_ranks)
    return replicate(load, room.num_slots, bound, offset, held_back, live, room.least)


def _pack(load: Float[Array, "L E"], count: Int[Array, "L E"], room: Room) -> Int[Array, "L S"]:
    return pack(
        load, count, num_slots=room.num_slots, num_ranks=room.num_ranks, capacity=room.capacity
    )


def _count_pairs(load: Float[Array, "L E"], room: Room, num_tries: int) -> Int[Array, "L E"]:
    """Replica counts where each rank has two slots."""
    return improve_pairs(
        load,
        _replicate(load, room),
        num_slots=room.num_slots,
        max_replicas=max_replicas(load.shape[1], room.num_slots, room.num_ranks),
        num_tries=num_tries,
        least=room.least,
    )
