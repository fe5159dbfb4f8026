"""Windows: swaps that lower the mean, over iterations, of the fullest rank, under the even split.

Axes: W scenarios, L layers, E experts, S slots, P ranks, N = S / P slots of a rank. Within the loop
the layers are the last axis, for the reason that `replicate` gives.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jax_eplb.planner.changes import NO_LIMITS, Limits, moves_of_swap
from jax_eplb.split import count_replicas, slowness_of

# How far below the fullest rank of a scenario another one still counts, as a part of the mean.
_TEMPERATURE = 0.05
_PARTNERS = 4
_LEAST_GAIN = 1e-5


class _Search(NamedTuple):
    rounds: Int[Array, ""]
    experts: Int[Array, "S L"]
    weights: Float[Array, "W S L"]
    done: Bool[Array, "P L"]  # ranks for which no swap was found since the last one that helped


@functools.partial(jax.jit, static_argnames=("num_ranks",))
def refine_windows(
    slot_to_expert: Int[Array, "L S"],
    scenarios: Float[Array, "W L E"],
    *,
    num_ranks: int,
    max_rounds: int | Int[Array, ""],
    limits: Limits = NO_LIMITS,
) -> Int[Array, "L S"]:
    """Swap slots so that the mean over scenarios of the fullest rank's load falls.

    In each round a layer looks at the rank that most often is the fullest, or nearly. Each of its
    slots is tried with the few slots elsewhere that promise most: to first order a swap changes the
    mean by prices, how often each rank is the fullest. Those few are computed exactly, and the best
    is carried out if it helps; if none does, the next rank is looked at. `scenarios` are shares of
    the tokens (see `draw_scenarios`). No rank gets a second replica of an expert.

    >>> scenarios = jnp.array([[[0.4, 0.4, 0.1, 0.1]], [[0.1, 0.1, 0.4, 0.4]]])
    >>> refine_windows(jnp.array([[0, 1, 2, 3]]), scenarios, num_ranks=2, max_rounds=8).tolist()
    [[2, 1, 0, 3]]
    """
    _, num_layers, num_experts = scenarios.shape
    experts = slot_to_expert.T
    count = jnp.maximum(count_replicas(slot_to_expert, num_experts), 1).astype(jnp.float32)
    share = num_ranks * scenarios / count[None]
    weights = jnp.swapaxes(
        jnp.take_along_axis(share, slot_to_expert[None], axis=2, mode="fill", fill_value=0.0), 1, 2
    )
    slowness = slowness_of(limits.capacity, num_ranks)
    previous = None if limits.previous is None else limits.previous.T
    idle = jnp.broadcast_to(slowness == 0, (num_ranks, num_layers))
    search = jax.lax.while_loop(
        lambda search: ~search.done.all() & (search.rounds < max_rounds),
        functools.partial(
            _swap_once, slowness=slowness, previous=previous, max_moves=limits.max_moves
        ),
        _Search(jnp.int32(0), experts, weights, idle),
    )
    return search.experts.T


def _swap_once(search: _Search, *, slowness, previous, max_moves) -> _Search:
    num_scenarios, num_slots, num_layers = search.weights.shape
    num_ranks = len(slowness)
    per_rank = num_slots // num_ranks
    layers = jnp.arange(num_layers)
    by_rank = search.weights.reshape(num_scenarios, num_ranks, per_rank, num_layers)
    height = by_rank.sum(axis=2) * slowness[None]  # [W, P, L]
    tallest = height.max(axis=1, keepdims=True)
    price = jnp.exp((height - tallest) / _TEMPERATURE)
    price = price / price.sum(axis=1, keepdims=True) * slowness[None]  # [W, P, L]
    hot = jnp.where(search.done, -1.0, price.sum(axis=0)).argmax(axis=0).astype(jnp.int32)  # [L]

    own = hot[None] * per_rank + jnp.arange(per_rank, dtype=jnp.int32)[:, None]  # [N, L]
    own_experts = jnp.take_along_axis(search.experts, own, axis=0)
    own_weights = jnp.take_along_axis(search.weights, own[None], axis=1)  # [W, N, L]
    hot_price = jnp.take_along_axis(price, hot[None, None], axis=1)  # [W, 1, L]

    # To first order: what the swap of own slot i with slot s takes off the mean.
    there = ((price[:, :, None] - hot_price[:, :, None]) * by_rank).sum(axis=0)  # [P, N, L]
    promise = there.reshape(1, num_slots, num_layers)
    mine = ((hot_price[:, :, None] - price[:, None]) * own_weights[:, :, None]).sum(axis=0)
    promise = promise + jnp.repeat(mine, per_rank, axis=1)  # [N, S, L]

    experts = search.experts[None]  # [1, S, L]
    held = (search.experts[:, None] == own_experts[None]).any(axis=1)  # [S, L]
    same = experts == own_experts[:, None]
    holds = same.reshape(per_rank, num_ranks, per_rank, num_layers).any(axis=2)
    barred = held[None] | jnp.repeat(holds | (slowness == 0)[None], per_rank, axis=1)
    if previous is not None:
        was_own = jnp.take_along_axis(previous, own, axis=0)
        away = (search.experts != previous).astype(jnp.int32)
        cost = moves_of_swap(own_experts[:, None], experts, was_own[:, None], previous[None])
        barred = barred | (cost > (max_moves - away.sum(axis=0))[None, None])
    promise = jnp.where(barred, -jnp.inf, promise)

    first, second, third = _three_tallest(height)

    slow_here = slowness[hot, 0][None, None]
    slot = jnp.arange(num_slots, dtype=jnp.int32)[None, :, None]

    def try_partner(_, state):
        promise, best, best_own, best_other = state
        partner = promise.argmax(axis=1).astype(jnp.int32)  # [N, L]
        possible = promise.max(axis=1) > -jnp.inf
        rank = partner // per_rank
        their_weights = jnp.take_along_axis(search.weights, partner[None], axis=1)
        gain = own_weights - their_weights  # [W, N, L], of the other rank
        before = jnp.take_along_axis(height, rank[None], axis=1)
        hot_height = jnp.take_along_axis(height, hot[None, None], axis=1)
        rest = _tallest_but(first, second, third, hot[None, None], rank[None])
        after = jnp.maximum(
            jnp.maximum(hot_height - gain * slow_here, before + gain * slowness[rank, 0][None]),
            rest,
        ).mean(axis=0)
        after = jnp.where(possible, after, jnp.inf)
        lowest = after.min(axis=0)
        place = after.argmin(axis=0).astype(jnp.int32)
        better = lowest < best
        return (
            jnp.where(slot == partner[:, None], -jnp.inf, promise),
            jnp.where(better, lowest, best),
            jnp.where(better, own[place, layers], best_own),
            jnp.where(better, partner[place, layers], best_other),
        )

    nothing = jnp.zeros(num_layers, jnp.int32)
    start = (promise, jnp.full(num_layers, jnp.inf), nothing, nothing)
    _, best, here, other = jax.lax.fori_loop(0, _PARTNERS, try_partner, start)
    now = tallest.mean(axis=(0, 1))
    helps = best < now * (1 - _LEAST_GAIN)
    here = jnp.where(helps, here, 0)
    other = jnp.where(helps, other, here)
    mine, theirs = search.experts[here, layers], search.experts[other, layers]
    experts = search.experts.at[here, layers].set(theirs).at[other, layers].set(mine)
    my_weights, their_weights = (search.weights[:, slot, layers] for slot in (here, other))
    weights = search.weights.at[:, here, layers].set(their_weights)
    weights = weights.at[:, other, layers].set(my_weights)
    ids = jnp.arange(num_ranks, dtype=jnp.int32)[:, None]
    idle = jnp.broadcast_to(slowness == 0, search.done.shape)
    done = jnp.where(helps[None], idle, search.done | (ids == hot[None]))
    return _Search(search.rounds + 1, experts, weights, done)


def _three_tallest(height: Float[Array, "W P L"]):
    """Height and rank of the three tallest ranks, each [W, 1, L]."""
    ids = jnp.arange(height.shape[1], dtype=jnp.int32)[None, :, None]
    tallest = []
    for _ in range(3):
        rank = height.argmax(axis=1, keepdims=True).astype(jnp.int32)
        tallest.append((height.max(axis=1, keepdims=True), rank))
        height = jnp.where(ids == rank, -1.0, height)
    return tallest


def _tallest_but(first, second, third, one, other):
    """The tallest of all ranks but two."""

    def is_out(tall):
        return (tall[1] == one) | (tall[1] == other)

    rest = jnp.where(is_out(second), third[0], second[0])
    return jnp.where(is_out(first), rest, first[0])
