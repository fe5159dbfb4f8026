"""From previous: the placement in force with few changes, where they are worth it.

Axes: W windows, L layers, E experts, S slots, P ranks, Q nodes.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jax_eplb.planner.choose import choose_layers
from jax_eplb.planner.effort import effort_of, rounds_for_balanced
from jax_eplb.planner.from_load import from_load, node_by_node
from jax_eplb.planner.replan import count_moves, keep_places, repair, replan, replan_over_nodes
from jax_eplb.planner.sizes import Sizes
from jax_eplb.planner.spread import at_risk
from jax_eplb.planner.topology import cross_node_share, home_nodes, nodes_in_force
from jax_eplb.split import count_replicas, even_split

# What a placement in force must be worse by, in imbalance, before any weight is moved.
_WORTH_MOVING = 0.01


class _Candidate(NamedTuple):
    slots: Int[Array, "L S"]
    imbalance: Float[Array, "L"]
    cost: Float[Array, "L"]  # the imbalance, and the price of the tokens served off their nodes
    at_risk: Int[Array, "L"]  # experts whose replicas should be on two nodes and are not


def from_previous(
    windows, previous, max_moves, capacity, cross_node_weight, sizes: Sizes, score
) -> tuple[Int[Array, "L S"], Float[Array, "L"]]:
    """The placement in force with changes, or a fresh one if moves are not limited; its score."""
    num_layers, num_experts = windows.shape[1:]
    if sizes.split == "even" and not effort_of(sizes.effort).powers:
        windows = windows.sum(axis=0, keepdims=True)
    load = windows.sum(axis=0)
    groups = {"num_experts": num_experts, "num_nodes": sizes.num_nodes}
    groups["num_groups"] = sizes.num_groups

    def away(slots):
        return cross_node_share(even_split(load, slots, num_experts), slots, **groups)

    def candidate(slots):
        imbalance = cost = score(slots)
        if cross_node_weight is not None:
            cost = cost + cross_node_weight * away(slots)
        risk = jnp.zeros(num_layers, jnp.int32)
        if sizes.spread:
            least = sizes.least(num_experts)
            each = at_risk(slots, num_experts=num_experts, num_nodes=sizes.num_nodes, least=least)
            risk = each.astype(jnp.int32).sum(axis=1)
        return _Candidate(slots, imbalance, cost, risk)

    before = candidate(previous)
    limit = jnp.full(num_layers, sizes.num_slots) if max_moves is None else max_moves
    changed = [
        candidate(keep_places(slots, previous, sizes.num_ranks))
        for slots in _changed(windows, previous, limit, capacity, cross_node_weight, sizes)
    ]
    best = changed[0]
    for other in changed[1:]:
        best = choose_layers(_better(other, best), other, best)
    if max_moves is None:
        fresh = from_load(windows, capacity, cross_node_weight, sizes)
        fresh = candidate(keep_places(fresh, previous, sizes.num_ranks))
        best = choose_layers(_better(fresh, best, _WORTH_MOVING), fresh, best)

    # A placement that holds what it must, and is as good, stays.
    live = jnp.ones(sizes.num_ranks, bool) if capacity is None else capacity > 0
    live = jnp.repeat(live, sizes.num_slots // sizes.num_ranks)[None]
    amiss = ((previous < num_experts) != live).any(axis=1)
    held = jnp.where(live, previous, num_experts)
    amiss = amiss | (count_replicas(held, num_experts) == 0).any(axis=1)
    better = _better(best, before, _WORTH_MOVING)
    if _groups_are_kept(cross_node_weight, sizes):
        # To bring the groups to nodes may take more moves than there are.
        better = better | (away(previous) > 0)
        better = better & (count_moves(best.slots, previous, num_experts) <= limit)
    best = choose_layers(better | amiss, best, before)
    return best.slots, best.imbalance


def _better(one: _Candidate, other: _Candidate, by: float = 0.0) -> Bool[Array, "L"]:
    safer = one.at_risk < other.at_risk
    return safer | ((one.at_risk == other.at_risk) & (one.cost < other.cost - by))


def _groups_are_kept(cross_node_weight, sizes: Sizes) -> bool:
    return sizes.num_groups > 1 and sizes.num_nodes > 1 and cross_node_weight is None


def _changed(
    windows, previous, limit, capacity, cross_node_weight, sizes: Sizes
) -> list[Int[Array, "L S"]]:
    """The placement in force with at most so many changes, in one way or two."""
    num_experts = windows.shape[2]
    effort = effort_of(sizes.effort)
    load = windows.sum(axis=0)
    if sizes.method == "deepseek":
        return [previous]
    if sizes.num_slots // sizes.num_ranks >= num_experts:
        # Every rank has room for all, so there is nothing to search for.
        speeds = jnp.ones(sizes.num_ranks) if capacity is None else capacity
        return [repair(load, previous, num_ranks=sizes.num_ranks, capacity=speeds)]

    def change(windows, capacity, table, limit=limit, nodes=1):
        part = sizes._replace(
            num_slots=sizes.num_slots // nodes, num_ranks=sizes.num_ranks // nodes
        )
        split = part.searched_split(num_experts // nodes)
        rounds = max(sizes.num_slots // 2, 16)
        if split == "balanced":
            # Far fewer than from scratch: this is what runs while the model serves.
            rounds = rounds_for_balanced(effort, len(previous), sizes.num_slots, sizes.num_ranks)
            rounds = max(rounds // 4, 1)
        return replan(
            windows,
            table,
            num_ranks=part.num_ranks,
            max_moves=limit // nodes,
            max_rounds=rounds,
            split=split,
            capacity=capacity,
        )

    home = None
    if sizes.num_groups > 1 and sizes.num_nodes > 1:
        nodes = sizes.num_nodes
        order = nodes_in_force(
            previous, num_experts=num_experts, num_groups=sizes.num_groups, num_nodes=nodes
        )
        home = home_nodes(order, nodes)
        if cross_node_weight is None:

            def change_node(windows, capacity, table):
                return change(windows, capacity, table, nodes=nodes)

            return [node_by_node(change_node, order, windows, capacity, previous, nodes)]
    if not sizes.spread and home is None:
        return [change(windows, capacity, previous)]

    # A search that knows no nodes replicates better. It gets half of the moves: the others bring
    # back what it should have left on its node, or on two. What it cannot keep, swaps alone can.
    half = jnp.where(limit < sizes.num_slots, limit // 2, limit)
    free = change(windows, capacity, previous, limit=half)
    return list(
        jax.lax.map(
            lambda start: replan_over_nodes(
                load,
                start,
                previous,
                num_ranks=sizes.num_ranks,
                num_nodes=sizes.num_nodes,
                max_moves=limit,
                capacity=capacity,
                least=sizes.least(num_experts) if sizes.spread else None,
                home=home,
                cross_node_weight=cross_node_weight,
            ),
            jnp.stack([previous, free]),
        )
    )
