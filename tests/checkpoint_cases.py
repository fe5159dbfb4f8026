"""A small state on any mesh whose weights say which layer and expert they are of."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jax_eplb import Placement, expert_mesh

LAYERS, EXPERTS = (3, 4, 7), 12
SHAPE = (4, 6)  # of one expert


class Experts(NamedTuple):
    up: jax.Array
    bias: jax.Array


class Moments(NamedTuple):
    mu: Experts


def by_expert(shape=SHAPE, dtype=np.float32, start=0):
    """[L, E, *shape]: every number is another one."""
    full = (len(LAYERS), EXPERTS, *shape)
    return (start + np.arange(np.prod(full))).reshape(full).astype(dtype)


def planned(slots, ranks, seed=0):
    """A placement that no default layout gives: experts in any order, spare slots anywhere."""
    generator = np.random.default_rng(seed)

    def row():
        spare = generator.permutation(EXPERTS)[: slots - EXPERTS]
        return generator.permutation(np.concatenate([np.arange(EXPERTS), spare]))

    return Placement.from_slots(
        [row() for _ in LAYERS], num_experts=EXPERTS, num_ranks=ranks, layer_ids=LAYERS
    )


def bank(values, placement, spec):
    """A bank in slots, on the first devices."""
    table = np.asarray(placement.slot_to_expert)
    mesh = expert_mesh(placement.num_ranks)
    rows = values[np.arange(len(table))[:, None], table]
    return jax.device_put(rows, NamedSharding(mesh, spec))


def state_of(placement, dtype=np.float32):
    """Weights and biases in stacked banks, their moments, a matrix, a number, and empty nodes."""
    everywhere = NamedSharding(expert_mesh(placement.num_ranks), P())
    spread = P(None, "expert")

    def experts(start):
        return Experts(
            bank(by_expert(dtype=dtype, start=start), placement, spread),
            bank(by_expert((4,), dtype, start), placement, spread),
        )

    return {
        "params": {
            "experts": experts(0),
            "router": jax.device_put(np.arange(10.0, dtype=np.float32).reshape(5, 2), everywhere),
        },
        "optimizer": (None, Moments(experts(1)), jax.device_put(jnp.int32(7), everywhere)),
    }


def targets(state):
    """The same tree without values."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.sharding == b.sharding
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def global_bank(placement):
    """A bank and an array that all devices hold, over the devices of all processes."""
    table = np.asarray(placement.slot_to_expert)
    rows = by_expert()[np.arange(len(table))[:, None], table]
    mesh = expert_mesh(placement.num_ranks)

    def spread(values, spec):
        return jax.make_array_from_callback(
            values.shape, NamedSharding(mesh, spec), lambda index: values[index]
        )

    return {"up": spread(rows, P(None, "expert")), "norm": spread(np.arange(5.0), P())}
