"""Best change: what each swap or replacement would do to the fullest rank, for all at once.

Axes: L layers, E experts, S slots, P ranks, N = S / P slots of a rank. The layers are the last
axis, for the reason that `replicate` gives.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jax_eplb.planner.changes import (
    REPLACE_HERE,
    REPLACE_THERE,
    SWAP,
    Away,
    Change,
    Moves,
    Slots,
    moves_of_swap,
)
from jax_eplb.tables import max_replicas

_NOWHERE = jnp.iinfo(jnp.int32).max


class _View(NamedTuple):
    """The fullest rank of each layer among the others, before any of its slots changes."""

    slots: Slots
    load: Float[Array, "E L"]
    slowness: Float[Array, "P 1"]
    height: Float[Array, "P L"]
    is_fullest: Bool[Array, "P L"]
    top: Float[Array, "L"]  # its height
    own: Int[Array, "N L"]  # its experts
    own_weights: Float[Array, "N L"]
    own_slowness: Float[Array, "L"]
    barred: Float[Array, "P N L"]  # inf where the expert may not come to the fullest rank, else 0

    def holds(self, i) -> Bool[Array, "P L"]:
        """Ranks with a replica of the fullest rank's i-th expert."""
        return (self.slots.experts == self.own[i][None, None]).any(axis=1)


def _emptiest_to_come(
    slots: Slots, load: Float[Array, "E L"], held: Int[Array, "N L"]
) -> tuple[Int[Array, "L"], Float[Array, "L"]]:
    """The expert whose next replica would be the smallest, of those not in `held`, and its size."""
    share = jnp.where(slots.count < _most_replicas(slots), load / (slots.count + 1.0), jnp.inf)
    ids = jnp.arange(len(share), dtype=jnp.int32)[:, None]

    def bar(i, share):
        return jnp.where(ids == held[i][None], jnp.inf, share)

    share = jax.lax.fori_loop(0, len(held), bar, share)
    smallest = share.min(axis=0)
    return jnp.where(share == smallest[None], ids, len(share) - 1).min(axis=0), smallest


def best_change(
    slots: Slots,
    load: Float[Array, "E L"],
    slowness: Float[Array, "P 1"],
    height: Float[Array, "P L"],
    fullest: Int[Array, "L"],
    *,
    replace: bool,
    moves: Moves | None,
    away: Away | None,
    spread_nodes: int,
) -> Change:
    """The change that leaves the fullest of the ranks that it touches emptiest.

    With `away`, swaps only, and what they cost is added. With `spread_nodes` above 1, swaps only,
    and none that leaves all of an expert's several replicas on one node.
    Goes through the N places of the fullest rank in turn: memory stays at S numbers a layer.
    """
    num_ranks, per_rank, num_layers = slots.experts.shape
    slot_ids = jnp.arange(num_ranks * per_rank, dtype=jnp.int32).reshape(num_ranks, per_rank, 1)
    view = _look_at(slots, load, slowness, height, fullest)
    swap_terms = []
    if moves is not None:
        was_own = _of_rank(moves.previous, fullest)
        moved = (slots.experts != moves.previous).astype(jnp.int32)
        swap_terms.append(lambda i, _: _too_many_moves(view, moves, was_own, i))
    if spread_nodes > 1:
        swap_terms.append(_concentration(view, spread_nodes))
    if away is not None:
        swap_terms.append(_away_costs(view, away, fullest))
    newcomer = jnp.zeros(num_layers, jnp.int32)
    if replace:
        newcomer, newcomer_weight = _emptiest_to_come(slots, load, view.own)
        lost = _height_after_loss(slots, load, slowness, height)

    def consider(i, best):
        holds = view.holds(i)
        after = _after_swap(view, holds, i)
        for term in swap_terms:
            after = after + term(i, holds)
        best = _lower(best, after, slot_ids, SWAP, i)
        if not replace:
            return best
        after = _after_replacement_here(view, holds, newcomer_weight, i)
        if moves is not None:
            cost = (newcomer != was_own[i]).astype(jnp.int32)
            cost = cost - (view.own[i] != was_own[i]).astype(jnp.int32)
            after = jnp.where(cost <= moves.left, after, jnp.inf)
        best = _lower(best, after[None, None], slot_ids[:1, :1], REPLACE_HERE, i)
        after = _after_replacement_there(view, holds, lost, i)
        if moves is not None:
            cost = (view.own[i][None, None] != moves.previous).astype(jnp.int32) - moved
            after = jnp.where(cost <= moves.left[None, None], after, jnp.inf)
        return _lower(best, after, slot_ids, REPLACE_THERE, i)

    nothing = jnp.zeros(num_layers, jnp.int32)
    start = Change(jnp.full(num_layers, jnp.inf), nothing, nothing, nothing, newcomer)
    return jax.lax.fori_loop(0, per_rank, consider, start)


def _of_rank(table: Array, rank: Int[Array, "L"]) -> Array:
    """One rank of a table [P, N, L] for each layer: [N, L]."""
    return jnp.take_along_axis(table, rank[None, None], axis=0)[0]


def _look_at(
    slots: Slots,
    load: Float[Array, "E L"],
    slowness: Float[Array, "P 1"],
    height: Float[Array, "P L"],
    fullest: Int[Array, "L"],
) -> _View:
    experts = _of_rank(slots.experts, fullest)

    def hold(i, held):
        return held | (slots.experts == experts[i][None, None])

    # A rank that holds nothing has nothing to give, either.
    idle = jnp.broadcast_to(slowness[:, None] == 0, slots.experts.shape)
    held = jax.lax.fori_loop(0, len(experts), hold, idle)
    return _View(
        slots,
        load,
        slowness,
        height,
        jnp.arange(len(height), dtype=jnp.int32)[:, None] == fullest[None],
        height.max(axis=0),
        experts,
        _of_rank(slots.weights, fullest),
        slowness[fullest, 0],
        jnp.where(held, jnp.inf, 0.0),
    )


def _after_swap(view: _View, holds: Bool[Array, "P L"], i) -> Float[Array, "P N L"]:
    """Height of the fuller rank after a swap of own place i with each slot."""
    other = jnp.where(holds, jnp.inf, view.height)[:, None]  # [P, 1, L]
    gain = view.own_weights[i][None, None] - view.slots.weights  # of the other rank
    left = view.top[None, None] - gain * view.own_slowness[None, None]
    return jnp.maximum(left, other + gain * view.slowness[:, None]) + view.barred


def _after_replacement_here(
    view: _View, holds: Bool[Array, "P L"], newcomer_weight: Float[Array, "L"], i
) -> Float[Array, "L"]:
    """Height of the fullest changed rank once own place i holds the newcomer."""
    weight, count, total = view.own_weights[i], *_count_and_load(view, i)
    rise = total / jnp.maximum(count - 1.0, 0.5) - weight
    others = holds & ~view.is_fullest
    risen = jnp.where(others, view.height + rise[None] * view.slowness, 0.0).max(axis=0)
    left = view.top - (weight - newcomer_weight) * view.own_slowness
    return jnp.where(count > 1.5, jnp.maximum(left, risen), jnp.inf)


def _after_replacement_there(
    view: _View, holds: Bool[Array, "P L"], lost: Float[Array, "P N L"], i
) -> Float[Array, "P N L"]:
    """Height of the fullest changed rank once each slot holds one more replica of own expert i."""
    count, total = _count_and_load(view, i)
    smaller = total / (count + 1.0)
    left = view.top - (view.own_weights[i] - smaller) * view.own_slowness
    other = jnp.where(holds, jnp.inf, view.height)[:, None]
    grown = other + (smaller[None, None] - view.slots.weights) * view.slowness[:, None]
    after = jnp.maximum(jnp.maximum(left[None, None], grown), lost)
    return jnp.where((count < _most_replicas(view.slots))[None, None], after, jnp.inf)


def _most_replicas(slots: Slots) -> int:
    """That tables have room for; only where a rank holds two of an expert could there be more."""
    num_ranks, per_rank, _ = slots.experts.shape
    return max_replicas(len(slots.count), num_ranks * per_rank, num_ranks)


def _count_and_load(view: _View, i) -> tuple[Float[Array, "L"], Float[Array, "L"]]:
    """Replicas and tokens of own expert i."""
    expert = view.own[i][None]
    count, total = (
        jnp.take_along_axis(table, expert, axis=0)[0] for table in (view.slots.count, view.load)
    )
    return count, total


def _too_many_moves(
    view: _View, moves: Moves, was_own: Int[Array, "N L"], i
) -> Float[Array, "P N L"]:
    """inf for the swaps that would move more slots than may still move, else 0."""
    own, was = view.own[i][None, None], was_own[i][None, None]
    cost = moves_of_swap(own, view.slots.experts, was, moves.previous)
    return jnp.where(cost <= moves.left[None, None], 0.0, jnp.inf)


def _concentration(view: _View, num_nodes: int):
    """inf for the swaps that would leave an expert's several replicas on one node, else 0."""
    num_ranks, num_layers = view.height.shape
    node = jnp.arange(num_ranks, dtype=jnp.int32)[:, None] // (num_ranks // num_nodes)
    here = jnp.where(view.is_fullest, node, 0).sum(axis=0)
    elsewhere = node != here[None]  # [P, L]
    joins = _all_others_on(view.slots, ~elsewhere)
    theirs = jnp.where(joins & elsewhere[:, None], jnp.inf, 0.0)

    def of_swap(_, holds):
        by_node = holds.reshape(num_nodes, -1, num_layers).astype(jnp.int32).sum(axis=1)
        total = by_node.sum(axis=0)
        joined = (by_node == total[None] - 1) & (total > 1)[None]  # [Q, L]
        joined = jnp.repeat(joined, num_ranks // num_nodes, axis=0) & elsewhere
        return theirs + jnp.where(joined, jnp.inf, 0.0)[:, None]

    return of_swap


def _away_costs(view: _View, away: Away, fullest: Int[Array, "L"]):
    """What swaps add to the tokens served away from home, in tokens of the fullest rank."""
    own_home, node_here = _of_rank(away.home, fullest), away.node[fullest, 0]
    theirs_off = (away.home != node_here[None, None]).astype(jnp.float32)
    theirs_off = theirs_off - (away.home != away.node[:, None]).astype(jnp.float32)

    def of_swap(i, _):
        own_off = (own_home[i][None] != away.node).astype(jnp.float32)
        own_off = own_off - (own_home[i] != node_here).astype(jnp.float32)[None]
        off = view.own_weights[i][None, None] * own_off[:, None] + view.slots.weights * theirs_off
        return away.cost * off

    return of_swap


def _all_others_on(slots: Slots, on_node: Bool[Array, "P L"]) -> Bool[Array, "P N L"]:
    """Whether the slot's expert has other replicas, all of them on these ranks."""
    layers = jnp.arange(on_node.shape[1])[None, None]
    here = jnp.broadcast_to(on_node[:, None].astype(jnp.float32), slots.experts.shape)
    there = jnp.zeros_like(slots.count).at[slots.experts, layers].add(here, mode="drop")
    joins = (there == slots.count - 1) & (slots.count > 1)
    return joins.at[slots.experts, layers].get(mode="fill", fill_value=False)


def _height_after_loss(
    slots: Slots,
    load: Float[Array, "E L"],
    slowness: Float[Array, "P 1"],
    height: Float[Array, "P L"],
) -> Float[Array, "P N L"]:
    """Height of the fullest rank that holds the slot's expert, once one replica of it is gone.

    inf where it is the last replica. An upper bound: as if none of the fullest's own were gone.
    """
    layers = jnp.arange(load.shape[1])[None, None]
    spread = jnp.broadcast_to(height[:, None], slots.experts.shape)
    tallest = jnp.zeros_like(load).at[slots.experts, layers].max(spread, mode="drop")
    share = load / jnp.maximum(slots.count, 1.0)
    rise = jnp.where(slots.count > 1.5, load / jnp.maximum(slots.count - 1.0, 0.5) - share, jnp.inf)
    lost = tallest + rise * slowness.max()
    return lost.at[slots.experts, layers].get(mode="fill", fill_value=jnp.inf)


def _lower(
    best: Change, after: Float[Array, "_ _ L"], slot_ids: Int[Array, "_ _ 1"], kind: int, here
) -> Change:
    lowest = after.min(axis=(0, 1))
    there = jnp.where(after == lowest[None, None], slot_ids, _NOWHERE).min(axis=(0, 1))
    better = lowest < best.after
    return Change(
        jnp.where(better, lowest, best.after),
        jnp.where(better, kind, best.kind),
        jnp.where(better, here, best.here),
        jnp.where(better, there, best.there),
        best.newcomer,
    )
