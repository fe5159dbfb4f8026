"""Replan: from a placement in force, few moved slots.

Axes: W windows, L layers, E experts, S slots, P ranks, N = S / P slots of a rank.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jax_eplb.planner.balanced import refine_balanced
from jax_eplb.planner.changes import Limits, count_earlier
from jax_eplb.planner.choose import lowest_of
from jax_eplb.planner.refine import refine
from jax_eplb.planner.scenarios import draw_scenarios, enough_scenarios, power_mean
from jax_eplb.planner.score import even_heights
from jax_eplb.planner.spread import spread_over_nodes
from jax_eplb.planner.windows import refine_windows
from jax_eplb.split import count_replicas

# A single change must lower the fullest rank by this part, or it is not worth its move.
_LEAST_GAIN = 1e-4
# With windows: the power of their mean that replicas are first chosen for, and the part of the
# moves that this may take.
_WAYS = ((1.0, 0.5), (3.0, 1.0), (6.0, 0.5), (2.0, 0.25))
# Half of a fresh plan's: what starts from a placement in force runs while the model serves.
_BALANCED_SCENARIOS = 32


def count_moves(
    slot_to_expert: Int[Array, "L S"], previous: Int[Array, "L S"], num_experts: int
) -> Int[Array, "L"]:
    """Slots whose expert changes; one that is emptied needs no weights and does not count.

    >>> count_moves(jnp.array([[0, 1, 2, 3]]), jnp.array([[0, 2, 1, 3]]), 3).tolist()
    [2]
    """
    moved = (slot_to_expert != previous) & (slot_to_expert < num_experts)
    return moved.astype(jnp.int32).sum(axis=1)


@functools.partial(jax.jit, static_argnames=("num_ranks", "split", "max_rounds"))
def replan(
    windows: Float[Array, "W L E"],
    previous: Int[Array, "L S"],
    *,
    num_ranks: int,
    max_moves: Int[Array, "L"],
    max_rounds: int,
    split: str = "even",
    capacity: Float[Array, "P"] | None = None,
) -> Int[Array, "L S"]:
    """Change at most `max_moves` slots of each layer, those first that lower the fullest rank most.

    Swaps and replacements as in `refine`, `refine_windows` and `refine_balanced`, which start from
    the placement in force. Experts that only ranks of capacity 0 held are put elsewhere first, and
    empty slots of ranks that came back are filled; these moves are made even if they are too many.
    """
    mean = windows.sum(axis=0)
    start, limits = _repair_in_force(mean, previous, num_ranks, max_moves, capacity)
    if split == "balanced":
        scenarios = draw_scenarios(windows, num_scenarios=_BALANCED_SCENARIOS)
        return refine_balanced(
            start, scenarios, num_ranks=num_ranks, max_rounds=max_rounds, limits=limits
        )
    if len(windows) == 1:
        return _refine_sum(start, mean, num_ranks, max_rounds, limits)
    scenarios = draw_scenarios(windows, num_scenarios=enough_scenarios(len(windows)))

    def replan_in(way):
        power, part = way
        first = (limits.max_moves * part).astype(jnp.int32)
        load = power_mean(scenarios, power)
        slots = _refine_sum(start, load, num_ranks, max_rounds, limits._replace(max_moves=first))
        slots = refine_windows(
            slots, scenarios, num_ranks=num_ranks, max_rounds=max_rounds, limits=limits
        )
        height = even_heights(scenarios, slots, num_ranks, capacity).max(axis=-1).mean(axis=0)
        return slots, height

    candidates, heights = jax.lax.map(replan_in, jnp.array(_WAYS, jnp.float32))
    return lowest_of(candidates, heights, 1)[0]


def _repair_in_force(
    load, previous, num_ranks: int, max_moves, capacity
) -> tuple[Int[Array, "L S"], Limits]:
    """The placement in force on the ranks that there are, and what may still move from it."""
    speeds = jnp.ones(num_ranks) if capacity is None else capacity
    start = repair(load, previous, num_ranks=num_ranks, capacity=speeds)
    forced = count_moves(start, previous, load.shape[1])
    # An emptied slot differs from `previous` but is no move.
    return start, Limits(capacity, start, jnp.maximum(max_moves - forced, 0))


def _refine_sum(start, load, num_ranks: int, max_rounds: int, limits: Limits):
    return refine(
        start,
        load,
        num_ranks=num_ranks,
        max_rounds=max_rounds,
        replace=True,
        limits=limits,
        least_gain=_LEAST_GAIN,
    )


def replan_over_nodes(
    load: Float[Array, "L E"],
    start: Int[Array, "L S"],
    previous: Int[Array, "L S"],
    *,
    num_ranks: int,
    num_nodes: int,
    max_moves: Int[Array, "L"],
    capacity: Float[Array, "P"] | None = None,
    least: int | None = None,
    home: Int[Array, "L E"] | None = None,
    cross_node_weight: Float[Array, ""] | None = None,
) -> Int[Array, "L S"]:
    """Change `start` as in `replan`, for nodes: by swaps alone, under the even split of one load.

    With `least`, replicas are spread over nodes first (see `spread_over_nodes`) and stay so; with
    `home` and a weight, tokens served off their expert's home node have a price (see `refine`).
    `max_moves` counts from `previous`, moves that repairs force apart.
    """
    _, limits = _repair_in_force(load, previous, num_ranks, max_moves, capacity)
    speeds = jnp.ones(num_ranks) if capacity is None else capacity
    start = repair(load, start, num_ranks=num_ranks, capacity=speeds)
    if least is not None:
        start = spread_over_nodes(
            start, load, num_ranks=num_ranks, num_nodes=num_nodes, limits=limits, least=least
        )
    return refine(
        start,
        load,
        num_ranks=num_ranks,
        max_rounds=start.shape[1],
        limits=limits._replace(home=home, cross_node_weight=cross_node_weight),
        num_nodes=num_nodes,
        spread=least is not None,
        least_gain=_LEAST_GAIN,
    )


def keep_places(
    slot_to_expert: Int[Array, "L S"], previous: Int[Array, "L S"], num_ranks: int
) -> Int[Array, "L S"]:
    """Reorder each rank's slots so that an expert that was there keeps its place.

    >>> keep_places(jnp.array([[2, 1, 4, 0]]), jnp.array([[0, 2, 3, 4]]), 2).tolist()
    [[1, 2, 0, 4]]
    """
    shape = (*slot_to_expert.shape[:1], num_ranks, -1)
    new, old = slot_to_expert.reshape(shape), previous.reshape(shape)
    match = _as_distinct(new)[..., :, None] == _as_distinct(old)[..., None, :]
    stays, kept = match.any(axis=-1), match.any(axis=-2)  # of new, of old
    # The i-th newcomer goes to the i-th place that is free.
    newcomers = jnp.argsort(stays, axis=-1, stable=True)
    turn = jnp.cumsum(~kept, axis=-1) - 1
    comes = jnp.take_along_axis(new, newcomers, axis=-1)
    comes = jnp.take_along_axis(comes, jnp.maximum(turn, 0), axis=-1)
    return jnp.where(kept, old, comes).reshape(slot_to_expert.shape)


def _as_distinct(experts: Int[Array, "L P N"]) -> Int[Array, "L P N"]:
    """Another number for each replica of an expert on one rank, the same for its first ones."""
    return experts * experts.shape[-1] + count_earlier(experts)


@functools.partial(jax.jit, static_argnames="num_ranks")
def repair(
    load: Float[Array, "L E"],
    slot_to_expert: Int[Array, "L S"],
    *,
    num_ranks: int,
    capacity: Float[Array, "P"],
) -> Int[Array, "L S"]:
    """Empty the ranks that are gone, fill those that came back, place the experts that are lost.

    A slot holding E is empty. A lost expert takes an empty slot or the place of the replica whose
    expert has most to spare; an empty slot gets a replica of the hottest expert not on that rank.

    >>> gone = jnp.array([1.0, 1.0, 0.0])
    >>> table = jnp.array([[0, 1, 0, 2, 1, 3]])
    >>> repair(jnp.ones((1, 4)), table, num_ranks=3, capacity=gone).tolist()
    [[3, 1, 0, 2, 4, 4]]
    """
    num_experts = load.shape[1]
    num_slots = slot_to_expert.shape[1]
    per_rank = num_slots // num_ranks
    live = jnp.repeat(capacity > 0, per_rank)[None]
    rank = jnp.arange(num_slots, dtype=jnp.int32) // per_rank

    def put_one(slots, load):
        count = count_replicas(slots[None], num_experts)[0]
        empty = live[0] & (slots >= num_experts)
        lost = count == 0
        by_rank = slots.reshape(num_ranks, per_rank)
        claim = jnp.where(lost, jnp.inf, load / jnp.maximum(count, 1).astype(jnp.float32))
        # Of a replica: what the others of its expert would have to take.
        spare = count.at[slots].get(mode="fill", fill_value=0) > 1
        extra = (load / jnp.maximum(count - 1, 1).astype(jnp.float32)).at[slots]
        price = jnp.where(spare & live[0], extra.get(mode="fill", fill_value=jnp.inf), jnp.inf)
        price = jnp.where(empty, -1.0, price)
        slot = jnp.argmin(price)
        holds = jax.nn.one_hot(by_rank[rank[slot]], num_experts, dtype=jnp.bool_).any(axis=0)
        expert = jnp.argmax(jnp.where(holds & ~lost, -1.0, claim)).astype(slots.dtype)
        wanted = (empty.any() | lost.any()) & (price[slot] < jnp.inf)
        return jnp.where(wanted, slots.at[slot].set(expert), slots), wanted

    def step(state):
        tries, _, slots = state
        slots, changed = jax.vmap(put_one)(slots, load)
        return tries + 1, changed.any(), slots

    start = jnp.where(live, slot_to_expert, num_experts)
    state = (0, jnp.bool_(True), start)
    return jax.lax.while_loop(lambda s: s[1] & (s[0] < num_slots), step, state)[2]
