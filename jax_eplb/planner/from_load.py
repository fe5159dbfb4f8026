"""From load: a fresh placement, with the topology that is asked for.

Axes: W windows, L layers, E experts, S slots, P ranks, Q nodes.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jax_eplb.planner.changes import Limits
from jax_eplb.planner.deepseek import deepseek_plan
from jax_eplb.planner.effort import effort_of
from jax_eplb.planner.fresh import (
    Room,
    every_expert_everywhere,
    fresh_balanced,
    fresh_even,
    fresh_windows,
)
from jax_eplb.planner.refine import refine
from jax_eplb.planner.sizes import Sizes
from jax_eplb.planner.spread import spread_over_nodes
from jax_eplb.planner.topology import groups_to_nodes, home_nodes


def from_load(windows, capacity, cross_node_weight, sizes: Sizes) -> Int[Array, "L S"]:
    """A placement from load alone, with the topology that is asked for."""
    load = windows.sum(axis=0)
    if sizes.method == "deepseek":
        return deepseek_plan(
            load,
            num_slots=sizes.num_slots,
            num_ranks=sizes.num_ranks,
            num_nodes=sizes.num_nodes,
            num_groups=sizes.num_groups,
        )
    home = None
    if sizes.num_groups == 1 or sizes.num_nodes == 1:
        slots = _search(windows, capacity, sizes)
    else:
        order = groups_to_nodes(
            load, num_groups=sizes.num_groups, num_nodes=sizes.num_nodes, capacity=capacity
        )
        slots = _on_nodes(windows, capacity, order, sizes)
        home = home_nodes(order, sizes.num_nodes)
    if not sizes.spread and cross_node_weight is None:
        return slots
    if sizes.spread:
        slots = spread_over_nodes(
            slots,
            load,
            num_ranks=sizes.num_ranks,
            num_nodes=sizes.num_nodes,
            limits=Limits(capacity),
            least=sizes.least(load.shape[1]),
        )
    return refine(
        slots,
        load,
        num_ranks=sizes.num_ranks,
        max_rounds=sizes.num_slots,
        limits=Limits(capacity, home=home, cross_node_weight=cross_node_weight),
        num_nodes=sizes.num_nodes,
        spread=sizes.spread,
    )


def _search(windows, capacity, sizes: Sizes) -> Int[Array, "L S"]:
    """The search for the split, the effort and the number of windows."""
    _, num_layers, num_experts = windows.shape
    effort = effort_of(sizes.effort)
    room = Room(sizes.num_slots, sizes.num_ranks, capacity, sizes.least(num_experts))
    if sizes.num_slots // sizes.num_ranks >= num_experts:
        return every_expert_everywhere(num_layers, num_experts, room)
    if sizes.searched_split(num_experts) == "balanced":
        return fresh_balanced(windows, room, effort)
    if len(windows) == 1 or not effort.powers:
        return fresh_even(windows.sum(axis=0), room, effort)
    return fresh_windows(windows, room, effort)


def _on_nodes(windows, capacity, order, sizes: Sizes) -> Int[Array, "L S"]:
    """Each node for itself, with the experts whose groups belong there."""
    on_node = sizes._replace(
        num_slots=sizes.num_slots // sizes.num_nodes,
        num_ranks=sizes.num_ranks // sizes.num_nodes,
        num_nodes=1,
        num_groups=1,
    )
    return node_by_node(
        lambda windows, capacity, _: _search(windows, capacity, on_node),
        order,
        windows,
        capacity,
        None,
        sizes.num_nodes,
    )


def node_by_node(
    plan_node, order: Int[Array, "L E"], windows, capacity, table, num_nodes: int
) -> Int[Array, "L S"]:
    """Plan each node as if it were all there is, its experts numbered from 0."""
    _, num_layers, num_experts = windows.shape
    by_node = order.reshape(num_layers, num_nodes, -1).swapaxes(0, 1)  # [Q, L, E / Q]
    per_node = num_experts // num_nodes
    loads = jax.vmap(
        lambda experts: jnp.take_along_axis(windows, experts[None], axis=2), out_axes=0
    )(by_node)
    speeds = None if capacity is None else capacity.reshape(num_nodes, -1)
    tables = None
    if table is not None:
        layers = jnp.arange(num_layers)[:, None]
        place = jnp.broadcast_to(jnp.arange(num_experts, dtype=jnp.int32), order.shape)
        place = jnp.zeros_like(order).at[layers, order].set(place)
        place = jnp.take_along_axis(place, table, axis=1, mode="fill", fill_value=num_experts)
        by_rank = place.reshape(num_layers, num_nodes, -1).swapaxes(0, 1)
        first = per_node * jnp.arange(num_nodes, dtype=jnp.int32)[:, None, None]
        own = (by_rank >= first) & (by_rank < first + per_node)
        # An expert that belongs on another node leaves an empty slot.
        tables = jnp.where(own, by_rank - first, per_node)
    slots = jax.vmap(plan_node)(loads, speeds, tables)  # [Q, L, S / Q]
    experts = jnp.take_along_axis(by_node, slots, axis=2, mode="fill", fill_value=num_experts)
    return experts.swapaxes(0, 1).reshape(num_layers, -1)
