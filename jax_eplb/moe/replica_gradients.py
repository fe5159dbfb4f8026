"""Gradients of replicas: each slot gets its expert's whole gradient, whichever slots served.

Without it an optimizer would move the replicas of an expert apart, and the placement would begin
to show in the output. Axes: S slots, N slots per rank, E experts, X = min(N, S - E) experts whose
gradients travel at once.
"""

import functools

import jax
import jax.numpy as jnp

from jax_eplb.routing import Ranks
from jax_eplb.tables import PlacementTables


def tie_replicas(weights, tables: PlacementTables, ranks: Ranks):
    """The weights, a tree of arrays [N, …], unchanged; their gradients summed over replicas.

    Inside `shard_map`. No rank ever holds more gradients of others than its own bank's size.
    """
    if len(tables.slot_to_expert) == len(tables.replica_count):
        return weights  # every expert has one slot
    return _identity(ranks, weights, tables)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _identity(ranks: Ranks, weights, tables: PlacementTables):
    return weights


def _identity_forward(ranks, weights, tables):
    return weights, tables


def _identity_backward(ranks: Ranks, tables: PlacementTables, grads):
    num_slots, num_experts = len(tables.slot_to_expert), len(tables.replica_count)
    most = num_slots - num_experts  # experts with replicas
    at_once = min(ranks.slots_per_rank, most)
    several = jnp.nonzero(tables.replica_count > 1, size=most, fill_value=num_experts)[0]
    several = jnp.pad(several, (0, at_once), constant_values=num_experts)
    first_slot = jax.lax.axis_index(ranks.axis_name) * ranks.slots_per_rank
    own = jax.lax.dynamic_slice_in_dim(tables.slot_to_expert, first_slot, ranks.slots_per_rank)

    def body(i, grads):
        experts = jax.lax.dynamic_slice_in_dim(several, i * at_once, at_once)
        member = own[:, None] == experts[None]  # [N, X]; an expert past the last is nobody's
        is_member = member.any(axis=1)

        def one(grad):
            mask = member.astype(grad.dtype)
            # Sums, not products: a GPU must not round them to TF32.
            einsum = functools.partial(jnp.einsum, precision="highest")
            total = jax.lax.psum(einsum("nx,n...->x...", mask, grad), ranks.axis_name)
            summed = einsum("nx,x...->n...", mask, total)
            return jnp.where(is_member.reshape(-1, *(1,) * (grad.ndim - 1)), summed, grad)

        return jax.tree.map(one, grads)

    return jax.lax.fori_loop(0, -(-most // at_once), body, grads), None


_identity.defvjp(_identity_forward, _identity_backward)
