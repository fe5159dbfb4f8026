"""`rebalance`: a whole change of placement, in waves, all of it or nothing.

Axes: L layers, E experts, S slots, P ranks, N slots of a rank.
"""

from collections.abc import Collection

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jax_eplb.moving.banks import Banks, LayerOf, columns, find_banks
from jax_eplb.moving.errors import RebalanceError
from jax_eplb.moving.moves import Moves, find_moves
from jax_eplb.moving.order import Hold, Release, Wave, in_waves
from jax_eplb.moving.staging import (
    Held,
    RowSource,
    Staged,
    apply_moves,
    hold_row,
    stage_held,
    stage_moves,
)
from jax_eplb.placement import Placement


def rebalance(
    params,
    old: Placement,
    new: Placement,
    *,
    slots_at_once: int = 8,
    axis_name: str = "expert",
    ranks_per_node: int | None = None,
    lost_ranks: Collection[int] = (),
    host: RowSource | None = None,
    layer_of: LayerOf | None = None,
    donate: bool = True,
    collective: bool = False,
):
    """Move experts' weights from where one placement has them to where another wants them.

    `params` is any tree: of one layer, a list of layers, stacked layers, a whole model's state with
    its optimiser's. Every array whose axis 0 (or 1, if stacked) has the S slots and is spread over
    `axis_name` goes along; the rest is returned as it is. `find_banks` says how layers are told
    apart, and what `layer_of` is for. A slot whose expert stays is not touched; the others are
    filled from the nearest rank that has the expert (`ranks_per_node`: how many consecutive ranks
    are near each other; by default those of a process), and of several such from one that sends
    little. Experts that only `lost_ranks` had come from `host`, a `HostCopy`.

    Rows travel in waves in which no rank sends or gets more than `slots_at_once` rows, and the
    banks are written in place, so extra memory on a device is at most 2 `slots_at_once` + 2 slots
    (both rounded up to powers of two; 3 on a CPU); across processes 5 `slots_at_once` + 2. For that
    the arrays given are used up (donated); `donate=False` keeps them, at the price of a copy of the
    banks. `collective` as for `stage_moves`.

    All or nothing. Raises ValueError, with nothing moved, where the placements have different
    sizes or layers, an expert would have no slot, or none holds it and there is no host copy;
    RebalanceError where moving failed: then its `params` is the tree with what had been moved
    moved back. Across processes, all must call this alike.
    """
    banks = find_banks(
        params,
        num_slots=old.num_slots,
        layer_ids=old.layer_ids,
        axis_name=axis_name,
        layer_of=layer_of,
    )
    old_table, new_table = check_placements(old, new, banks)
    if slots_at_once < 1:
        raise ValueError(f"slots_at_once is {slots_at_once}; it must be at least 1")
    if ranks_per_node is None:
        ranks_per_node = ranks_of_a_process(banks.groups[0].spread.mesh, axis_name)
    moves = find_moves(
        old_table,
        new_table,
        num_ranks=old.num_ranks,
        num_experts=old.num_experts,
        ranks_per_node=ranks_per_node,
        lost_ranks=lost_ranks,
    )
    if host is None:
        check_held(moves, old.layer_ids, lost_ranks)
    if not moves.layer.size:
        return params
    under_way = params if donate else copied(params, banks)
    mover = _Mover(under_way, banks, old_table, slots_at_once, host, collective)
    try:
        mover.make(moves)
    except Exception as error:
        why = f"moving {moves.layer.size} slots failed: {type(error).__name__}: {error}"
        if not donate:
            message = f"{why}. The weights given are as they were; so is the placement in force"
            raise RebalanceError(message, params) from error
        try:
            mover.restore(old_table, old.num_experts)
        except Exception as second:
            raise RebalanceError(
                f"{why}. Moving back failed too ({type(second).__name__}: {second}): the weights "
                "are lost; place them anew, from a checkpoint or a host copy",
                None,
            ) from error
        raise RebalanceError(
            f"{why}. The old placement is in force: go on with this error's `params`", mover.params
        ) from error
    return mover.params


class _Mover:
    """A tree whose banks are being moved, and what its slots hold by now."""

    def __init__(
        self,
        params,
        banks: Banks,
        table: np.ndarray,
        slots_at_once: int,
        host: RowSource | None,
        collective: bool,
    ):
        self.params, self.banks, self.host, self.collective = params, banks, host, collective
        self.table, self.slots_at_once = table.copy(), slots_at_once
        self.held: Held | None = None
        self.held_expert = -1

    def make(self, moves: Moves) -> None:
        """Make moves, none of which may overwrite what another will read."""
        expert = np.where(moves.source < 0, ~moves.source, self.table[moves.layer, moves.source])
        steps = in_waves(
            moves, slots_per_rank=self.banks.slots_per_rank, slots_at_once=self.slots_at_once
        )
        for step in steps:
            match step:
                case Wave(chosen):
                    wave = moves.take(chosen)
                    # Without a name, so that its rows are gone before the next wave's are made.
                    self._write(self._staged(wave), wave.layer, wave.destination, expert[chosen])
                case Hold(move):
                    layer, source = int(moves.layer[move]), int(moves.source[move])
                    held = hold_row(self.params, layer, source, banks=self.banks)
                    jax.block_until_ready(held.arrays())
                    self.held, self.held_expert = held, int(expert[move])
                case Release(move):
                    self.release(int(moves.destination[move]))

    def release(self, destination: int) -> None:
        held = self.held
        if held is not None:
            staged = stage_held(held, destination, collective=self.collective)
            self._write(staged, held.layer, destination, self.held_expert)
            self.held = None

    def restore(self, table: np.ndarray, num_experts: int) -> None:
        """Make the slots hold what they held before."""
        if self.params is None:
            raise ValueError("the banks are used up")
        if self.held is not None:
            layer, source = self.held.layer, self.held.source
            if not (self.table[layer] == self.held_expert).any():
                # Its slot holds another expert by now, which must leave first.
                others = np.where(table == self.held_expert, self.table, table)
                others[np.arange(len(table)) != layer] = self.table[np.arange(len(table)) != layer]
                held, self.held = self.held, None
                self._go(others, num_experts)
                self.held = held
                self.release(source)
            self.held = None
        self._go(table, num_experts)

    def _go(self, table: np.ndarray, num_experts: int) -> None:
        self.make(
            find_moves(self.table, table, num_ranks=self.banks.num_ranks, num_experts=num_experts)
        )

    def _staged(self, wave: Moves) -> Staged:
        return stage_moves(
            self.params, wave, banks=self.banks, host=self.host, collective=self.collective
        )

    def _write(self, staged: Staged, layer, destination, expert) -> None:
        # Before the flip, which uses up the old rows: what fails must fail here. And no wave's
        # rows are made while the last one's are still needed.
        jax.block_until_ready(staged.arrays())
        try:
            self.params = apply_moves(self.params, staged)
        except RebalanceError as error:
            self.params = error.params
            raise
        self.table[layer, destination] = expert


def copied(params, banks: Banks):
    """The tree with copies of its banks."""
    leaves = banks.leaves(params)
    for group in banks.groups:
        for index in group.leaves:
            leaves[index] = jnp.copy(leaves[index])
    return jax.tree.unflatten(banks.structure, leaves)


def ranks_of_a_process(mesh: Mesh, axis_name: str) -> int | None:
    """How many consecutive ranks have their devices in one process; None where they are mixed."""
    process = [
        tuple(sorted({device.process_index for device in of_rank}))
        for of_rank in columns(mesh, axis_name)
    ]
    size = process.count(process[0])
    blocks = [process[i : i + size] for i in range(0, len(process), size)]
    even = all(len(set(block)) == 1 and len(block) == size for block in blocks)
    return size if even and len(set(process)) == len(blocks) else None


def check_placements(old: Placement, new: Placement, banks: Banks) -> tuple[np.ndarray, np.ndarray]:
    """The tables on the host. Raises ValueError unless both fit each other and the banks."""
    for name, here, there in (
        ("experts", old.num_experts, new.num_experts),
        ("slots", old.num_slots, new.num_slots),
        ("ranks", old.num_ranks, new.num_ranks),
        ("layer ids", old.layer_ids, new.layer_ids),
    ):
        if here != there:
            raise ValueError(
                f"the old placement has {name} {here}, the new one {there}; both must have the "
                "same (`reshard` changes the numbers of slots and ranks)"
            )
    if old.num_ranks != banks.num_ranks:
        raise ValueError(
            f"the placements are for {old.num_ranks} ranks; the expert axis of the weights' mesh "
            f"has {banks.num_ranks}"
        )
    found = {group.layer for group in banks.groups}
    missing = [i for position, i in enumerate(old.layer_ids) if position not in found]
    if missing and None not in found:
        raise ValueError(f"the tree has no bank of the layers {missing}, which are to be placed")
    return checked_table(old, "old"), checked_table(new, "new", complete=True)


def checked_table(placement: Placement, name: str, *, complete: bool = False) -> np.ndarray:
    """int32[L, S] on the host. Raises ValueError for unknown experts; E is an empty slot.

    If `complete`, also where an expert has no slot.
    """
    table = np.asarray(placement.slot_to_expert)
    experts = placement.num_experts
    unknown = np.argwhere((table < 0) | (table > experts))
    if unknown.size:
        layer, slot = unknown[0]
        raise ValueError(
            f"{name} placement, layer {placement.layer_ids[layer]}, slot {slot}: unknown expert "
            f"{table[layer, slot]}; this model's are 0 to {experts - 1}"
        )
    if complete:
        held = np.zeros((len(table), experts + 1), bool)
        held[np.arange(len(table))[:, None], table] = True
        without = np.argwhere(~held[:, :experts])
        if without.size:
            layer = without[0, 0]
            ids = without[without[:, 0] == layer, 1].tolist()
            raise ValueError(
                f"{name} placement, layer {placement.layer_ids[layer]}: experts {ids} have no "
                "slot and would be lost; plan again"
            )
    return table


def check_held(moves: Moves, layer_ids, lost_ranks) -> None:
    """Raise ValueError where a move needs a host copy."""
    without = moves.source < 0
    if without.any():
        layer = moves.layer[without][0]
        experts = sorted(set((~moves.source[without & (moves.layer == layer)]).tolist()))
        lost = f" once ranks {sorted(lost_ranks)} are lost" if lost_ranks else ""
        raise ValueError(
            f"layer {layer_ids[layer]}: no slot holds experts {experts}{lost}; give `host`, a "
            "HostCopy made while they were there, or load them from a checkpoint"
        )
