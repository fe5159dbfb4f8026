"""Topology: groups of experts that belong on one node, and replicas that belong on several.

Axes: L layers, E experts, G groups, Q nodes, S slots, P ranks, N = S / P slots of a rank.
Rank r is on node r // (P / Q).
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jax_eplb.planner.changes import Limits
from jax_eplb.planner.pack import pack
from jax_eplb.planner.refine import refine
from jax_eplb.split import slowness_of


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


def concentrated(
    slot_to_expert: Int[Array, "L S"], *, num_experts: int, num_nodes: int
) -> Bool[Array, "L E"]:
    """Experts with several replicas, all of them on one node.

    >>> concentrated(jnp.array([[0, 0, 1, 2]]), num_experts=3, num_nodes=2).tolist()
    [[True, False, False]]
    """
    count = _count_by_node(slot_to_expert, num_experts, num_nodes)
    total = count.sum(axis=1)
    return (total > 1) & (count.max(axis=1) == total)


@functools.partial(jax.jit, static_argnames=("num_ranks", "num_nodes"))
def spread_over_nodes(
    slot_to_expert: Int[Array, "L S"],
    load: Float[Array, "L E"],
    *,
    num_ranks: int,
    num_nodes: int,
    capacity: Float[Array, "P"] | None = None,
) -> Int[Array, "L S"]:
    """Swap slots between nodes until no expert has all of its several replicas on one node.

    Losing a node then loses no expert that has two replicas. At most E swaps a layer; each brings
    one expert to a second node, without concentrating the other expert that it moves, and leaves
    the fuller of the two ranks emptiest. Where no such swap is left the layer stays as it is.

    >>> table, load = jnp.array([[0, 1, 0, 1, 2, 3, 2, 3]]), jnp.ones((1, 4))
    >>> spread_over_nodes(table, load, num_ranks=4, num_nodes=2).tolist()
    [[2, 3, 0, 1, 0, 1, 2, 3]]
    """
    num_experts, num_slots = load.shape[1], slot_to_expert.shape[1]
    per_rank = num_slots // num_ranks
    slowness = slowness_of(capacity, num_ranks)[:, 0]
    rank = jnp.arange(num_slots, dtype=jnp.int32) // per_rank
    node = rank // (num_ranks // num_nodes)

    def one_swap(slots, load):
        count = _count_by_node(slots[None], num_experts, num_nodes)[0]  # [Q, E]
        total = count.sum(axis=0)
        stuck = (total > 1) & (count.max(axis=0) == total)
        expert = jnp.argmax(stuck).astype(jnp.int32)
        mine = slots == expert
        share = load / jnp.maximum(total, 1).astype(jnp.float32)
        weight = share.at[slots].get(mode="fill", fill_value=0.0)
        height = jnp.zeros(num_ranks).at[rank].add(weight)
        # The swap of slot s, one of the expert's, with slot t.
        experts = slots.reshape(num_ranks, per_rank)
        holds = (experts[:, :, None] == slots[None, None]).any(axis=1)  # [P, S], the slot's expert
        fits = ~holds[rank] & ~holds[rank].T  # [S, S]: t's expert not on s's rank, and back
        there = count.at[:, slots].get(mode="fill", fill_value=0)  # [Q, S]
        others = total.at[slots].get(mode="fill", fill_value=0) - 1
        # t's expert, once moved to the node of s, must not have all of its replicas there.
        joins = there[node] == others[None]  # [S, S]
        allowed = fits & (node[:, None] != node[None]) & ~(joins & (others > 0)[None])
        allowed = allowed & mine[:, None] & (slots < num_experts)[None] & (slowness[rank] > 0)[None]
        gain = weight[:, None] - weight[None]  # what t's rank gets
        after = jnp.maximum(
            (height[rank][:, None] - gain) * slowness[rank][:, None],
            (height[rank][None] + gain) * slowness[rank][None],
        )
        after = jnp.where(allowed, after, jnp.inf)
        best = jnp.argmin(after)
        s, t = best // num_slots, best % num_slots
        possible = stuck.any() & (after.min() < jnp.inf)
        swapped = slots.at[s].set(slots[t]).at[t].set(slots[s])
        return jnp.where(possible, swapped, slots), possible

    def step(state):
        swaps, _, slots = state
        slots, swapped = jax.vmap(one_swap)(slots, load)
        return swaps + 1, swapped.any(), slots

    start = (0, jnp.bool_(True), slot_to_expert)
    return jax.lax.while_loop(lambda s: s[1] & (s[0] < num_experts), step, start)[2]


def _count_by_node(
    slot_to_expert: Int[Array, "L S"], num_experts: int, num_nodes: int
) -> Int[Array, "L Q E"]:
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
    count = _count_by_node(slot_to_expert, num_experts, num_nodes)  # [L, Q, E]
    by_group = count.reshape(*count.shape[:2], num_groups, -1).sum(axis=-1)
    node = jnp.repeat(by_group.argmax(axis=1), num_experts // num_groups, axis=1)
    return jnp.argsort(node, axis=1, stable=True).astype(jnp.int32)
