"""An order of moves in which no slot is overwritten before all that read it have done so.

Axes: M moves. A slot is written at most once, so at most one move waits for each: the one that
writes the slot it reads. So moves form trees and chains, and cycles.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from jax_eplb.moving.moves import Moves


class Wave(NamedTuple):
    """Moves that are made together: all are read before one is written."""

    moves: list[int]  # positions


class Hold(NamedTuple):
    """The row of a move is read and kept, so that its slot may be overwritten."""

    move: int


class Release(NamedTuple):
    """The row that is held is written."""

    move: int


def in_waves(
    moves: Moves, *, slots_per_rank: int, slots_at_once: int
) -> Iterator[Wave | Hold | Release]:
    """Moves in waves in which no rank sends or gets more than `slots_at_once` rows.

    A cycle goes within one wave. One that does not fit is opened by a row that is held meanwhile,
    never two at a time.

    >>> swap = Moves(np.zeros(2, int), np.array([0, 1]), np.array([1, 0]))
    >>> list(in_waves(swap, slots_per_rank=2, slots_at_once=1))
    [Hold(move=0), Wave(moves=[1]), Release(move=0)]
    """
    sends, gets = moves.source // slots_per_rank, moves.destination // slots_per_rank
    most = max(np.bincount(ranks).max(initial=0) for ranks in (sends[sends >= 0], gets))
    if most <= slots_at_once:
        if most:
            yield Wave(list(range(gets.size)))  # read before any is written: no order is needed
        return
    follower, free, cycles = _dependencies(moves)
    sender, receiver = sends.tolist(), gets.tolist()
    waves = _Waves(sender, receiver, slots_at_once)
    earliest: Counter[int | None] = Counter()  # the last wave that reads what a move writes
    for move in free:
        wave = waves.add([move], earliest[move])
        earliest[follower[move]] = max(wave, earliest[follower[move]])
    too_long = []
    for cycle in cycles:
        if max(waves.ends(cycle).values()) <= slots_at_once:
            waves.add(cycle, max(earliest[move] for move in cycle))
        else:
            too_long.append(cycle)
    yield from map(Wave, waves.members)
    for first, *others in too_long:
        yield Hold(first)
        waves, wave = _Waves(sender, receiver, slots_at_once), 0
        for move in others:
            wave = waves.add([move], wave)
        yield from map(Wave, waves.members)
        yield Release(first)


def in_any_order(sender: np.ndarray, receiver: np.ndarray, most: int) -> list[list[int]]:
    """Moves [M] that overwrite nothing, in waves in which no rank sends or gets more than `most`.

    >>> in_any_order(np.array([0, 0, 1]), np.array([1, 1, 0]), 1)
    [[0, 2], [1]]
    """
    waves = _Waves(sender.tolist(), receiver.tolist(), most)
    for move in range(sender.size):
        waves.add([move], 0)
    return waves.members


def _dependencies(moves: Moves) -> tuple[list[int | None], list[int], list[list[int]]]:
    """(the move that waits for each, an order of those outside cycles, the cycles in order).

    In the order each move comes after those that read the slot it writes.
    """
    layer, source = moves.layer.tolist(), moves.source.tolist()
    writer = {slot: i for i, slot in enumerate(zip(layer, moves.destination.tolist(), strict=True))}
    follower = [writer.get(slot) for slot in zip(layer, source, strict=True)]
    readers = Counter(follower)
    order = [move for move in range(len(layer)) if not readers[move]]
    for move in order:
        after = follower[move]
        readers[after] -= 1
        if after is not None and not readers[after]:
            order.append(after)
    cycles, seen = [], set(order)
    for move in range(len(layer)):
        if move not in seen:
            cycle = [move]
            while (after := follower[cycle[-1]]) not in (move, None):
                cycle.append(after)
            seen.update(cycle)
            cycles.append(cycle)
    return follower, order, cycles


class _Waves:
    """Waves that are filled so that no rank has more than its share in one."""

    def __init__(self, sender: list[int], receiver: list[int], most: int):
        self.sender, self.receiver, self.most = sender, receiver, most
        self.members: list[list[int]] = []
        self.counts: list[Counter[tuple[str, int]]] = []  # rows that a rank sends, and gets
        self.full: Counter[tuple[str, int]] = Counter()  # so many first waves have no room

    def ends(self, moves: Sequence[int]) -> Counter[tuple[str, int]]:
        """How many rows each rank sends and gets; of rows from the host, the sender is none."""
        ends = Counter(("sends", self.sender[i]) for i in moves if self.sender[i] >= 0)
        ends.update(("gets", self.receiver[i]) for i in moves)
        return ends

    def add(self, moves: Sequence[int], earliest: int) -> int:
        """Put moves into the first wave from `earliest` on that has room; which one it was."""
        ends = self.ends(moves)
        wave = max(earliest, *(self.full[end] for end in ends))
        while wave < len(self.counts) and any(
            self.counts[wave][end] + n > self.most for end, n in ends.items()
        ):
            wave += 1
        while wave >= len(self.counts):
            self.members.append([])
            self.counts.append(Counter())
        self.members[wave].extend(moves)
        self.counts[wave].update(ends)
        for end in ends:
            while self.full[end] < len(self.counts) and (
                self.counts[self.full[end]][end] >= self.most
            ):
                self.full[end] += 1
        return wave
