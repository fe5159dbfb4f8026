"""Changes: what one swap or replacement would do to the fullest rank, for all of them at once.

Axes: L layers, E experts, S slots, P ranks, N = S / P slots of a rank. The layers are the last
axis, for the reason that `replicate` gives.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

SWAP, REPLACE_HERE, REPLACE_THERE = 0, 1, 2
_NO_LIMIT = jnp.iinfo(jnp.int32).max


class Slots(NamedTuple):
    """The state of a search."""

    experts: Int[Array, "P N L"]  # E in the slots of a rank that holds nothing
    weights: Float[Array, "P N L"]  # tokens of each slot
    count: Float[Array, "E L"]  # replicas


class Limits(NamedTuple):
    """What a search must respect; `None` where there is nothing to respect."""

    # Speed of each rank. One of speed 0 holds nothing.
    capacity: Float[Array, "P"] | None = None
    # At most `max_moves` slots may end with another expert than in `previous`.
    previous: Int[Array, "L S"] | None = None
    max_moves: Int[Array, "L"] | None = None
    # Tokens of an expert served outside its home node cost `cross_node_weight` each, as if the
    # fullest rank had as many more, divided by P.
    home: Int[Array, "L E"] | None = None
    cross_node_weight: Float[Array, ""] | None = None


class Away(NamedTuple):
    """What it costs that experts are served outside their home nodes."""

    home: Int[Array, "P N L"]  # node, of the expert in each slot
    node: Int[Array, "P 1"]  # of each rank
    cost: Float[Array, ""]  # of one token, in tokens of the fullest rank


class Change(NamedTuple):
    """One change for each layer."""

    after: Float[Array, "L"]  # height of the fullest rank that it touches; inf if there is none
    kind: Int[Array, "L"]  # SWAP, REPLACE_HERE or REPLACE_THERE
    here: Int[Array, "L"]  # place on the fullest rank, 0..N-1
    there: Int[Array, "L"]  # slot of another rank, 0..S-1
    newcomer: Int[Array, "L"]  # the expert that replaces one here


class _Fullest(NamedTuple):
    """The fullest rank of each layer, and what does not depend on which of its slots changes."""

    rank: Int[Array, "L"]
    experts: Int[Array, "N L"]
    weights: Float[Array, "N L"]
    slowness: Float[Array, "L"]
    barred: Float[Array, "P N L"]  # inf where its expert may not come here, else 0


def _emptiest_to_come(
    slots: Slots, load: Float[Array, "E L"], held: Int[Array, "N L"]
) -> tuple[Int[Array, "L"], Float[Array, "L"]]:
    """The expert whose next replica would be the smallest, of those not in `held`, and its size."""
    share = load / (slots.count + 1.0)
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
    previous: Int[Array, "P N L"] | None,
    moves_left: Int[Array, "L"] | None,
    away: Away | None,
    spread_nodes: int,
) -> Change:
    """The change that leaves the fullest of the ranks that it touches emptiest.

    With `away`, swaps only, and what they cost is added. With `spread_nodes` above 1, swaps only,
    and none that leaves all of an expert's several replicas on one node.
    Goes through the N places of the fullest rank in turn: memory stays at S numbers a layer.
    """
    num_ranks, per_rank, num_layers = slots.experts.shape
    here = _look_at(slots, slowness, fullest)
    top = height.max(axis=0)
    ids = jnp.arange(num_ranks, dtype=jnp.int32)[:, None]
    slot_ids = jnp.arange(num_ranks * per_rank, dtype=jnp.int32).reshape(num_ranks, per_rank, 1)
    newcomer = jnp.zeros(num_layers, jnp.int32)
    if replace:
        newcomer, newcomer_weight = _emptiest_to_come(slots, load, here.experts)
        lost = _height_after_loss(slots, load, slowness, height)
    if previous is not None:
        was_here = jnp.take_along_axis(previous, fullest[None, None], axis=0)[0]  # [N, L]
        moved = (slots.experts != previous).astype(jnp.int32)
    if away is not None:
        home_here = jnp.take_along_axis(away.home, fullest[None, None], axis=0)[0]  # [N, L]
        node_here = away.node[fullest, 0]  # [L]
        theirs_off = (away.home != node_here[None, None]).astype(jnp.float32)
        theirs_off = theirs_off - (away.home != away.node[:, None]).astype(jnp.float32)

    if spread_nodes > 1:
        node = ids // (num_ranks // spread_nodes)  # [P, 1]
        elsewhere = node != node[fullest, 0][None]  # [P, L]
        joins = _all_others_on(slots, ~elsewhere)
        alone = jnp.where(joins & elsewhere[:, None], jnp.inf, 0.0)

    def consider(i, best):
        expert, weight = here.experts[i], here.weights[i]
        holds = (slots.experts == expert[None, None]).any(axis=1)  # [P, L]
        other = jnp.where(holds, jnp.inf, height)[:, None]  # [P, 1, L]
        gain = weight[None, None] - slots.weights  # of the other rank
        after = jnp.maximum(
            top[None, None] - gain * here.slowness[None, None], other + gain * slowness[:, None]
        )
        after = after + here.barred
        if previous is not None:
            moved_here = (expert != was_here[i]).astype(jnp.int32)
            back = (slots.experts != was_here[i][None, None]).astype(jnp.int32)
            there = (expert[None, None] != previous).astype(jnp.int32)
            cost = back + there - moved - moved_here[None, None]
            after = jnp.where(cost <= moves_left[None, None], after, jnp.inf)
        if spread_nodes > 1:
            by_node = holds.reshape(spread_nodes, -1, num_layers).astype(jnp.int32).sum(axis=1)
            total = by_node.sum(axis=0)
            joined = (by_node == total[None] - 1) & (total > 1)[None]  # [Q, L]
            joined = jnp.repeat(joined, num_ranks // spread_nodes, axis=0) & elsewhere
            after = after + alone + jnp.where(joined, jnp.inf, 0.0)[:, None]
        if away is not None:
            mine_off = (home_here[i][None] != away.node).astype(jnp.float32)
            mine_off = mine_off - (home_here[i] != node_here).astype(jnp.float32)[None]
            off = weight[None, None] * mine_off[:, None] + slots.weights * theirs_off
            after = after + away.cost * off
        best = _lower(best, after, slot_ids, SWAP, i)
        if not replace:
            return best

        count, total = (
            jnp.take_along_axis(table, expert[None], axis=0)[0] for table in (slots.count, load)
        )
        rise = total / jnp.maximum(count - 1.0, 0.5) - weight
        others = holds & (ids != fullest[None])
        risen = jnp.where(others, height + rise[None] * slowness, 0.0).max(axis=0)
        left = top - (weight - newcomer_weight) * here.slowness
        after = jnp.where(count > 1.5, jnp.maximum(left, risen), jnp.inf)
        if previous is not None:
            cost = (newcomer != was_here[i]).astype(jnp.int32) - moved_here
            after = jnp.where(cost <= moves_left, after, jnp.inf)
        best = _lower(best, after[None, None], slot_ids[:1, :1], REPLACE_HERE, i)

        smaller = total / (count + 1.0)
        left = top - (weight - smaller) * here.slowness
        grown = other + (smaller[None, None] - slots.weights) * slowness[:, None]
        after = jnp.maximum(jnp.maximum(left[None, None], grown), lost)
        if previous is not None:
            after = jnp.where(there - moved <= moves_left[None, None], after, jnp.inf)
        return _lower(best, after, slot_ids, REPLACE_THERE, i)

    nothing = jnp.zeros(num_layers, jnp.int32)
    start = Change(jnp.full(num_layers, jnp.inf), nothing, nothing, nothing, newcomer)
    return jax.lax.fori_loop(0, per_rank, consider, start)


def _look_at(slots: Slots, slowness: Float[Array, "P 1"], fullest: Int[Array, "L"]) -> _Fullest:
    index = fullest[None, None]
    experts = jnp.take_along_axis(slots.experts, index, axis=0)[0]
    weights = jnp.take_along_axis(slots.weights, index, axis=0)[0]

    def hold(i, held):
        return held | (slots.experts == experts[i][None, None])

    # A rank that holds nothing has nothing to give, either.
    idle = jnp.broadcast_to(slowness[:, None] == 0, slots.experts.shape)
    held = jax.lax.fori_loop(0, len(experts), hold, idle)
    return _Fullest(fullest, experts, weights, slowness[fullest, 0], jnp.where(held, jnp.inf, 0.0))


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
    num_experts, num_layers = load.shape
    layers = jnp.arange(num_layers)[None, None]
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
    there = jnp.where(after == lowest[None, None], slot_ids, _NO_LIMIT).min(axis=(0, 1))
    better = lowest < best.after
    return Change(
        jnp.where(better, lowest, best.after),
        jnp.where(better, kind, best.kind),
        jnp.where(better, here, best.here),
        jnp.where(better, there, best.there),
        best.newcomer,
    )


def apply_change(
    slots: Slots,
    load: Float[Array, "E L"],
    change: Change,
    fullest: Int[Array, "L"],
    wanted: Bool[Array, "L"],
    *,
    replace: bool,
) -> Slots:
    """Carry out the change in the layers where it is wanted."""
    num_ranks, per_rank, num_layers = slots.experts.shape
    layers = jnp.arange(num_layers)
    here = fullest * per_rank + change.here
    # A slot swapped with itself stays.
    there = jnp.where(wanted & (change.kind != REPLACE_HERE), change.there, here)
    flat = slots.experts.reshape(-1, num_layers)
    mine, theirs = flat[here, layers], flat[there, layers]
    if not replace:
        experts = _set_two(slots.experts, here, theirs, there, mine)
        flat = slots.weights.reshape(-1, num_layers)
        weights = _set_two(slots.weights, here, flat[there, layers], there, flat[here, layers])
        return Slots(experts, weights, slots.count)

    swap = change.kind == SWAP
    comes_here = jnp.where(
        swap, theirs, jnp.where(change.kind == REPLACE_HERE, change.newcomer, mine)
    )
    comes_here = jnp.where(wanted, comes_here, mine)
    experts = _set_two(
        slots.experts, here, comes_here, there, jnp.where(there == here, comes_here, mine)
    )
    ids = jnp.arange(len(load), dtype=jnp.int32)[:, None]
    replaced = wanted & ~swap
    loser = jnp.where(change.kind == REPLACE_HERE, mine, theirs)
    winner = jnp.where(change.kind == REPLACE_HERE, change.newcomer, mine)
    wins, loses = ids == winner[None], ids == loser[None]
    step = wins.astype(jnp.float32) - loses.astype(jnp.float32)
    count = slots.count + jnp.where(replaced[None], step, 0.0)
    share = load / jnp.maximum(count, 1.0)
    flat = slots.weights.reshape(-1, num_layers)
    weights = _set_two(slots.weights, here, flat[there, layers], there, flat[here, layers])
    for changed, is_it in ((winner, wins), (loser, loses)):
        size = jnp.where(is_it, share, 0.0).sum(axis=0)
        weights = jnp.where(
            replaced[None, None] & (experts == changed[None, None]), size[None, None], weights
        )
    return Slots(experts, weights, count)


def _set_two(table: Array, first: Array, value: Array, second: Array, other: Array) -> Array:
    num_layers = table.shape[-1]
    layers = jnp.arange(num_layers)
    flat = table.reshape(-1, num_layers)
    return flat.at[first, layers].set(value).at[second, layers].set(other).reshape(table.shape)
