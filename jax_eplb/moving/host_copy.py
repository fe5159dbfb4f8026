"""A copy of the experts on the host: a source of rows that outlives the devices.

Axes: L layers, E experts, S slots, P ranks. A column is a part of an expert's row: the whole of it
on a mesh of one axis; on others, what devices of one place along the other axes hold.
"""

from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from jax_eplb.mesh import one_process
from jax_eplb.moving import packs
from jax_eplb.moving.banks import Banks, Group, LayerOf, columns, find_banks
from jax_eplb.moving.delivery import places
from jax_eplb.moving.rows import Rows, read_rows
from jax_eplb.placement import Placement


class HostCopy:
    """Every expert's rows of every bank, on the host of every process.

    In pinned memory where the backend has it, which devices read without a detour. Each process
    keeps all experts, though only the parts that its own devices may hold: so it can fill them
    whatever was lost elsewhere, and asks nobody. That takes E rows of each bank and layer of host
    memory. It is as old as the weights were when it was made: for training, make it anew.
    """

    def __init__(
        self,
        params,
        placement: Placement,
        *,
        axis_name: str = "expert",
        layer_of: LayerOf | None = None,
    ):
        """Read each expert from one of its holders, spread over the ranks, a row of each at a time.

        Across processes the rows go to all of them: P rows at a time on each device; all processes
        must call this alike. Raises ValueError where an expert has no slot.
        """
        self._banks = _banks_of(params, placement, axis_name, layer_of)
        self._rows: dict[tuple[int, int, int], list[list[Any] | None]] = {}
        leaves, table = self._banks.leaves(params), np.asarray(placement.slot_to_expert)
        for index, group in enumerate(self._banks.groups):
            arrays = [leaves[i] for i in group.leaves]
            layers = range(len(table)) if group.layer is None else [group.layer]
            turns = [
                [(layer, *held) for layer in layers for held in of_rank[layer]]
                for of_rank in _holders_to_read(table, placement)
            ]  # [P]: (layer, expert, slot of the rank)
            for wave in range(max(map(len, turns))):
                reads = np.zeros((placement.num_ranks, 1, 2), np.int32)
                for rank, turn in enumerate(turns):
                    if wave < len(turn):
                        layer, _, slot = turn[wave]
                        reads[rank, 0] = layer if group.layer is None else 0, slot
                rows = read_rows(arrays, reads, spread=group.spread)
                by_rank = _on_host(rows, packs.specs(arrays, group.spread), group)
                jax.block_until_ready(by_rank)  # so that the rows do not pile up on the devices
                for rank, turn in enumerate(turns):
                    if wave < len(turn):
                        layer, expert, _ = turn[wave]
                        self._rows[index, layer, expert] = by_rank[rank]

    @classmethod
    def from_experts(
        cls,
        by_expert,
        params,
        placement: Placement,
        *,
        axis_name: str = "expert",
        layer_of: LayerOf | None = None,
    ) -> "HostCopy":
        """Of arrays in expert order on the host, such as a checkpoint's: [E, …] or [L, E, …].

        The tree `by_expert` is like `params`, whose banks say how rows are spread; what stands in
        it elsewhere is not looked at.
        """
        copy = cls.__new__(cls)
        copy._banks, copy._rows = _banks_of(params, placement, axis_name, layer_of), {}
        given, leaves = jax.tree.leaves(by_expert), copy._banks.leaves(params)
        for index, group in enumerate(copy._banks.groups):
            banks = [leaves[i] for i in group.leaves]
            whole = [np.asarray(given[i]).astype(leaves[i].dtype) for i in group.leaves]
            layers = range(placement.num_layers) if group.layer is None else [group.layer]
            for layer in layers:
                of_layer = [x[layer] if group.layer is None else x for x in whole]
                for expert in range(placement.num_experts):
                    copy._rows[index, layer, expert] = _packed(
                        [x[expert] for x in of_layer], banks, group
                    )
        return copy

    def row(self, banks: Banks, group: int, layer: int, expert: int) -> list[Any]:
        """By column and pack: each [1, width], a device's part of the expert's row.

        Raises ValueError where the copy was made of other banks than these.
        """
        own, theirs = self._banks.groups[group : group + 1], banks.groups[group]
        if not own or _kind(own[0]) != _kind(theirs) or banks.structure != self._banks.structure:
            raise ValueError(
                "the host copy was made of a tree with other banks; make it of the same tree as "
                "is to be moved"
            )
        return self._rows[group, layer, expert]


def _banks_of(params, placement: Placement, axis_name: str, layer_of: LayerOf | None) -> Banks:
    return find_banks(
        params,
        num_slots=placement.num_slots,
        layer_ids=placement.layer_ids,
        axis_name=axis_name,
        layer_of=layer_of,
    )


def _packed(row: list[np.ndarray], banks, group: Group) -> list[list[Any] | None]:
    """[column][pack] of an expert's whole rows, one of each bank."""
    spread, packed = group.spread, []
    place = places(spread.mesh)
    for column in columns(spread.mesh, spread.axis_name).T:
        here = [device for device in column if device in place]
        if not here:
            packed.append(None)
            continue
        parts = []
        for x, inner in zip(row, spread.inner, strict=True):
            index = NamedSharding(spread.mesh, P(*inner)).devices_indices_map(x.shape)[here[0]]
            parts.append(x[index].reshape(1, -1).view(packs.carrier(x.dtype)))
        packed.append(
            [
                _kept(jax.device_put(np.concatenate([parts[i] for i in indexes], axis=1), here[0]))
                for indexes in packs.members(banks, spread).values()
            ]
        )
    return packed


def _kind(group: Group):
    return group.leaves, group.layer, group.spread.stacked, group.spread.inner


def _holders_to_read(table: np.ndarray, placement: Placement) -> list[list[list[tuple[int, int]]]]:
    """[P][L]: the (expert, slot of the rank) that each rank reads, as even as is simple."""
    per_rank = placement.slots_per_rank
    chosen = [[[] for _ in table] for _ in range(placement.num_ranks)]
    load = [0] * placement.num_ranks
    for layer, row in enumerate(table):
        for expert in range(placement.num_experts):
            slots = np.flatnonzero(row == expert)
            if not slots.size:
                raise ValueError(
                    f"layer {placement.layer_ids[layer]}: expert {expert} has no slot to be "
                    "copied from"
                )
            slot = min(slots.tolist(), key=lambda slot: load[slot // per_rank])
            load[slot // per_rank] += 1
            chosen[slot // per_rank][layer].append((expert, slot % per_rank))
    return chosen


def _on_host(rows: Rows, specs: list[Any], group: Group) -> list[list[list[Any] | None]]:
    """[P][column][pack] of the only row of each rank; None for columns of other processes."""
    spread = group.spread
    devices, place = columns(spread.mesh, spread.axis_name), places(spread.mesh)
    if one_process(spread.mesh):
        return [
            [[_kept(x.addressable_data(place[device])) for x in rows[0]] for device in of_rank]
            for of_rank in devices
        ]
    everywhere = packs.gather(spread.mesh, tuple(specs))(rows[0])
    kept = []
    for rank in range(len(devices)):
        of_rank: list[list[Any] | None] = []
        for column in devices.T:
            here = [device for device in column if device in place]
            if not here:
                of_rank.append(None)
                continue
            whole = [np.asarray(x.addressable_data(place[here[0]])) for x in everywhere]
            of_rank.append([_kept(jax.device_put(x[rank : rank + 1], here[0])) for x in whole])
        kept.append(of_rank)
    return kept


def _kept(piece: jax.Array):
    """A device's row on the host, pinned if that can be."""
    (device,) = piece.devices()
    if _pins(device):
        return jax.device_put(piece, SingleDeviceSharding(device, memory_kind="pinned_host"))
    return np.asarray(piece)


def _pins(device) -> bool:
    return any(memory.kind == "pinned_host" for memory in device.addressable_memories())
