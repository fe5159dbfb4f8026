"""Banks whose values name their layer, expert and array, for the tests of what moves them.

Axes: L layers, E experts, S slots, P ranks.
"""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_eplb import Placement
from tests.placement_cases import random_table

# Name, shape of a row, type: weights, a bias, scales of a quantised matrix, an optimiser's moment.
ARRAYS = (
    ("gate_up", (2, 5), np.float32),
    ("down", (5, 2), ml_dtypes.bfloat16),
    ("bias", (3,), np.float32),
    ("scale", (4,), np.int8),
)


def tagged(layers: int, experts: int, shape: tuple[int, ...], dtype, salt: int) -> np.ndarray:
    """[L, E, *shape]: base-100 digits of a number that only this layer, expert and array have.

    Exact in every type, and different in the order of the positions too.
    """
    size = int(np.prod(shape))
    assert size >= 3
    number = (salt * layers + np.arange(layers)[:, None]) * experts + np.arange(experts)
    assert number.max() < 100**3
    position = np.arange(size)
    values = number[..., None] // 100 ** (position % 3) + 7 * (position // 3)
    return (values % 100).reshape(layers, experts, *shape).astype(dtype)


def in_expert_order(layers: int, experts: int) -> dict[str, np.ndarray]:
    return {
        name: tagged(layers, experts, shape, dtype, salt)
        for salt, (name, shape, dtype) in enumerate(ARRAYS)
    }


def in_slots(by_expert: np.ndarray, table: np.ndarray) -> np.ndarray:
    """[L, S, …] of [L, E, …]; empty slots, of id E, hold zeros."""
    empty = np.zeros_like(by_expert[:, :1])
    padded = np.concatenate([by_expert, empty], axis=1)
    return padded[np.arange(len(table))[:, None], table]


def put(array: np.ndarray, mesh: Mesh, *spec) -> jax.Array:
    """On the mesh; every process gives its own parts."""
    return jax.make_array_from_callback(
        array.shape, NamedSharding(mesh, P(*spec)), lambda index: array[index]
    )


def stacked_tree(table: np.ndarray, experts: int, mesh: Mesh) -> dict:
    """Banks [L, S, …], and arrays that no placement concerns."""
    banks = {
        name: put(in_slots(whole, table), mesh, None, "expert")
        for name, whole in in_expert_order(len(table), experts).items()
    }
    router = put(np.arange(6 * experts, dtype=np.float32).reshape(6, experts), mesh)
    moments = {"mu": banks.pop("bias"), "count": np.int32(3)}
    return {"experts": banks, "router": router, "moments": moments, "nothing": None}


def layer_trees(table: np.ndarray, experts: int, mesh: Mesh) -> list[dict]:
    """The same, layer by layer: banks [S, …]."""
    whole = in_expert_order(len(table), experts)
    return [
        {name: put(in_slots(x, table)[layer], mesh, "expert") for name, x in whole.items()}
        for layer in range(len(table))
    ]


def banks_by_name(tree) -> dict[str, list]:
    """Of either tree: the arrays [L, S, …], or those of all layers, by their names."""
    if isinstance(tree, dict):
        return {**tree["experts"], "bias": tree["moments"]["mu"]}
    return {name: [layer[name] for layer in tree] for name in tree[0]}


def assert_holds(tree, table: np.ndarray, experts: int) -> None:
    """Every slot of every array of this process holds its expert, bit for bit."""
    whole = in_expert_order(len(table), experts)
    for name, banks in banks_by_name(tree).items():
        expected = in_slots(whole[name], table)
        filled = table < experts
        layered = isinstance(banks, list)
        for layer, bank in enumerate(banks) if layered else [(slice(None), banks)]:
            want, where = expected[layer], filled[layer]
            for shard in bank.addressable_shards:
                got, part = np.asarray(shard.data), want[shard.index]
                assert got.dtype == part.dtype
                if not np.array_equal(got, part):  # empty slots may hold anything
                    kept = where[shard.index[: where.ndim]]
                    np.testing.assert_array_equal(got[kept], part[kept], f"{name}, layer {layer}")


def placement(table: np.ndarray, experts: int, ranks: int, layer_ids=None) -> Placement:
    """Unchecked, so that tables may have empty slots."""
    ids = tuple(range(len(table))) if layer_ids is None else tuple(layer_ids)
    return Placement(jnp.asarray(table, jnp.int32), experts, ranks, ids)


def tables(seed: int, layers: int, experts: int, slots: int, ranks: int):
    """Random tables, one after the other."""
    generator = np.random.default_rng(seed)
    while True:
        yield random_table(generator, layers, experts, slots, ranks)
