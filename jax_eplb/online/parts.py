"""Moves divided into parts that programs are compiled for."""

from collections import Counter

import numpy as np

from jax_eplb.moving import Moves


def in_parts(moves: Moves, slots_per_rank: int, most: int) -> list[Moves]:
    """Parts in which no rank sends or gets more than `most` rows, few of them.

    All are staged before any is applied, so no part reads what another one wrote. Rows from the
    host, whose source is negative, are sent by no rank.

    >>> moves = Moves(np.zeros(3, int), np.array([0, 1, 2]), np.array([4, 5, 6]))
    >>> [part.source.tolist() for part in in_parts(moves, slots_per_rank=4, most=2)]
    [[0, 1], [2]]
    """
    part = np.zeros(moves.layer.size, int)
    used: list[Counter[tuple[str, int]]] = []
    for i, (source, destination) in enumerate(zip(moves.source, moves.destination, strict=True)):
        ends = [("gets", int(destination) // slots_per_rank)]
        if source >= 0:
            ends.append(("sends", int(source) // slots_per_rank))
        while part[i] < len(used) and any(used[part[i]][end] >= most for end in ends):
            part[i] += 1
        if part[i] == len(used):
            used.append(Counter())
        used[part[i]].update(ends)
    return [moves.take(part == number) for number in range(len(used))]
