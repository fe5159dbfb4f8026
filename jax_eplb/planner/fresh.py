"""Fresh: a placement from load alone; the best of several ways to replicate, each packed and refined.

Axes: W windows, L layers, E experts, S slots, P ranks, N = S / P slots of a rank.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jax_eplb.placement import max_replicas
from jax_eplb.planner.balanced import refine_balanced
from jax_eplb.planner.changes import Limits
from jax_eplb.planner.effort import Effort
from jax_eplb.planner.pack import pack
from jax_eplb.planner.pairs import improve_pairs
from jax_eplb.planner.refine import refine
from jax_eplb.planner.replicate import replicate
from jax_eplb.planner.scenarios import draw_scenarios, enough_scenarios, power_mean
from jax_eplb.planner.score import even_heights
from jax_eplb.planner.windows import refine_windows


def fresh_even(
    load: Float[Array, "L E"],
    *,
    num_slots: int,
    num_ranks: int,
    effort: Effort,
    capacity: Float[Array, "P"] | None = None,
    least: int = 1,
) -> Int[Array, "L S"]:
    """For one load under the even split."""
    num_experts = load.shape[1]
    bound = max_replicas(num_experts, num_slots, num_ranks)
    live = _live(capacity, num_slots, num_ranks)
    limits = Limits(capacity)
    pairs = num_slots <= 2 * num_ranks
    # Where a rank has but two slots the largest replica rules, and offset 0 makes it smallest.
    ways = ((0.0, 0.0),) if pairs else effort.ways
    offsets = jnp.array([offset for offset, _ in ways], jnp.float32)
    held_back = [math.ceil(part * (num_slots - least * num_experts)) for _, part in ways]

    def candidate(way):
        count = replicate(load, num_slots, bound, *way, live=live, least=least)
        if pairs and capacity is None and num_slots == 2 * num_ranks:
            tries = max(1, min(effort.pair_tries, effort.pair_tries * 320 // num_slots))
            count = improve_pairs(
                load, count, num_slots=num_slots, max_replicas=bound, num_tries=tries, least=least
            )
        slots = pack(load, count, num_slots=num_slots, num_ranks=num_ranks, capacity=capacity)
        if effort.swap_rounds:
            slots = refine(
                slots, load, num_ranks=num_ranks, max_rounds=effort.swap_rounds, limits=limits
            )
        return slots if effort.swap_rounds else change(slots)

    def change(slots):
        return refine(
            slots,
            load,
            num_ranks=num_ranks,
            max_rounds=effort.change_rounds,
            replace=least == 1,
            limits=limits,
        )

    # In turn, so that a candidate's tables stay in the processor's cache.
    candidates = jax.lax.map(candidate, (offsets, jnp.array(held_back, jnp.int32)))
    heights = jax.vmap(lambda slots: even_heights(load, slots, num_ranks, capacity))(candidates)
    slots = _best_of(candidates, heights.max(axis=-1))
    return change(slots) if effort.swap_rounds and effort.change_rounds else slots


def fresh_windows(
    windows: Float[Array, "W L E"],
    *,
    num_slots: int,
    num_ranks: int,
    effort: Effort,
    capacity: Float[Array, "P"] | None = None,
    least: int = 1,
) -> Int[Array, "L S"]:
    """For the mean over iterations of the fullest rank's load, under the even split."""
    scenarios = draw_scenarios(windows, num_scenarios=enough_scenarios(len(windows)))
    bound = max_replicas(windows.shape[2], num_slots, num_ranks)
    live = _live(capacity, num_slots, num_ranks)
    mean = scenarios.mean(axis=0)

    def candidate(power):
        count = replicate(power_mean(scenarios, power), num_slots, bound, live=live, least=least)
        slots = pack(mean, count, num_slots=num_slots, num_ranks=num_ranks, capacity=capacity)
        slots = refine_windows(
            slots,
            scenarios,
            num_ranks=num_ranks,
            max_rounds=effort.window_rounds,
            limits=Limits(capacity),
        )
        heights = even_heights(scenarios, slots, num_ranks, capacity)  # [W, L, P]
        return slots, heights.max(axis=-1).mean(axis=0)

    candidates, heights = jax.lax.map(candidate, jnp.array(effort.powers, jnp.float32))
    return _best_of(candidates, heights)


def fresh_balanced(
    windows: Float[Array, "W L E"],
    *,
    num_slots: int,
    num_ranks: int,
    effort: Effort,
    capacity: Float[Array, "P"] | None = None,
    least: int = 1,
) -> Int[Array, "L S"]:
    """For the mean over iterations of the fullest rank's load, under the balanced split."""
    scenarios = draw_scenarios(windows, num_scenarios=enough_scenarios(len(windows)), noise=0.15)
    bound = max_replicas(windows.shape[2], num_slots, num_ranks)
    live = _live(capacity, num_slots, num_ranks)
    mean = scenarios.mean(axis=0)
    count = replicate(mean, num_slots, bound, -0.5, live=live, least=least)
    slots = pack(mean, count, num_slots=num_slots, num_ranks=num_ranks, capacity=capacity)
    return refine_balanced(
        slots,
        scenarios,
        num_ranks=num_ranks,
        max_rounds=effort.balanced_rounds,
        limits=Limits(capacity),
    )


def every_expert_everywhere(
    num_layers: int,
    num_experts: int,
    num_slots: int,
    num_ranks: int,
    capacity: Float[Array, "P"] | None,
) -> Int[Array, "L S"]:
    """Ranks with room for all experts hold them all, and share every load equally."""
    rank = jnp.arange(num_slots // num_ranks, dtype=jnp.int32) % num_experts
    slots = jnp.tile(rank, (num_layers, num_ranks))
    if capacity is None:
        return slots
    return jnp.where(jnp.repeat(capacity > 0, len(rank))[None], slots, num_experts)


def _live(capacity: Float[Array, "P"] | None, num_slots: int, num_ranks: int):
    """Slots that can hold something, and the ranks they are on; None if all can."""
    if capacity is None:
        return None
    ranks = (capacity > 0).astype(jnp.int32).sum()
    return ranks * (num_slots // num_ranks), ranks


def _best_of(
    candidates: Int[Array, "candidates L S"], heights: Float[Array, "candidates L"]
) -> Int[Array, "L S"]:
    best = heights.argmin(axis=0)
    return jnp.take_along_axis(candidates, best[None, :, None], axis=0)[0]
