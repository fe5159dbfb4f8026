"""`reshard`: from one mesh and placement to another, with other numbers of ranks and slots.

Axes: L layers, E experts, S slots, P ranks, M rows of a rank in a wave.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_eplb.mesh import one_process
from jax_eplb.moving import packs
from jax_eplb.moving.banks import Banks, LayerOf, Spread, columns, find_banks
from jax_eplb.moving.delivery import from_host, places
from jax_eplb.moving.moves import Moves, choose_sources
from jax_eplb.moving.order import in_any_order
from jax_eplb.moving.rebalance import check_held, checked_table
from jax_eplb.moving.rows import Rows, read_rows, write_rows
from jax_eplb.moving.staging import RowSource, padded, turns
from jax_eplb.placement import Placement


def reshard(
    params,
    old: Placement,
    new: Placement,
    mesh: Mesh,
    *,
    slots_at_once: int = 8,
    axis_name: str = "expert",
    host: RowSource | None = None,
    layer_of: LayerOf | None = None,
):
    """The tree on another mesh under another placement: P and S may change, E and layers not.

    `params` as for `rebalance`, on any mesh; it stays valid. Banks get the new number of slots,
    each filled from the nearest device that holds its expert, in waves in which no device sends or
    gets more than `slots_at_once` rows. Other arrays that are spread over the old mesh are laid out
    likewise on the new one. Axes of the mesh besides `axis_name` must stay what they are.

    With `host`, a `HostCopy`, no bank of the old mesh is read: for when a device of it is lost.
    Across processes, rows go through the host of each: every process must have devices in the old
    mesh, and all must call this alike.

    Extra memory beside the old and the new arrays: 2 `slots_at_once` slots on a device, rounded up
    to a power of two; across processes P + 1 times as many.

    Raises ValueError where the placements are of different models, or do not fit their mesh.
    """
    if slots_at_once < 1:
        raise ValueError(f"slots_at_once is {slots_at_once}; it must be at least 1")
    banks = find_banks(
        params,
        num_slots=old.num_slots,
        layer_ids=old.layer_ids,
        axis_name=axis_name,
        layer_of=layer_of,
    )
    old_table, new_table = _checked(old, new, mesh, axis_name, banks)
    old_leaves, leaves = banks.leaves(params), banks.leaves(params)
    in_banks = {index for group in banks.groups for index in group.leaves}
    for index, leaf in enumerate(leaves):
        if index not in in_banks:
            leaves[index] = _laid_out(leaf, banks.groups[0].spread.mesh, mesh)
    for index, group in enumerate(banks.groups):
        arrays = [old_leaves[i] for i in group.leaves]
        layers = [*range(len(old_table))] if group.layer is None else [group.layer]
        held, wanted = old_table[layers], new_table[layers]
        layer, destination = np.nonzero(wanted < new.num_experts)
        expert = wanted[layer, destination]
        receiver = destination // new.slots_per_rank
        if host is None:
            near = _distances(mesh, group.spread.mesh, axis_name)
            held = np.where(held < old.num_experts, held, -1)
            source = choose_sources(held, layer, expert, receiver, near)
            check_held(Moves(np.array(layers)[layer], source, destination), old.layer_ids, ())
            sender, slot = np.divmod(source, old.slots_per_rank)
            reader = _DeviceReader(arrays, group.spread, mesh)
        else:
            sender, slot = np.full(layer.size, -1), np.zeros_like(layer)
            reader = _HostReader(host, banks, index, layers)
        to = dataclasses.replace(group.spread, mesh=mesh)
        made = _empty(arrays, to, new.num_slots)
        blank = _blank(tuple(packs.widths(arrays, to)), to, tuple(packs.specs(arrays, to)))
        for wave in in_any_order(sender, receiver, slots_at_once):
            out, into = turns(sender[wave]), turns(receiver[wave])
            count = padded(1 + int(max(out.max(), into.max())))
            table = np.zeros((new.num_ranks, count, 2), np.int32)
            table[..., 1] = new.slots_per_rank
            table[receiver[wave], into, 0] = layer[wave]
            table[receiver[wave], into, 1] = destination[wave] % new.slots_per_rank
            rows = reader.read(layer[wave], expert[wave], sender[wave], slot[wave], out, count)
            arrived = _arrived(rows, receiver[wave], into, count, blank, to)
            made = write_rows(made, arrived, table, spread=to)
            jax.block_until_ready(made)  # so that rows do not pile up on the devices
        for position, bank in zip(group.leaves, made, strict=True):
            leaves[position] = bank
    return jax.tree.unflatten(banks.structure, leaves)


class _HostReader:
    """Rows from a host copy."""

    def __init__(self, host: RowSource, banks: Banks, group: int, layers: list[int]):
        self.host, self.banks, self.group, self.layers = host, banks, group, layers

    def read(self, layer, expert, sender, slot, out, count):
        """[M][column][pack]: what to put on the devices that get each row."""
        return [
            self.host.row(self.banks, self.group, self.layers[at], int(e))
            for at, e in zip(layer, expert, strict=True)
        ]


class _DeviceReader:
    """Rows from the banks of the old mesh; across processes by way of each one's host."""

    def __init__(self, arrays, spread: Spread, new_mesh: Mesh):
        self.arrays, self.spread = arrays, spread
        self.directly = one_process(spread.mesh) and one_process(new_mesh)

    def read(self, layer, expert, sender, slot, out, count):
        """[M][column][pack]: what to put on the devices that get each row."""
        spread = self.spread
        table = np.zeros((spread.num_ranks, count, 2), np.int32)
        table[sender, out, 0], table[sender, out, 1] = layer, slot
        rows = read_rows(self.arrays, table, spread=spread)
        devices, place = columns(spread.mesh, spread.axis_name), places(spread.mesh)
        if self.directly:
            return [
                [[x.addressable_data(place[device]) for x in rows[k]] for device in devices[rank]]
                for rank, k in zip(sender, out, strict=True)
            ]
        gather = packs.gather(spread.mesh, tuple(packs.specs(self.arrays, spread)))
        here = [next((d for d in column if d in place), None) for column in devices.T]
        whole = [
            [d and [np.asarray(x.addressable_data(place[d])) for x in gathered] for d in here]
            for gathered in map(gather, rows)
        ]
        return [
            [column and [x[rank : rank + 1] for x in column] for column in whole[k]]
            for rank, k in zip(sender, out, strict=True)
        ]


def _arrived(rows, receiver, into, count: int, blank: list[jax.Array], to: Spread) -> Rows:
    """Rows of the new mesh, put together of what each of its devices gets."""
    devices, place = columns(to.mesh, to.axis_name), places(to.mesh)
    nothing = [[x.addressable_data(i) for i in range(len(place))] for x in blank]
    shards = [[list(of_pack) for of_pack in nothing] for _ in range(count)]
    for row, rank, j in zip(rows, receiver, into, strict=True):
        for column, device in enumerate(devices[rank]):
            if device in place:
                for pack, piece in enumerate(row[column]):
                    shards[j][pack][place[device]] = from_host(piece, device)
    return [
        [
            jax.make_array_from_single_device_arrays(x.shape, x.sharding, of_pack)
            for x, of_pack in zip(blank, row, strict=True)
        ]
        for row in shards
    ]


def _empty(arrays: list[jax.Array], to: Spread, num_slots: int) -> list[jax.Array]:
    """Banks of the new size, made where they will be."""
    axis = 1 if to.stacked else 0
    made = []
    for array, spec in zip(arrays, to.banks, strict=True):
        shape = (*array.shape[:axis], num_slots, *array.shape[axis + 1 :])
        made.append(_zeros(shape, array.dtype, NamedSharding(to.mesh, spec)))
    return made


def _blank(widths: tuple[Any, ...], to: Spread, specs: tuple[P, ...]) -> list[jax.Array]:
    """Packs of rows that are written nowhere."""
    return [
        _zeros((to.num_ranks, width), dtype, NamedSharding(to.mesh, spec))
        for (width, dtype), spec in zip(widths, specs, strict=True)
    ]


def _zeros(shape: tuple[int, ...], dtype, sharding: NamedSharding) -> jax.Array:
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)()


def _laid_out(leaf, old_mesh: Mesh, mesh: Mesh):
    """An array of the old mesh on the new one, spread alike; anything else as it is."""
    if not isinstance(leaf, jax.Array) or not isinstance(leaf.sharding, NamedSharding):
        return leaf
    if leaf.sharding.mesh != old_mesh:
        return leaf
    sharding = NamedSharding(mesh, leaf.sharding.spec)
    if one_process(old_mesh) and one_process(mesh):
        return jax.device_put(leaf, sharding)
    if not leaf.is_fully_replicated:
        leaf = jax.jit(lambda x: x, out_shardings=NamedSharding(old_mesh, P()))(leaf)
    whole = np.asarray(leaf.addressable_data(0))
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])


def _distances(mesh: Mesh, old_mesh: Mesh, axis_name: str) -> np.ndarray:
    """int[P new, P old]: 0 where the ranks are the same devices, 1 in one process, else 2."""
    new, old = columns(mesh, axis_name), columns(old_mesh, axis_name)
    return np.array(
        [
            [
                0
                if (a == b).all()
                else 1 + any(x.process_index != y.process_index for x, y in zip(a, b, strict=True))
                for b in old
            ]
            for a in new
        ]
    )


def _checked(old: Placement, new: Placement, mesh: Mesh, axis_name: str, banks: Banks):
    for name, here, there in (
        ("experts", old.num_experts, new.num_experts),
        ("layer ids", old.layer_ids, new.layer_ids),
    ):
        if here != there:
            raise ValueError(f"the old placement has {name} {here}, the new one {there}")
    old_mesh = banks.groups[0].spread.mesh
    for name, placement, its_mesh in (("old", old, old_mesh), ("new", new, mesh)):
        if its_mesh.shape.get(axis_name) != placement.num_ranks:
            raise ValueError(
                f"the {name} placement is for {placement.num_ranks} ranks; the {name} mesh is "
                f"{dict(its_mesh.shape)}, with {axis_name!r} as the expert axis"
            )
    others = [{n: size for n, size in m.shape.items() if n != axis_name} for m in (old_mesh, mesh)]
    if others[0] != others[1]:
        raise ValueError(
            f"the old mesh has the other axes {others[0]}, the new one {others[1]}; only "
            f"{axis_name!r} may change its size"
        )
    return checked_table(old, "old"), checked_table(new, "new", complete=True)
