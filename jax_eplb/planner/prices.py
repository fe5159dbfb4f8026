"""Prices: what a swap or a replacement promises under the balanced split, for many at once.

Axes: L layers, E experts, S slots, P ranks, N = S / P slots of a rank, W scenarios, D dear ranks,
M = D N slots of them, H hot experts, C changes.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

_TEMPERATURE = 0.03
_DEAR_RANKS = 8
_HOT_EXPERTS = 32
_PARTNERS = 2
# The second look: sharper, and where a rank has replicas of experts that other ranks hold too, they
# even out the other part of the tokens that come or go.
_SHARP = 0.01
_STAYS = 0.5
# Changes are matched to ranks so often; the rest is left for the next round.
_MATCHINGS = 3
_MOST_CHANGES = 64
_FAR = 1e9


class Changes(NamedTuple):
    """Those first of which no two touch one rank; the most promising first, there and after."""

    here: Int[Array, "L C"]  # slot
    there: Int[Array, "L C"]  # the slot to swap with; -1 for a replacement
    newcomer: Int[Array, "L C"]  # the expert that comes here
    possible: Bool[Array, "L C"]
    num_apart: Int[Array, "L"]  # how many touch ranks of their own


def promising_changes(
    slots: Int[Array, "L S"],
    load: Float[Array, "L E+1 W"],
    height: Float[Array, "L P W"],
    slowness: Float[Array, "P 1"],
    doubt: Float[Array, "L"],
    turn: Int[Array, ""],
) -> Changes:
    """The swaps and replacements that lower the fullest rank most.

    First for all of them to first order: an expert's tokens go where the price is lowest, and the
    value of its ranks is that lowest price. Then, for the best partners of each slot, with a look
    at how much is shifted: a first-order promise is the larger, the more a change overshoots.
    `doubt`, other numbers each `turn`, lets less promising partners come up too.
    """
    num_ranks = len(slowness)
    price = jax.nn.softmax(height / _TEMPERATURE, axis=1) * slowness[None]
    # No two alike, so that the cheapest replica of an expert is one.
    ids = jnp.arange(1, num_ranks + 1, dtype=jnp.float32)[None, :, None]
    price = jnp.maximum(price, 1e-12 * ids) / price.shape[2]
    return jax.vmap(_of_layer, in_axes=(0, 0, 0, 0, None, 0, None))(
        slots, load, height, price, slowness, doubt, turn
    )


def _of_layer(slots, load, height, price, slowness, doubt, turn) -> Changes:
    num_ranks, num_slots, num_experts = len(slowness), len(slots), len(load) - 1
    per_rank = num_slots // num_ranks
    rank = jnp.arange(num_slots, dtype=jnp.int32) // per_rank
    by_rank = slots.reshape(num_ranks, per_rank)
    live = slowness[:, 0] > 0
    tokens = load[slots]  # [S, W]
    count = jnp.zeros(num_experts + 1, jnp.int32).at[slots].add(1)
    own = price[rank]
    lowest = jnp.full(load.shape, _FAR).at[slots].min(own)  # [E + 1, W]
    others = jnp.full(load.shape, _FAR).at[slots].min(jnp.where(own > lowest[slots], own, _FAR))
    now = lowest[slots]
    without = jnp.where(own > now, now, others[slots])  # _FAR for the only replica

    def move(some, to):
        """What it costs to move each of some slots to each of some ranks."""
        then = jnp.minimum(without[some][:, None], price[to][None]) - now[some][:, None]
        held = (slots[some][:, None, None] == by_rank[to][None]).any(axis=2)
        barred = held | ~live[to][None] | (slots[some] == num_experts)[:, None]
        return jnp.where(barred, jnp.inf, (then * tokens[some][:, None]).sum(axis=2))

    dear = jax.lax.top_k(price.sum(axis=1), min(_DEAR_RANKS, num_ranks))[1].astype(jnp.int32)
    here = (dear[:, None] * per_rank + jnp.arange(per_rank, dtype=jnp.int32)[None]).ravel()
    everywhere = jnp.arange(num_ranks, dtype=jnp.int32)
    every_slot = jnp.arange(num_slots, dtype=jnp.int32)
    go, come = move(here, everywhere), move(every_slot, dear)  # [M, P], [S, D]
    cost = jnp.repeat(go, per_rank, axis=1) + jnp.repeat(come.T, per_rank, axis=0)  # [M, S]
    cost = cost + doubt * _noise(turn, *cost.shape)
    swaps, partners = [], []
    for _ in range(_PARTNERS):
        partner = cost.argmin(axis=1).astype(jnp.int32)
        swaps.append(cost.min(axis=1))
        partners.append(partner)
        cost = jnp.where(partner[:, None] == every_slot[None], jnp.inf, cost)
    swap, there = jnp.concatenate(swaps), jnp.concatenate(partners)
    here = jnp.tile(here, _PARTNERS)

    # The best newcomer on each rank, for any slot there whose expert has other replicas.
    paid = jnp.where(count > 0, (lowest * load).sum(axis=1), 0.0)[:num_experts]
    hot = jax.lax.top_k(paid, min(_HOT_EXPERTS, num_experts))[1].astype(jnp.int32)
    saved = jnp.minimum(price[None] - lowest[hot][:, None], 0.0) * load[hot][:, None]
    held = (hot[:, None, None] == by_rank[None]).sum(axis=2, dtype=jnp.int32)  # [H, P]
    # In a placement from elsewhere a rank may have two of an expert. It gets no more: on all the
    # other ranks, too, there would be more replicas than tables have room for.
    barred = (held > 0) | (held > 1).any(axis=1, keepdims=True) | ~live[None]
    saved = jnp.where(barred, jnp.inf, saved.sum(axis=2))  # [H, P]
    saved = saved + doubt * _noise(turn, *saved.shape)
    newcomer = hot[saved.argmin(axis=0)][rank]  # [S]
    replace = saved.min(axis=0)[rank]
    replace = jnp.where(count[slots] > 1, replace, jnp.inf)

    # The second look: two or three ranks change, by parts of the tokens.
    each = load / jnp.maximum(count, 1).astype(jnp.float32)[:, None]
    more = load / (count + 1).astype(jnp.float32)[:, None]
    mean_price = price.sum(axis=1)
    first, second, last = _ends(slots, mean_price[rank], rank, num_experts)
    heir = jnp.where(first[slots] == rank, second[slots], first[slots])
    shares = (count[by_rank] > 1).any(axis=1, keepdims=True)
    rise = jnp.where(shares, _STAYS, 1.0) * slowness
    shift = each[slots[here]] - each[slots[there]]
    of_swap = _gain(height, rise, ((rank[here], -shift), (rank[there], shift)))
    gone, comes = each[slots], more[newcomer]
    of_replacement = _gain(
        height, rise, ((rank, comes - gone), (heir, gone), (last[newcomer], -comes))
    )
    gain = jnp.concatenate(
        [
            jnp.where(swap < jnp.inf, of_swap, -jnp.inf),
            jnp.where(replace < jnp.inf, of_replacement, -jnp.inf),
        ]
    )
    here = jnp.concatenate([here, every_slot])
    newcomer = jnp.concatenate([slots[there], newcomer])
    there = jnp.concatenate([there, jnp.full(num_slots, -1, jnp.int32)])
    gain, best = jax.lax.top_k(gain, min(_MOST_CHANGES, len(gain)))
    here, there, newcomer = here[best], there[best], newcomer[best]
    apart = _match(gain, rank[here], jnp.where(there >= 0, rank[there], rank[here]), num_ranks)
    order = jnp.argsort(~apart, stable=True)
    possible = (gain > -jnp.inf)[order]
    return Changes(here[order], there[order], newcomer[order], possible, apart.sum(dtype=jnp.int32))


def _noise(turn, rows: int, columns: int):
    """Numbers from 0 to 1, other ones each turn: a hash, since no more is needed."""
    one = jnp.arange(rows, dtype=jnp.uint32)[:, None] * jnp.uint32(2654435761)
    other = jnp.arange(columns, dtype=jnp.uint32)[None] * jnp.uint32(2246822519)
    mixed = one ^ (other + turn.astype(jnp.uint32) * jnp.uint32(3266489917))
    mixed = (mixed ^ (mixed >> 15)) * jnp.uint32(2654435769)
    return (mixed >> 8).astype(jnp.float32) * (1 / 2**24)


def _ends(slots, price, rank, num_experts: int):
    """For each expert the ranks of its cheapest, second cheapest and dearest replica."""
    lowest = jnp.full(num_experts + 1, _FAR).at[slots].min(price)
    above = jnp.where(price > lowest[slots], price, _FAR)
    second = jnp.full(num_experts + 1, _FAR).at[slots].min(above)
    highest = jnp.zeros(num_experts + 1).at[slots].max(price)

    def rank_of(wanted):
        return (
            jnp.zeros(num_experts + 1, jnp.int32)
            .at[slots]
            .max(jnp.where(price == wanted[slots], rank, 0))
        )

    return rank_of(lowest), rank_of(second), rank_of(highest)


def _gain(height: Float[Array, "P W"], rise: Float[Array, "P 1"], shifts) -> Float[Array, "M"]:
    """What the fullest rank, smoothed, falls by where ranks [M] gain tokens [M, W].

    `rise`: by how much a rank's height grows with its tokens.
    """
    tallest = height.max(axis=0)
    part = jnp.exp((height - tallest[None]) / _SHARP)  # [P, W]
    total = part.sum(axis=0)[None]
    after = total
    for ranks, tokens in shifts:
        power = jnp.minimum(tokens * rise[ranks] / _SHARP, 60.0)
        after = after + part[ranks] * jnp.expm1(power)
    return -jnp.log(jnp.maximum(after, 1e-6) / total).mean(axis=1)


def _match(
    gain: Float[Array, "M"], one: Int[Array, "M"], other: Int[Array, "M"], num_ranks: int
) -> Bool[Array, "M"]:
    """Changes of which no two touch one rank: the best on both of theirs, again and again.

    The changes are in the order of their gain.
    """
    order = jnp.arange(len(gain), dtype=jnp.int32)
    last = len(gain)

    def step(_, state):
        kept, free = state
        able = free[one] & free[other] & (gain > -jnp.inf)
        turn = jnp.where(able, order, last)
        first = jnp.full(num_ranks, last, jnp.int32).at[one].min(turn).at[other].min(turn)
        chosen = able & (first[one] == order) & (first[other] == order)
        took = jnp.zeros(num_ranks, bool).at[one].max(chosen).at[other].max(chosen)
        return kept | chosen, free & ~took

    start = (jnp.zeros(len(gain), bool), jnp.ones(num_ranks, bool))
    return jax.lax.fori_loop(0, _MATCHINGS, step, start)[0]
