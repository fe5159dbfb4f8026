"""Expert weights on the mesh: made there, placed from expert order, and read back.

Axes: L layers, E experts, S slots. The slot axis of a bank of weights is sharded over the expert
axis of the mesh; a layer's bank is [S, …], a stack of layers' is [L, S, …].
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, Sharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, PRNGKeyArray


@functools.partial(jax.jit, static_argnames=("init_one", "mesh", "spec"))
def init_experts(
    key: PRNGKeyArray,
    slot_to_expert: Int[Array, "S"],
    init_one: Callable[[PRNGKeyArray], Float[Array, "..."]],
    mesh: Mesh,
    spec: P,
) -> Float[Array, "S ..."]:
    """Make each slot's weights on its own device, from a key that only its expert sets.

    So the weights of an expert do not depend on the placement, its replicas are equal, and no
    device ever holds more than its own slots, and one expert more. `spec` spreads the slots, its
    first entry, and perhaps further axes of the weights.
    """
    slot_spec, *inner = spec

    def own_part(weights):
        """This device's part along the axes that the spec spreads."""
        for axis, name in enumerate(inner):
            if name is not None:
                parts = mesh.shape[name]
                size = weights.shape[axis] // parts
                start = jax.lax.axis_index(name) * size
                weights = jax.lax.dynamic_slice_in_dim(weights, start, size, axis)
        return weights

    def local(key, slots):
        return jax.lax.map(
            lambda expert: own_part(init_one(jax.random.fold_in(key, expert))), slots
        )

    make = jax.shard_map(local, mesh=mesh, in_specs=(P(), P(slot_spec)), out_specs=spec)
    return make(key, slot_to_expert)


def place_experts(
    by_expert: np.ndarray, slot_to_expert: np.ndarray, sharding: Sharding
) -> jax.Array:
    """Lay out a bank in slots: [E, …] with int32[S], or [L, E, …] with int32[L, S].

    Each device's rows are read from the host array on their own, so that replicas cost the host
    nothing, and every process reads only what its devices hold. An empty slot, of id E, gets the
    last expert's rows, which nothing reads.
    """
    table = np.asarray(slot_to_expert)
    table = np.minimum(table, by_expert.shape[table.ndim - 1] - 1)
    shape = (*table.shape, *by_expert.shape[table.ndim :])

    def read(index: Any) -> np.ndarray:  # a slice for each axis
        rows = table[index[: table.ndim]]
        if table.ndim == 1:
            chosen = by_expert[rows]
        else:
            layers = np.arange(table.shape[0])[index[0]]
            chosen = by_expert[layers[:, None], rows]
        inner = (slice(None),) * table.ndim
        return np.ascontiguousarray(chosen[inner + tuple(index[table.ndim :])])

    return jax.make_array_from_callback(shape, sharding, read)


def experts_in_order(
    by_slot: jax.Array, slot_to_expert: np.ndarray, num_experts: int
) -> np.ndarray:
    """Read a bank back in expert order onto the host: [E, …] or [L, E, …].

    Other axes may be sharded too. Raises ValueError where an expert, or a part of it, is on no
    device of this process.
    """
    table = np.asarray(slot_to_expert)
    outer = table.ndim
    out = np.empty((*table.shape[:-1], num_experts, *by_slot.shape[outer:]), by_slot.dtype)
    # Slices cannot be hashed before Python 3.12, so parts of an expert go by their text.
    parts = by_slot.sharding.devices_indices_map(by_slot.shape).values()
    seen = {str(part[outer:]): np.zeros(out.shape[:outer], bool) for part in parts}
    layers = np.arange(len(table))[:, None]
    for shard in by_slot.addressable_shards:
        held = table[shard.index[:outer]]
        filled = held < num_experts
        rows = (held[filled],)
        if outer == 2:
            rows = (np.broadcast_to(layers[shard.index[0]], held.shape)[filled], *rows)
        inside = shard.index[outer:]
        seen[str(inside)][rows] = True
        out[(..., *inside)][rows] = np.asarray(shard.data)[filled]
    complete = np.logical_and.reduce(list(seen.values()))
    if not complete.all():
        missing = np.argwhere(~complete)[0].tolist()
        raise ValueError(
            f"expert {missing[-1]} is on no device of this process; read the weights from a "
            "checkpoint, or on a process that holds them all"
        )
    return out


@functools.cache  # equal initializers are one, so that a second layer compiles nothing
def lecun_normal(fan_in: int, shape: tuple[int, ...], dtype=jnp.float32):
    """An initializer of one expert's matrix: normal, variance 1 / fan_in."""

    def init(key: PRNGKeyArray) -> Float[Array, "..."]:
        return (jax.random.normal(key, shape, jnp.float32) * fan_in**-0.5).astype(dtype)

    return init
