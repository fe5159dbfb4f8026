"""Moves divided into parts that programs are compiled for."""

import numpy as np

from jax_eplb.moving import Moves


def in_parts(moves: Moves, slots_per_rank: int, most: int) -> list[Moves]:
    """Parts in which no rank sends or gets more than `most` rows, few of them.

    All are staged before any is applied, so no part reads what another one wrote.

    >>> moves = Moves(np.zeros(3, int), np.array([0, 1, 2]), np.array([4, 5, 6]))
    >>> [part.source.tolist() for part in in_parts(moves, slots_per_rank=4, most=2)]
    [[0, 1], [2]]
    """
    part = np.zeros(moves.layer.size, int)
    used: list[tuple[dict[int, int], dict[int, int]]] = []
    for i, (source, destination) in enumerate(zip(moves.source, moves.destination, strict=True)):
        ends = int(source) // slots_per_rank, int(destination) // slots_per_rank
        while part[i] < len(used) and any(
            count.get(end, 0) >= most for count, end in zip(used[part[i]], ends, strict=True)
        ):
            part[i] += 1
        if part[i] == len(used):
            used.append(({}, {}))
        for count, end in zip(used[part[i]], ends, strict=True):
            count[end] = count.get(end, 0) + 1
    return [moves.take(part == number) for number in range(len(used))]
