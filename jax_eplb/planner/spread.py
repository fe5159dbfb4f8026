"""Spread: replicas of an expert on two nodes at least, so that the loss of a node loses no expert.

Axes: L layers, E experts, Q nodes, S slots, P ranks, N = S / P slots of a rank.
Rank r is on node r // (P / Q).
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jax_eplb.planner.changes import NO_LIMITS, Limits, moves_of_swap
from jax_eplb.planner.topology import count_by_node
from jax_eplb.split import slowness_of


def at_risk(
    slot_to_expert: Int[Array, "L S"], *, num_experts: int, num_nodes: int, least: int = 1
) -> Bool[Array, "L E"]:
    """Experts with several replicas, all of them on one node, or with fewer than `least`.

    >>> table = jnp.array([[0, 0, 1, 2]])
    >>> at_risk(table, num_experts=3, num_nodes=2).tolist()
    [[True, False, False]]
    >>> at_risk(table, num_experts=3, num_nodes=2, least=2).tolist()
    [[True, True, True]]
    """
    return _at_risk(count_by_node(slot_to_expert, num_experts, num_nodes), least)


def _at_risk(count: Int[Array, "... Q E"], least: int) -> Bool[Array, "... E"]:
    total = count.sum(axis=-2)
    return ((total > 1) & (count.max(axis=-2) == total)) | (total < least)


@functools.partial(jax.jit, static_argnames=("num_ranks", "num_nodes", "least"))
def spread_over_nodes(
    slot_to_expert: Int[Array, "L S"],
    load: Float[Array, "L E"],
    *,
    num_ranks: int,
    num_nodes: int,
    limits: Limits = NO_LIMITS,
    least: int = 1,
) -> Int[Array, "L S"]:
    """Swap slots between nodes until no expert is at risk (see `at_risk`).

    At most E changes a layer; each brings one expert to a second node, puts no other at risk, and
    leaves the fuller of the ranks that it touches emptiest. Where no such swap is left, a replica
    of an expert that has three or more is replaced. Where neither is possible, or would move more
    slots than `limits` allow, the layer stays as it is.

    >>> table, load = jnp.array([[0, 1, 0, 1, 2, 3, 2, 3]]), jnp.ones((1, 4))
    >>> spread_over_nodes(table, load, num_ranks=4, num_nodes=2).tolist()
    [[2, 3, 0, 1, 0, 1, 2, 3]]
    """
    num_layers, num_experts = load.shape
    num_slots = slot_to_expert.shape[1]
    per_rank = num_slots // num_ranks
    slowness = slowness_of(limits.capacity, num_ranks)[:, 0]
    rank = jnp.arange(num_slots, dtype=jnp.int32) // per_rank
    node = rank // (num_ranks // num_nodes)
    ids = jnp.arange(num_experts, dtype=jnp.int32)
    previous, most = slot_to_expert, jnp.full(num_layers, 2 * num_slots, jnp.int32)
    if limits.previous is not None and limits.max_moves is not None:
        previous, most = limits.previous, limits.max_moves

    def one_change(slots, load, previous, most):
        def of_slot(table, fill):
            return table.at[..., slots].get(mode="fill", fill_value=fill)

        count = count_by_node(slots[None], num_experts, num_nodes)[0]  # [Q, E]
        total = count.sum(axis=0)
        wanting = _at_risk(count, least)
        share = load / jnp.maximum(total, 1).astype(jnp.float32)
        weight = of_slot(share, 0.0)
        height = jnp.zeros(num_ranks).at[rank].add(weight)[rank]  # [S], of the slot's rank
        slow = slowness[rank]
        moved = (slots != previous).astype(jnp.int32)
        left = most - moved.sum()
        there, others = of_slot(count, 0), of_slot(total, 0) - 1  # [Q, S], [S]

        # Slot s, of an expert at risk, swapped with slot t of another node.
        experts = slots.reshape(num_ranks, per_rank)
        holds = (experts[:, :, None] == slots[None, None]).any(axis=1)  # [P, S], the slot's expert
        fits = ~holds[rank] & ~holds[rank].T  # [S, S]: t's expert not on s's rank, and back
        # t's expert, once moved to the node of s, must not have all of its replicas there.
        joins = (there[node] == others[None]) & (others > 0)[None]  # [S, S]
        cost = moves_of_swap(slots[:, None], slots[None], previous[:, None], previous[None])
        allowed = fits & (node[:, None] != node[None]) & ~joins & (cost <= left)
        allowed = allowed & (of_slot(wanting, False) & (others > 0))[:, None]
        allowed = allowed & (slots < num_experts)[None] & (slow > 0)[None]
        gain = weight[:, None] - weight[None]  # what t's rank gets
        swapped = jnp.maximum(
            (height[:, None] - gain) * slow[:, None], (height[None] + gain) * slow[None]
        )
        swapped = jnp.where(allowed, swapped, jnp.inf)
        s, t = jnp.unravel_index(swapped.argmin(), swapped.shape)

        # Slot u given to an expert at risk that its node has none of. What the others of the expert
        # that leaves have to take is not looked at.
        here = (jnp.arange(num_nodes)[:, None] == node[None]).astype(jnp.int32)
        after_loss = (there - here).max(axis=0)
        spare = (others > 1) & (after_loss < others) & (slots < num_experts) & (slow > 0)
        cost = (ids[:, None] != previous[None]).astype(jnp.int32) - moved[None]  # [E, S]
        allowed = wanting[:, None] & spare[None] & (count[node].T == 0) & (cost <= left)
        newcomer = load / (total + 1).astype(jnp.float32)
        replaced = (height[None] + newcomer[:, None] - weight[None]) * slow[None]
        replaced = jnp.where(allowed, replaced, jnp.inf)
        e, u = jnp.unravel_index(replaced.argmin(), replaced.shape)

        swap, replace = swapped.min() < jnp.inf, replaced.min() < jnp.inf
        new = slots.at[s].set(slots[t]).at[t].set(slots[s])
        new = jnp.where(swap, new, jnp.where(replace, slots.at[u].set(ids[e]), slots))
        return new, swap | replace

    def step(state):
        changes, _, slots = state
        slots, changed = jax.vmap(one_change)(slots, load, previous, most)
        return changes + 1, changed.any(), slots

    start = (0, jnp.bool_(True), slot_to_expert)
    return jax.lax.while_loop(lambda s: s[1] & (s[0] < num_experts), step, start)[2]
