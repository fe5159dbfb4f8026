"""Topology: groups of experts that belong on one node.

Axes: L layers, E experts, G groups, Q nodes, S slots, P ranks. Rank r is on node r // (P / Q).
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jax_eplb.planner.changes import Limits
from jax_eplb.planner.pack import pack
from jax_eplb.planner.refine import refine


def groups_to_nodes(
    load: Float[Array, "L E"],
    *,
    num_groups: int,
    num_nodes: int,
    capacity: Float[Array, "P"] | None = None,
) -> Int[Array, "L E"]:
    """The experts in the order of the nodes that their groups go to, E / Q for each node.

    DeepSeek's hierarchy (deepseek-ai/EPLB): equally many groups to a node, as even as can be found.

    >>> load = jnp.array([[5.0, 5, 1, 1, 4, 4, 2, 2]])
    >>> groups_to_nodes(load, num_groups=4, num_nodes=2).tolist()
    [[0, 1, 2, 3, 4, 5, 6, 7]]
    """
    num_layers, num_experts = load.shape
    total = load.reshape(num_layers, num_groups, -1).sum(axis=-1)
    if capacity is not None:
        capacity = capacity.reshape(num_nodes, -1).sum(axis=1)
    once = jnp.ones_like(total, jnp.int32)
    groups = pack(total, once, num_slots=num_groups, num_ranks=num_nodes, capacity=capacity)
    groups = refine(
        groups, total, num_ranks=num_nodes, max_rounds=num_groups, limits=Limits(capacity)
    )
    groups = jnp.sort(groups.reshape(num_layers, num_nodes, -1), axis=-1)
    member = jnp.arange(num_experts // num_groups, dtype=jnp.int32)
    experts = groups[..., None] * len(member) + member[None, None, None]
    return experts.reshape(num_layers, num_experts)


def home_nodes(order: Int[Array, "L E"], num_nodes: int) -> Int[Array, "L E"]:
    """The node of each expert, from `groups_to_nodes`.

    >>> home_nodes(jnp.array([[2, 3, 0, 1]]), 2).tolist()
    [[1, 1, 0, 0]]
    """
    num_layers, num_experts = order.shape
    node = jnp.arange(num_experts, dtype=jnp.int32) // (num_experts // num_nodes)
    layers = jnp.arange(num_layers)[:, None]
    return jnp.zeros_like(order).at[layers, order].set(jnp.broadcast_to(node, order.shape))


def cross_node_share(
    slot_tokens: Float[Array, "L S"],
    slot_to_expert: Int[Array, "L S"],
    *,
    num_experts: int,
    num_groups: int,
    num_nodes: int,
) -> Float[Array, "L"]:
    """The part of the tokens that is served off the node that serves most of their expert's group.

    0 where each group is on one node. A token of a router that picks few groups then visits few
    nodes; each expert elsewhere may be one more node to visit.

    >>> sizes = dict(num_experts=4, num_groups=2, num_nodes=2)
    >>> table = jnp.array([[0, 2, 1, 3]])
    >>> cross_node_share(jnp.array([[4.0, 2.0, 1.0, 1.0]]), table, **sizes).tolist()
    [0.25]
    """
    num_layers, num_slots = slot_to_expert.shape
    # A slot that holds nothing has no tokens either.
    group = jnp.minimum(slot_to_expert, num_experts - 1) // (num_experts // num_groups)
    node = jnp.arange(num_slots, dtype=jnp.int32) // (num_slots // num_nodes)
    layers = jnp.arange(num_layers)[:, None]
    served = jnp.zeros((num_layers, num_groups, num_nodes))
    served = served.at[layers, group, node[None]].add(slot_tokens)
    total = served.sum(axis=(1, 2))
    at_home = served.max(axis=2).sum(axis=1)
    return jnp.where(total > 0, 1 - at_home / jnp.where(total > 0, total, 1.0), 0.0)


def count_by_node(
    slot_to_expert: Int[Array, "L S"], num_experts: int, num_nodes: int
) -> Int[Array, "L Q E"]:
    """Replicas of each expert on each node.

    >>> count_by_node(jnp.array([[0, 1, 0, 2]]), 3, 2).tolist()
    [[[1, 1, 0], [1, 0, 1]]]
    """
    num_layers, num_slots = slot_to_expert.shape
    node = jnp.arange(num_slots, dtype=jnp.int32) // (num_slots // num_nodes)
    layers = jnp.arange(num_layers)[:, None]
    count = jnp.zeros((num_layers, num_nodes, num_experts), jnp.int32)
    return count.at[layers, node[None], slot_to_expert].add(1, mode="drop")


def nodes_in_force(
    slot_to_expert: Int[Array, "L S"], *, num_experts: int, num_groups: int, num_nodes: int
) -> Int[Array, "L E"]:
    """`groups_to_nodes` of a placement that keeps groups on nodes: the experts by their node.

    >>> table = jnp.array([[2, 3, 0, 1]])
    >>> nodes_in_force(table, num_experts=4, num_groups=2, num_nodes=2).tolist()
    [[2, 3, 0, 1]]
    """
    count = count_by_node(slot_to_expert, num_experts, num_nodes)  # [L, Q, E]
    by_group = count.reshape(*count.shape[:2], num_groups, -1).sum(axis=-1)
    node = jnp.repeat(by_group.argmax(axis=1), num_experts // num_groups, axis=1)
    return jnp.argsort(node, axis=1, stable=True).astype(jnp.int32)
