"""Balanced: swaps and replacements that lower the fullest rank, under the balanced split.

Axes: W scenarios, L layers, E experts, S slots, P ranks, X experts with several replicas at most,
J their slots at most, N = S / P slots of a rank, C changes.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jax_eplb.linear_algebra import exact_matmul
from jax_eplb.planner.changes import NO_LIMITS, Limits, count_earlier
from jax_eplb.planner.choose import choose_layers
from jax_eplb.planner.prices import Changes, promising_changes
from jax_eplb.split import count_replicas, gather_replicas, slowness_of

_MOST_SCENARIOS = 64
_PRICED_SCENARIOS = 16
_STEPS = 12
_TRIES = 4  # for each pricing
_FIRST_BATCH = 8
_PATIENCE = 20  # rounds without a change that helps, before a layer counts as done
_LEAST_GAIN = 1e-5
# How much promises are doubted, for each round in which none was kept.
_DOUBT = 0.05
_MOST_DOUBTS = 10
# The spread of the ranks counts a little: two ranks as full as each other are one change from less.
_SPREAD = 0.1
_STRIDE = 3.2
_TINY = 1e-30


class _Search(NamedTuple):
    slots: Int[Array, "L S"]
    height: Float[Array, "L P W"]
    value: Float[Array, "L"]
    batch: Int[Array, "L"]  # changes to carry out at once
    tried: Int[Array, "L"]  # changes of the list that were


@functools.partial(jax.jit, static_argnames=("num_ranks",))
def refine_balanced(
    slot_to_expert: Int[Array, "L S"],
    scenarios: Float[Array, "W L E"],
    *,
    num_ranks: int,
    max_rounds: int | Int[Array, ""],
    limits: Limits = NO_LIMITS,
) -> Int[Array, "L S"]:
    """Swap and replace slots so that the mean over scenarios of the fullest rank's load falls.

    The load is what `balanced_split` would leave. In each round prices, how often each rank is the
    fullest, tell to first order what every change would do. The most promising ones that meet on no
    rank are carried out together, in batches: twice as many the next time where that helped, half
    as many where it did not. `scenarios` are shares of the tokens (see `draw_scenarios`). No rank
    gets a second replica of an expert, and none loses its last.

    >>> scenarios = jnp.array([[[0.4, 0.4, 0.1, 0.1]], [[0.1, 0.1, 0.4, 0.4]]])
    >>> refine_balanced(jnp.array([[0, 1, 2, 3]]), scenarios, num_ranks=2, max_rounds=8).tolist()
    [[2, 1, 0, 3]]
    """
    num_layers = scenarios.shape[1]
    chosen = scenarios[:: -(-len(scenarios) // _MOST_SCENARIOS)]
    load = jnp.moveaxis(chosen, 0, -1) * num_ranks  # [L, E, W]
    load = jnp.pad(load, ((0, 0), (0, 1), (0, 0)))
    slowness = slowness_of(limits.capacity, num_ranks)
    num_chosen = len(chosen)
    num_some = min(num_chosen, _PRICED_SCENARIOS)
    none = jnp.zeros(num_layers, jnp.int32)

    def play_round(state):
        turn, search, idle = state
        # Some scenarios at a time: cheaper, and what failed is not proposed again and again.
        some = (jnp.arange(num_some, dtype=jnp.int32) * num_chosen // num_some + turn) % num_chosen
        changes = promising_changes(
            search.slots,
            load[..., some],
            search.height[..., some],
            slowness,
            _DOUBT * jnp.minimum(idle, _MOST_DOUBTS).astype(jnp.float32),
            turn,
        )
        search = search._replace(tried=none)
        before = search.value
        search = jax.lax.fori_loop(
            0, _TRIES, lambda _, search: _try(search, changes, load, slowness, limits), search
        )
        idle = jnp.where(search.value < before, 0, idle + 1)
        return turn + 1, search, idle

    def unfinished(state):
        turn, _, idle = state
        return (turn < max_rounds) & (idle < _PATIENCE).any()

    height, value = _divide(slot_to_expert, load, slowness)
    search = _Search(slot_to_expert, height, value, none + _FIRST_BATCH, none)
    return jax.lax.while_loop(unfinished, play_round, (jnp.int32(0), search, none))[1].slots


def _try(search: _Search, changes: Changes, load, slowness, limits: Limits) -> _Search:
    """Carry out the next changes of the list in each layer, and keep them where they help."""
    num_layers, num_slots = search.slots.shape
    num_experts = load.shape[1] - 1
    layers = jnp.arange(num_layers)[:, None]
    together = jnp.clip(changes.num_apart - search.tried, 1, search.batch)
    turn = jnp.arange(changes.here.shape[1], dtype=jnp.int32)[None] - search.tried[:, None]
    taken = changes.possible & (turn >= 0) & (turn < together[:, None])
    swap = changes.there >= 0
    here = jnp.where(taken, changes.here, num_slots)
    there = jnp.where(taken & swap, changes.there, num_slots)
    look = functools.partial(jnp.take_along_axis, axis=1, mode="fill", fill_value=num_experts)
    newcomer = jnp.where(swap, look(search.slots, there), changes.newcomer)
    slots = search.slots.at[layers, here].set(newcomer, mode="drop")
    slots = slots.at[layers, there].set(look(search.slots, here), mode="drop")

    # What was promised may be wrong after other changes.
    count, before = (count_replicas(table, num_experts) for table in (slots, search.slots))
    lost = (count == 0) & (before > 0)
    twice = _count_twice(slots, num_experts, len(slowness))
    allowed = taken.any(axis=1) & ~lost.any(axis=1)
    allowed = allowed & (twice <= _count_twice(search.slots, num_experts, len(slowness)))
    if limits.previous is not None and limits.max_moves is not None:
        moves = (slots != limits.previous).astype(jnp.int32).sum(axis=1)
        allowed = allowed & (moves <= limits.max_moves)
    height, value = _divide(slots, load, slowness)
    helps = allowed & (value < search.value - _LEAST_GAIN)

    now = choose_layers(helps, (slots, height, value), search[:3])
    passed = helps | (together == 1)
    return _Search(
        *now,
        jnp.where(helps, together * 2, jnp.maximum(together // 2, 1)),
        search.tried + jnp.where(passed, together, 0),
    )


def _count_twice(slots: Int[Array, "L S"], num_experts: int, num_ranks: int) -> Int[Array, "L"]:
    """Pairs of slots of one rank that hold the same expert."""
    ranks = slots.reshape(len(slots), num_ranks, -1)
    return jnp.where(ranks < num_experts, count_earlier(ranks), 0).sum(axis=(1, 2))


def _divide(slots: Int[Array, "L S"], load: Float[Array, "L E+1 W"], slowness: Float[Array, "P 1"]):
    """Divide the tokens of each expert in proportion to exp(-bias) of its ranks; find the bias."""
    num_layers = len(slots)
    num_experts, num_ranks = load.shape[1] - 1, len(slowness)
    few = gather_replicas(slots, num_experts, num_ranks)
    pick = jax.vmap(lambda table, ids: table[ids])
    tokens = pick(load, slots)  # [L, S, W]
    lone = jnp.ones(slots.shape, jnp.float32)
    lone = jax.vmap(lambda table, ids, used: table.at[ids].add(-used))(
        lone, few.slot, few.used[..., 0]
    )
    fixed = (tokens * lone[..., None]).reshape(num_layers, num_ranks, -1, tokens.shape[2]).sum(2)
    table = exact_matmul(few.by_expert, jnp.swapaxes(few.by_rank, 1, 2))  # [L, X, P]
    by_rank = jnp.swapaxes(table, 1, 2)
    count = few.by_expert.sum(axis=2, keepdims=True)
    tokens = exact_matmul(few.by_expert, pick(tokens, few.slot)) / jnp.maximum(count, 1.0)
    live = (slowness > 0)[None]
    slow = slowness[None]
    most_shared = (exact_matmul(by_rank, tokens) * slow).max(axis=1, keepdims=True)
    stride = _STRIDE / jnp.maximum(most_shared, 1e-6)

    def step(_, state):
        bias, ahead, pace, best, lowest = state
        part = jnp.exp(-jnp.minimum(ahead - ahead.min(axis=1, keepdims=True), 60.0))
        each = tokens / jnp.maximum(exact_matmul(table, part), _TINY)
        height = (fixed + part * exact_matmul(by_rank, each)) * slow
        value = _value(height, live)
        best = jnp.where(value < lowest, height, best)
        push = jnp.where(live, height - 1, 0.0)
        new = ahead + stride * push
        uphill = ((new - bias) * push).sum(axis=1, keepdims=True) < 0
        pace = jnp.where(uphill, 1.0, pace)
        next_pace = (1 + jnp.sqrt(1 + 4 * pace * pace)) / 2
        ahead = new + (pace - 1) / next_pace * (new - bias)
        return new, ahead, next_pace, best, jnp.minimum(value, lowest)

    even = jnp.zeros_like(fixed)
    one = jnp.ones((num_layers, 1, fixed.shape[2]), jnp.float32)
    state = (even, even, one, fixed, one * jnp.inf)
    _, _, _, best, lowest = jax.lax.fori_loop(0, _STEPS, step, state)
    return best, lowest.mean(axis=(1, 2))


def _value(height, live):
    off = jnp.where(live, height - 1, 0.0)
    spread = jnp.sqrt((off * off).mean(axis=1, keepdims=True) + 1e-12)
    return height.max(axis=1, keepdims=True) + _SPREAD * spread
