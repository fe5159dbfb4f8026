"""From previous: the placement in force with few changes, where they are worth it.

Axes: W windows, L layers, E experts, S slots, P ranks, Q nodes.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jax_eplb.planner.effort import effort_of
from jax_eplb.planner.from_load import from_load, node_by_node
from jax_eplb.planner.replan import keep_places, replan
from jax_eplb.planner.sizes import Sizes
from jax_eplb.planner.topology import nodes_in_force

# What a placement in force must be worse by, in imbalance, before any weight is moved.
_WORTH_MOVING = 0.01


def from_previous(
    windows, previous, max_moves, capacity, cross_node_weight, sizes: Sizes, score
) -> tuple[Int[Array, "L S"], Float[Array, "L"]]:
    """The placement in force with changes, or a fresh one if moves are not limited; its score."""
    num_layers, num_experts = windows.shape[1:]
    effort = effort_of(sizes.effort)
    rounds = max(effort.balanced_rounds if sizes.split == "balanced" else sizes.num_slots // 2, 16)
    limit = jnp.full(num_layers, sizes.num_slots) if max_moves is None else max_moves
    if not effort.powers:
        windows = windows.sum(axis=0, keepdims=True)
    on_nodes = sizes.num_groups > 1 and sizes.num_nodes > 1 and cross_node_weight is None
    nodes = sizes.num_nodes if on_nodes else 1

    def change(windows, capacity, table):
        return replan(
            windows,
            table,
            num_ranks=sizes.num_ranks // nodes,
            max_moves=limit // nodes,
            max_rounds=rounds,
            split=sizes.split,
            capacity=capacity,
        )

    if sizes.method == "deepseek" or sizes.num_slots // sizes.num_ranks >= num_experts:
        slots = previous
    elif on_nodes:
        order = nodes_in_force(
            previous,
            num_experts=num_experts,
            num_groups=sizes.num_groups,
            num_nodes=sizes.num_nodes,
        )
        slots = node_by_node(change, order, windows, capacity, previous, nodes)
    else:
        slots = change(windows, capacity, previous)
    slots = keep_places(slots, previous, sizes.num_ranks)
    before, after = score(previous), score(slots)
    if max_moves is None:
        fresh = keep_places(
            from_load(windows, capacity, cross_node_weight, sizes), previous, sizes.num_ranks
        )
        reached = score(fresh)
        better = reached < after - _WORTH_MOVING
        slots = jnp.where(better[:, None], fresh, slots)
        after = jnp.where(better, reached, after)
    # A placement that holds what it must, and is as good, stays.
    live = jnp.ones(sizes.num_ranks, bool) if capacity is None else capacity > 0
    live = jnp.repeat(live, sizes.num_slots // sizes.num_ranks)[None]
    amiss = ((previous < num_experts) != live).any(axis=1)
    worth = (before - after > _WORTH_MOVING) | amiss
    return jnp.where(worth[:, None], slots, previous), jnp.where(worth, after, before)
