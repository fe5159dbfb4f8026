"""Other numbers of ranks and slots: every expert arrives, and nothing of the old arrays is lost."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from jax_eplb import HostCopy, expert_mesh, reshard
from tests.moving_cases import (
    assert_holds,
    layer_trees,
    placement,
    put,
    stacked_tree,
    tables,
)

pytestmark = pytest.mark.light_compile

L, E = 2, 8
IDS = (3, 4)


def drawn(slots, ranks, seed=0):
    table = next(tables(seed, L, E, slots, ranks))
    return table, placement(table, E, ranks, IDS)


def mesh_of(first, last):
    return Mesh(np.array(jax.devices()[first:last]), ("expert",))


@pytest.mark.slow
@pytest.mark.parametrize("slots_at_once", [1, 8])
@pytest.mark.parametrize(
    ("slots", "ranks", "new_slots", "mesh"),
    [
        (12, 4, 16, mesh_of(0, 8)),  # more ranks and slots
        (16, 8, 12, mesh_of(2, 4)),  # fewer
        (12, 4, 8, mesh_of(4, 8)),  # all other devices
        (12, 4, 12, mesh_of(0, 4)),  # only the placement
    ],
)
def test_meshes_and_slots_change(slots, ranks, new_slots, mesh, slots_at_once):
    old, before = drawn(slots, ranks)
    new, after = drawn(new_slots, mesh.size, seed=1)
    tree = stacked_tree(old, E, expert_mesh(ranks))
    moved = reshard(tree, before, after, mesh, slots_at_once=slots_at_once)
    assert_holds(moved, new, E)
    assert_holds(tree, old, E)
    assert moved["router"].sharding.mesh == mesh
    np.testing.assert_array_equal(moved["router"], tree["router"])
    assert moved["moments"]["count"] is tree["moments"]["count"]


@pytest.mark.slow
def test_layers_of_a_list_and_experts_of_the_same_device_stay_there(monkeypatch):
    old, before = drawn(8, 4)
    # Twice the slots for the first devices' experts.
    new = np.stack([np.tile(row.reshape(4, 2), 2).reshape(-1) for row in old])
    trees = layer_trees(old, E, expert_mesh(4))
    copies = []
    put_it = jax.device_put

    def counted(x, *args, **options):
        if isinstance(x, jax.Array) and x.devices() != args[0].device_set:
            copies.append(x)
        return put_it(x, *args, **options)

    monkeypatch.setattr(jax, "device_put", counted)
    moved = reshard(trees, before, placement(new, E, 4, IDS), expert_mesh(4))
    assert_holds(moved, new, E)
    assert copies == []


@pytest.mark.slow
def test_a_host_copy_serves_where_the_old_mesh_cannot_be_read(monkeypatch):
    old, before = drawn(12, 4)
    new, after = drawn(12, 2, seed=1)
    tree = stacked_tree(old, E, expert_mesh(4))
    copy = HostCopy(tree, before)
    for bank in tree["experts"].values():
        bank.delete()
    moved = reshard(tree, before, after, mesh_of(0, 2), host=copy)
    assert_holds(moved, new, E)


def test_other_axes_stay():
    kinds = (jax.sharding.AxisType.Auto,) * 2
    small = jax.make_mesh((2, 2), ("expert", "tensor"), axis_types=kinds)
    large = jax.make_mesh((4, 2), ("expert", "tensor"), axis_types=kinds)
    table, before = drawn(12, 2)
    new, after = drawn(12, 4, seed=1)
    whole = np.arange(L * E * 6, dtype=np.float32).reshape(L, E, 6)
    rows = np.arange(L)[:, None]
    tree = {
        "bank": put(whole[rows, table], small, None, "expert", "tensor"),
        "dense": put(np.arange(8.0, dtype=np.float32), small, "tensor"),
    }
    moved = reshard(tree, before, after, large)
    np.testing.assert_array_equal(moved["bank"], whole[rows, new])
    assert moved["dense"].sharding.mesh == large
    with pytest.raises(ValueError, match=r"other axes \{'tensor': 2\}, the new one \{\}"):
        reshard(tree, before, after, expert_mesh(4))


def test_what_does_not_fit_is_refused():
    old, before = drawn(12, 4)
    tree = stacked_tree(old, E, expert_mesh(4))
    _, after = drawn(12, 2)
    with pytest.raises(ValueError, match="new placement is for 2 ranks; the new mesh is"):
        reshard(tree, before, after, expert_mesh(4))
    with pytest.raises(ValueError, match="slots_at_once is 0"):
        reshard(tree, before, after, mesh_of(0, 2), slots_at_once=0)
    other = placement(after.slot_to_expert, E, 2, (0, 1))
    with pytest.raises(ValueError, match=r"layer ids \(3, 4\), the new one \(0, 1\)"):
        reshard(tree, before, other, mesh_of(0, 2))
    missing = np.where(old == 3, E, old)
    with pytest.raises(ValueError, match=r"layer 3: no slot holds experts \[3\]"):
        reshard(tree, placement(missing, E, 4, IDS), after, mesh_of(0, 2))
