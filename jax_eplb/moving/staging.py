"""Moves begun and ended: rows on their way to their new ranks, then written into their slots.

Axes: L layers, S slots, P ranks, N slots of a rank, M rows of a rank.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from jax_eplb.moving import packs
from jax_eplb.moving.banks import Banks, Group, find_banks
from jax_eplb.moving.delivery import Hosted, Route, crosses, deliver
from jax_eplb.moving.errors import RebalanceError
from jax_eplb.moving.moves import Moves
from jax_eplb.moving.rows import Rows, read_rows, write_rows


class RowSource(Protocol):
    """Rows of experts that are not read from a device, such as `HostCopy`."""

    def row(self, banks: Banks, group: int, layer: int, expert: int) -> Sequence[Sequence[Any]]:
        """[column][pack]: [1, width], each device's part of the expert's row."""
        ...


class Part(NamedTuple):
    """Rows for the banks of one group."""

    group: int  # its position in `Banks.groups`
    rows: Rows
    table: np.ndarray  # int32[P, M, 2]: where to write them


@dataclasses.dataclass(frozen=True)
class Staged:
    """What `apply_moves` writes: rows that are, or soon will be, on their new devices."""

    banks: Banks
    parts: tuple[Part, ...]

    def arrays(self) -> list[Any]:
        return jax.tree.leaves([part.rows for part in self.parts])


def is_ready(staged: Staged) -> bool:
    """Whether all rows have arrived on the devices of this process."""
    return all(array.is_ready() for array in staged.arrays())


def stage_moves(
    params,
    moves: Moves,
    *,
    banks: Banks | None = None,
    host: RowSource | None = None,
    collective: bool = False,
) -> Staged:
    """Send the rows that moves need to their new ranks. Only dispatches; the tree stays valid.

    `banks`: of `find_banks`, where the layers of a tree are not plain; found here otherwise.
    Rows are copied from device to device, and by one collective program where they go to another
    process, or, if `collective`, all of them: that takes less of the host's time for many moves,
    but time of the devices.

    Extra memory on each device until `apply_moves` is done: twice the most slots that one rank
    gets or gives, rounded up to a power of two; by the collective program, five times.

    Raises ValueError where a move needs a host copy and there is none.
    """
    banks = find_banks(params) if banks is None else banks
    leaves = banks.leaves(params)
    parts: list[Part] = []
    for index, group in enumerate(banks.groups):
        arrays = [leaves[i] for i in group.leaves]
        for far, own in _ways(group, moves, banks.slots_per_rank, collective):
            parts.append(_stage(arrays, own, index, banks, host, far))
    return Staged(banks, tuple(parts))


def apply_moves(params, *staged: Staged):
    """Put staged rows into their slots: the tree with new banks, other leaves as they were.

    The flip: one program for each part, without communication. The banks given are used up
    (donated), so nothing is copied but the rows. Only dispatches.

    All or nothing: where there are several parts, the rows that they overwrite are kept until all
    are written, which takes as much memory as the staged rows. Raises ValueError where the tree is
    not like the one that the rows were staged for, and RebalanceError where a program fails: its
    `params` is the tree with what was overwritten put back.
    """
    if not staged:
        return params
    banks = staged[0].banks
    leaves = banks.leaves(params)
    parts = [part for one in staged for part in one.parts]
    overwritten: list[Part] = []
    try:
        for part in parts:
            before = _overwritten(leaves, part, banks) if part is not parts[-1] else None
            _write(leaves, part, banks)
            if before is not None:
                overwritten.append(before)
    except Exception as error:
        raise _put_back(leaves, overwritten, banks, error) from error
    return jax.tree.unflatten(banks.structure, leaves)


def _overwritten(leaves: list[Any], part: Part, banks: Banks) -> Part:
    """What stands where a part will be written, to write it there again."""
    group = banks.groups[part.group]
    rows = read_rows([leaves[i] for i in group.leaves], part.table, spread=group.spread)
    return part._replace(rows=rows)


def _write(leaves: list[Any], part: Part, banks: Banks) -> None:
    group = banks.groups[part.group]
    arrays = [leaves[i] for i in group.leaves]
    written = write_rows(arrays, part.rows, part.table, spread=group.spread)
    for index, bank in zip(group.leaves, written, strict=True):
        leaves[index] = bank


def _put_back(
    leaves: list[Any], overwritten: list[Part], banks: Banks, error: Exception
) -> RebalanceError:
    """Undo a flip that failed half-way; the error to be raised."""
    why = f"writing rows into their slots failed: {type(error).__name__}: {error}"
    try:
        for part in reversed(overwritten):
            _write(leaves, part, banks)
    except Exception as second:
        why += f". Putting back what was overwritten failed too: {type(second).__name__}: {second}"
        whole = False
    else:
        whole = not any(leaves[i].is_deleted() for group in banks.groups for i in group.leaves)
    if whole:
        params = jax.tree.unflatten(banks.structure, leaves)
        return RebalanceError(
            f"{why}. The tree is as it was: go on with this error's `params`", params
        )
    return RebalanceError(
        f"{why}. The weights are lost; place them anew, from a checkpoint or a host copy", None
    )


@dataclasses.dataclass(frozen=True)
class Held:
    """A row that was read and is not yet on its way, from each group that has its layer."""

    banks: Banks
    layer: int
    source: int
    rows: dict[int, Rows]  # by group
    specs: dict[int, list[Any]]  # of its packs

    def arrays(self) -> list[jax.Array]:
        return jax.tree.leaves(self.rows)


def hold_row(params, layer: int, source: int, *, banks: Banks) -> Held:
    """Read a slot's row, and keep it on its rank: the slot may be overwritten."""
    leaves, rows, specs = banks.leaves(params), {}, {}
    rank, slot = divmod(source, banks.slots_per_rank)
    for index, group in enumerate(banks.groups):
        if group.layer in (None, layer):
            table = np.zeros((banks.num_ranks, 1, 2), np.int32)
            table[rank, 0] = layer if group.layer is None else 0, slot
            arrays = [leaves[i] for i in group.leaves]
            rows[index] = read_rows(arrays, table, spread=group.spread)
            specs[index] = packs.specs(arrays, group.spread)
    return Held(banks, layer, source, rows, specs)


def stage_held(held: Held, destination: int, *, collective: bool = False) -> Staged:
    """Send a row that was held to the rank of its destination."""
    banks = held.banks
    sender, (receiver, slot) = (
        held.source // banks.slots_per_rank,
        divmod(destination, banks.slots_per_rank),
    )
    parts = []
    for index, rows in held.rows.items():
        group = banks.groups[index]
        table = np.zeros((banks.num_ranks, 1, 2), np.int32)
        table[..., 1] = banks.slots_per_rank
        table[receiver, 0] = held.layer if group.layer is None else 0, slot
        route = Route(*(np.array([x]) for x in (sender, 0, receiver, 0)))
        specs = tuple(held.specs[index])
        far = collective or crosses(group.spread, route.sender, route.receiver).any()
        arrived = deliver(rows, route, group.spread, specs, collective=bool(far))
        parts.append(Part(index, arrived, table))
    return Staged(banks, tuple(parts))


def padded(count: int) -> int:
    """The number of rows that a program is compiled for: the next power of two.

    >>> [padded(n) for n in (0, 1, 3, 8)]
    [0, 1, 4, 8]
    """
    return count and 1 << (count - 1).bit_length()


def of_group(group: Group, moves: Moves) -> Moves:
    """The moves of the group's layers; of its only layer as layer 0."""
    if group.layer is None:
        return moves
    own = moves.take(moves.layer == group.layer)
    return own._replace(layer=np.zeros_like(own.layer))


def _ways(
    group: Group, moves: Moves, per_rank: int, collective: bool
) -> Iterator[tuple[bool, Moves]]:
    """A group's moves, first those by copies, then (True) those by the collective program."""
    own = of_group(group, moves)
    far = np.full(own.layer.size, collective)
    if not collective:
        far = crosses(group.spread, own.source // per_rank, own.destination // per_rank)
    far &= own.source >= 0
    for which, chosen in ((False, ~far), (True, far)):
        if chosen.any():
            yield which, own.take(chosen)


def _stage(
    arrays, moves: Moves, index: int, banks: Banks, host: RowSource | None, collective: bool
) -> Part:
    group, per_rank = banks.groups[index], banks.slots_per_rank
    read = moves.source >= 0
    sender, receiver = moves.source[read] // per_rank, moves.destination // per_rank
    out, into = turns(sender), turns(receiver)
    count = padded(1 + int(max(out.max(initial=0), into.max())))
    table = np.zeros((banks.num_ranks, count, 2), np.int32)
    writes = table.copy()
    writes[..., 1] = per_rank
    table[sender, out, 0] = moves.layer[read]
    table[sender, out, 1] = moves.source[read] % per_rank
    writes[receiver, into, 0] = moves.layer
    writes[receiver, into, 1] = moves.destination % per_rank
    hosted = []
    for i in np.flatnonzero(~read):
        layer = int(moves.layer[i]) if group.layer is None else group.layer
        if host is None:
            raise ValueError(
                f"layer {layer}: no device holds expert {~moves.source[i]}; give a host copy"
            )
        row = host.row(banks, index, layer, int(~moves.source[i]))
        hosted.append(Hosted(int(receiver[i]), int(into[i]), row))
    rows = read_rows(arrays, table, spread=group.spread)
    specs = tuple(packs.specs(arrays, group.spread))
    route = Route(sender, out, receiver[read], into[read])
    arrived = deliver(rows, route, group.spread, specs, hosted, collective=collective)
    return Part(index, arrived, writes)


def turns(rank: np.ndarray) -> np.ndarray:
    """How many elements of the same rank stand before each.

    >>> turns(np.array([1, 0, 1, 1])).tolist()
    [0, 0, 1, 2]
    """
    order = np.argsort(rank, kind="stable")
    ordered = rank[order]
    turn = np.empty_like(rank)
    turn[order] = np.arange(rank.size) - np.searchsorted(ordered, ordered)
    return turn
