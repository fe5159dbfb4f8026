"""Replay: the imbalance that policies would have had, window by window; pure and jitted.

Axes: A policies side by side, W windows, L layers, E experts, S slots, P ranks.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jax_eplb import metrics
from jax_eplb.planner import plan
from jax_eplb.simulate.policy import Policy
from jax_eplb.split import balanced_split, even_split, sum_by_rank

# Of `balanced_split`: half of what the layer takes leave a few thousandths at most, and many
# windows are to be scored.
_STEPS = 20


class Sizes(NamedTuple):
    """What is static in a replay; another value of any compiles anew."""

    num_slots: int
    num_ranks: int
    split: str  # how the planner takes an expert's tokens to be divided: "even" or "balanced"
    effort: str


class Settings(NamedTuple):
    """The policies, as traced numbers."""

    interval: Int[Array, "A"]  # beyond the last window: no second plan
    decay: Float[Array, "A"]
    max_moves: Int[Array, "A"]
    threshold: Float[Array, "A"]
    foresight: Bool[Array, "A"]


class Followed(NamedTuple):
    """The placements that policies had in force."""

    tables: Int[Array, "A W L S"]
    moves: Int[Array, "A W L"]  # slots that changed before the window
    received: Int[Array, "A W"]  # the most experts that one rank was sent for it, all layers


class _Carry(NamedTuple):
    table: Int[Array, "A L S"]  # in force
    load: Float[Array, "A L E"]  # fading
    imbalance: Float[Array, "A"]  # of the window before


def settings_of(policies: list[Policy], num_windows: int, num_slots: int) -> Settings:
    """The numbers of some policies."""
    never = num_windows + 1
    intervals = [never if p.interval is None else p.interval for p in policies]
    moves = [num_slots if p.max_moves is None else p.max_moves for p in policies]
    return Settings(
        jnp.array(intervals, jnp.int32),
        jnp.array([policy.decay for policy in policies], jnp.float32),
        jnp.array([min(limit, num_slots) for limit in moves], jnp.int32),
        jnp.array([policy.threshold for policy in policies], jnp.float32),
        jnp.array([policy.foresight for policy in policies]),
    )


def imbalance_of(
    load: Float[Array, "*windows L E"],
    slot_to_expert: Int[Array, "L S"],
    num_ranks: int,
    split: str,
) -> Float[Array, "*windows L"]:
    """(max - mean) / mean of the ranks' tokens, divided among replicas as `split` says."""
    num_experts = load.shape[-1]
    if split == "balanced":
        tokens = balanced_split(load, slot_to_expert, num_experts, num_ranks, num_steps=_STEPS)
    else:
        tokens = even_split(load, slot_to_expert, num_experts)
    return metrics.imbalance(sum_by_rank(tokens, num_ranks))


@functools.partial(jax.jit, static_argnames=("num_ranks", "split"))
def score(
    counts: Float[Array, "W L E"], tables: Int[Array, "A W L S"], *, num_ranks: int, split: str
) -> Float[Array, "A W L"]:
    """The imbalance in each window of the placements in force there."""

    def score_window(window):
        now, tables = window
        return jax.vmap(lambda table: imbalance_of(now, table, num_ranks, split))(tables)

    found = jax.lax.map(score_window, (counts, jnp.swapaxes(tables, 0, 1)))
    return jnp.swapaxes(found, 0, 1)


def stay(first: Int[Array, "A L S"], num_windows: int) -> Followed:
    """`follow` of policies that never plan again, for which nothing need be compiled."""
    num_policies, num_layers, num_slots = first.shape
    shape = (num_policies, num_windows, num_layers)
    tables = jnp.broadcast_to(first[:, None], (*shape, num_slots))
    return Followed(tables, jnp.zeros(shape, jnp.int32), jnp.zeros(shape[:2], jnp.int32))


@functools.partial(jax.jit, static_argnames="sizes")
def follow(
    counts: Float[Array, "W L E"],
    history: Int[Array, ""],
    first: Int[Array, "A L S"],
    settings: Settings,
    sizes: Sizes,
) -> Followed:
    """Policies side by side, each from its placement of window `history`.

    A policy's next plan comes `interval` windows after `history`, then again, where the window
    before had more imbalance than its threshold. The planner is that of `plan`, from the placement
    in force, for the fading sum of the windows before: `load <- decay * load + counts`.
    """
    num_policies, num_layers = len(settings.interval), counts.shape[1]

    def plan_one(load, table, limit):
        found = plan(
            load,
            sizes.num_slots,
            sizes.num_ranks,
            previous=table,
            max_moves=jnp.broadcast_to(limit, (num_layers,)),
            split=sizes.split,
            effort=sizes.effort,
        )
        return found.placement.slot_to_expert

    def play(carry: _Carry, window):
        turn, now = window
        since = turn - history
        due = (since > 0) & (since % settings.interval == 0)
        due = due & ((carry.imbalance > settings.threshold) | settings.foresight)
        known = jnp.where(settings.foresight[:, None, None], now[None], carry.load)
        limits = jnp.where(due, settings.max_moves, 0)
        planned = jax.lax.cond(
            due.any(),
            lambda: jax.vmap(plan_one)(known, carry.table, limits),
            lambda: carry.table,
        )
        table = jnp.where(due[:, None, None], planned, carry.table)
        moved = (table != carry.table).astype(jnp.int32)
        by_rank = moved.reshape(num_policies, num_layers, sizes.num_ranks, -1)
        received = by_rank.sum(axis=(1, 3)).max(axis=1)
        each = jax.vmap(lambda slots: imbalance_of(now, slots, sizes.num_ranks, sizes.split))
        load = carry.load * settings.decay[:, None, None] + now[None]
        after = _Carry(table, load, each(table).mean(axis=1))
        return after, Followed(table, moved.sum(axis=2), received)

    start = _Carry(
        first,
        jnp.zeros((num_policies, *counts.shape[1:]), jnp.float32),
        jnp.zeros(num_policies, jnp.float32),
    )
    turns = jnp.arange(len(counts), dtype=jnp.int32)
    _, found = jax.lax.scan(play, start, (turns, counts))
    return jax.tree.map(lambda values: jnp.swapaxes(values, 0, 1), found)
