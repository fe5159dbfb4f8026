"""Balanced: swaps and replacements that lower the fullest rank, under the balanced split.

Axes: W scenarios, L layers, E experts, S slots, P ranks, X experts with several replicas at most,
N = S / P slots of a rank, C candidates.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jax_eplb.planner.changes import NO_LIMITS, Limits
from jax_eplb.planner.prices import promising_changes
from jax_eplb.split import exact_matmul, slowness_of

_MOST_SCENARIOS = 64
_PRICED_SCENARIOS = 16
_STEPS = 12
_TRIES = 8
_SHORTLIST = 64
_PATIENCE = 20  # rounds without a change that helps, before a layer counts as done
_LEAST_GAIN = 1e-5
# The spread of the ranks counts a little: two ranks as full as each other are one change from less.
_SPREAD = 0.1
_STRIDE = 3.2
_TINY = 1e-30


class _Search(NamedTuple):
    slots: Int[Array, "L S"]
    holds: Float[Array, "L E+1 P"]  # 1 where the rank holds the expert
    fixed: Float[Array, "L P W"]  # tokens of experts with one replica
    height: Float[Array, "L P W"]
    value: Float[Array, "L"]


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
    fullest, tell to first order what every change would do; the most promising are tried in turn,
    and each that helps is kept. `scenarios` are shares of the tokens (see `draw_scenarios`). No
    rank gets a second replica of an expert, and none loses its last.

    >>> scenarios = jnp.array([[[0.4, 0.4, 0.1, 0.1]], [[0.1, 0.1, 0.4, 0.4]]])
    >>> refine_balanced(jnp.array([[0, 1, 2, 3]]), scenarios, num_ranks=2, max_rounds=8).tolist()
    [[2, 1, 0, 3]]
    """
    num_layers, num_experts = scenarios.shape[1:]
    num_slots = slot_to_expert.shape[1]
    chosen = scenarios[:: -(-len(scenarios) // _MOST_SCENARIOS)]
    load = jnp.moveaxis(chosen, 0, -1) * num_ranks  # [L, E, W]
    load = jnp.pad(load, ((0, 0), (0, 1), (0, 0)))
    slowness = slowness_of(limits.capacity, num_ranks)
    num_chosen = len(chosen)
    num_some = min(num_chosen, _PRICED_SCENARIOS)
    most = max(num_slots - num_experts, 1)

    layers = jnp.arange(num_layers)[:, None]
    rank = jnp.arange(num_slots, dtype=jnp.int32)[None] // (num_slots // num_ranks)
    holds = jnp.zeros((num_layers, num_experts + 1, num_ranks), jnp.float32)
    holds = holds.at[layers, slot_to_expert, rank].set(1.0).at[:, num_experts].set(0.0)
    single = holds * (holds.sum(axis=2, keepdims=True) == 1).astype(jnp.float32)
    fixed = exact_matmul(jnp.swapaxes(single, 1, 2), load)
    height, value = _divide(holds, load, fixed, slowness, most, _STEPS)
    search = _Search(slot_to_expert, holds, fixed, height, value)

    def play_round(state):
        turn, search, idle = state
        # Some scenarios at a time: cheaper, and what failed is not proposed again and again.
        some = (jnp.arange(num_some, dtype=jnp.int32) * num_chosen // num_some + turn) % num_chosen
        changes = promising_changes(
            search.slots,
            search.holds,
            load[..., some],
            search.height[..., some],
            slowness,
            _SHORTLIST,
        )
        first = (idle * _TRIES) % changes.here.shape[1]  # [L]
        before = search.value

        def attempt(i, search):
            at = jnp.minimum(first + i, changes.here.shape[1] - 1)
            change = jax.tree.map(
                lambda table: jnp.take_along_axis(table, at[:, None], axis=1)[:, 0], changes
            )
            return _try(search, change, load, slowness, most, limits)

        search = jax.lax.fori_loop(0, _TRIES, attempt, search)
        idle = jnp.where(search.value < before, 0, idle + 1)
        return turn + 1, search, idle

    def unfinished(state):
        turn, _, idle = state
        return (turn < max_rounds) & (idle < _PATIENCE).any()

    start = (jnp.int32(0), search, jnp.zeros(num_layers, jnp.int32))
    return jax.lax.while_loop(unfinished, play_round, start)[1].slots


def _try(search: _Search, change, load, slowness, most: int, limits: Limits) -> _Search:
    """Carry out one change in each layer, and keep it where it helps."""
    num_layers, num_slots = search.slots.shape
    per_rank = num_slots // len(slowness)
    layers = jnp.arange(num_layers)
    slots, holds = search.slots, search.holds
    here, there, newcomer = change.here, change.there, change.newcomer
    swap = there >= 0
    other = jnp.where(swap, there, here)
    leaver = slots[layers, here]
    p, q = here // per_rank, other // per_rank
    newcomer = jnp.where(swap, slots[layers, other], newcomer)
    count = holds.sum(axis=2)
    allowed = change.possible & (holds[layers, newcomer, p] == 0)
    allowed = allowed & jnp.where(swap, holds[layers, leaver, q] == 0, count[layers, leaver] > 1)
    new_slots = slots.at[layers, other].set(leaver).at[layers, here].set(newcomer)
    if limits.previous is not None and limits.max_moves is not None:
        moves = (new_slots != limits.previous).astype(jnp.int32).sum(axis=1)
        allowed = allowed & (moves <= limits.max_moves)

    one = allowed.astype(jnp.float32)
    both = one * swap.astype(jnp.float32)
    steps = ((leaver, p, -one), (newcomer, p, one), (leaver, q, both), (newcomer, q, -both))
    new_holds = holds
    for expert, rank, step in steps:
        new_holds = new_holds.at[layers, expert, rank].add(step)

    def alone(table, expert):
        row = table[layers, expert]
        return jnp.where(row.sum(axis=1, keepdims=True) == 1, row, 0.0)[..., None]

    fixed = search.fixed
    for expert in (leaver, newcomer):
        tokens = load[layers, expert][:, None]
        fixed = fixed + (alone(new_holds, expert) - alone(holds, expert)) * tokens
    height, value = _divide(new_holds, load, fixed, slowness, most, _STEPS)
    helps = allowed & (value < search.value - _LEAST_GAIN)
    new = _Search(new_slots, new_holds, fixed, height, value)

    def choose(new, old):
        return jnp.where(helps.reshape(-1, *[1] * (new.ndim - 1)), new, old)

    return jax.tree.map(choose, new, search)


def _divide(holds, load, fixed, slowness, most: int, num_steps: int):
    """Divide the tokens of each expert in proportion to exp(-bias) of its ranks; find the bias."""
    num_layers, num_experts = holds.shape[:2]
    several = holds.sum(axis=2) > 1
    place = jnp.where(several, jnp.cumsum(several, axis=1) - 1, most).astype(jnp.int32)
    ids = jnp.broadcast_to(jnp.arange(num_experts, dtype=jnp.int32)[None], place.shape)
    layers = jnp.arange(num_layers)[:, None]
    experts = jnp.full((num_layers, most), num_experts - 1, jnp.int32)
    experts = experts.at[layers, place].set(ids, mode="drop")
    pick = jax.vmap(lambda table, ids: table[ids])
    table, tokens = pick(holds, experts), pick(load, experts)  # [L, X, P], [L, X, W]
    by_rank = jnp.swapaxes(table, 1, 2)
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
    _, _, _, best, lowest = jax.lax.fori_loop(0, num_steps, step, state)
    return best, lowest.mean(axis=(1, 2))


def _value(height, live):
    off = jnp.where(live, height - 1, 0.0)
    spread = jnp.sqrt((off * off).mean(axis=1, keepdims=True) + 1e-12)
    return height.max(axis=1, keepdims=True) + _SPREAD * spread
