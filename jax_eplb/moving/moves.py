"""The difference of two placements as moves: which slot is filled from which.

Axes: L layers, S slots, P ranks, M moves. All on the host, in numpy.
"""

import itertools
from collections.abc import Collection
from typing import NamedTuple

import numpy as np


class Moves(NamedTuple):
    """One element a move: what slot `source` holds is copied to slot `destination`.

    A negative source stands for a host copy of the expert `~source`: no device holds it.
    """

    layer: np.ndarray  # int32[M]: the position in the stack, not the model's number
    source: np.ndarray  # int32[M]: a slot of the old placement
    destination: np.ndarray  # int32[M]: no slot of a layer twice

    def take(self, index) -> "Moves":
        """The moves that an index or a mask picks."""
        return Moves(self.layer[index], self.source[index], self.destination[index])


def find_moves(
    old_table: np.ndarray,
    new_table: np.ndarray,
    *,
    num_ranks: int,
    num_experts: int | None = None,
    ranks_per_node: int | None = None,
    lost_ranks: Collection[int] = (),
) -> Moves:
    """What to copy so that slots [L, S] filled as `old_table` says become as `new_table` says.

    A slot whose expert stays is no move, nor is one that becomes empty (id `num_experts`). Each
    move reads from the nearest holder of its expert in the old table: the same rank, else the same
    node of `ranks_per_node`, else anywhere; of holders equally near one is chosen so that no rank
    sends more than it must: the loads of the senders are an optimal semi-matching (Harvey, Ladner,
    Lovász, Tamir: Semi-matchings for bipartite graphs and load balancing, 2006). Slots of
    `lost_ranks` hold nothing, and are filled anew. Where no holder is left: a host copy.

    Raises ValueError where the tables have different shapes, or ranks do not divide the slots.

    >>> moves = find_moves(np.array([[0, 1, 2, 0]]), np.array([[0, 1, 2, 1]]), num_ranks=2)
    >>> moves.source.tolist(), moves.destination.tolist()
    ([1], [3])
    """
    old_table, new_table = np.asarray(old_table), np.asarray(new_table)
    if old_table.shape != new_table.shape or old_table.ndim != 2:
        raise ValueError(
            f"the tables have shapes {old_table.shape} and {new_table.shape}; both must be "
            "[layers, slots], with the same sizes"
        )
    num_slots = old_table.shape[1]
    if num_ranks < 1 or num_slots % num_ranks:
        raise ValueError(f"{num_slots} slots cannot be divided among {num_ranks} ranks")
    if ranks_per_node is not None and (ranks_per_node < 1 or num_ranks % ranks_per_node):
        raise ValueError(f"{num_ranks} ranks cannot be divided into nodes of {ranks_per_node}")
    per_rank = num_slots // num_ranks
    lost = np.isin(np.arange(num_slots) // per_rank, list(lost_ranks))
    changed = (old_table != new_table) | lost
    if num_experts is not None:
        changed &= new_table < num_experts
    layer, destination = np.nonzero(changed)
    expert = new_table[layer, destination]
    distance = _distances(num_ranks, ranks_per_node)
    source = choose_sources(
        np.where(lost, -1, old_table), layer, expert, destination // per_rank, distance
    )
    return Moves(*(x.astype(np.int32) for x in (layer, source, destination)))


def choose_sources(
    table: np.ndarray,
    layer: np.ndarray,
    expert: np.ndarray,
    receiver: np.ndarray,
    distance: np.ndarray,
) -> np.ndarray:
    """The slot of the table [L, S] that each row [M] is read from; ~expert where none holds it.

    `distance` [receivers, senders]: 0 for the same rank, less is nearer.
    """
    source = ~expert
    if not layer.size:
        return source
    per_rank = table.shape[1] // distance.shape[1]
    move, holder = _holders(table, layer, expert)
    near = distance[receiver[move], holder // per_rank]
    nearest = np.full(layer.size, distance.max() + 1)
    np.minimum.at(nearest, move, near)
    keep = near == nearest[move]
    move, holder, local = move[keep], holder[keep], near[keep] == 0
    source[move[local][::-1]] = holder[local][::-1]  # the first of several stays
    _spread_evenly(source, move[~local], holder[~local], receiver, per_rank, distance.shape[1])
    return source


def _distances(num_ranks: int, ranks_per_node: int | None) -> np.ndarray:
    """int[P, P]: 0 for the same rank, 1 for the same node, 2 for another."""
    node = np.arange(num_ranks) // (ranks_per_node or num_ranks)
    return 2 - (node[:, None] == node) - np.eye(num_ranks, dtype=int)


def _holders(table, layer, expert):
    """(move, slot) of all pairs where the slot holds the move's expert, by move, then by slot."""
    held = np.nonzero(table >= 0)
    ids = table[held]
    width = int(max(ids.max(initial=0), expert.max())) + 1
    key = held[0] * width + ids
    order = np.argsort(key, kind="stable")
    wanted = layer * width + expert
    first, last = (np.searchsorted(key[order], wanted, side) for side in ("left", "right"))
    count = last - first
    move = np.repeat(np.arange(layer.size), count)
    within = np.arange(move.size) - np.repeat(np.cumsum(count) - count, count)
    return move, held[1][order[first[move] + within]]


def _spread_evenly(source, move, holder, receiver, per_rank, num_ranks) -> None:
    """Fill in `source` of the moves in `move` [pairs] from their holders [pairs]."""
    if not move.size:
        return
    moves, row = np.unique(move, return_inverse=True)
    rank = holder // per_rank
    slot_at = np.full((moves.size, num_ranks), -1)  # [M, P]
    slot_at[row[::-1], rank[::-1]] = holder[::-1]  # the first slot of a rank that holds several
    can = slot_at >= 0
    # Fewest choices first; of ranks with the same load the first after the destination's.
    turn = (np.arange(num_ranks) - receiver[moves][:, None]) % num_ranks
    choices = can.sum(axis=1)
    sender = can.argmax(axis=1)
    load = np.bincount(sender[choices == 1], minlength=num_ranks)
    free = np.argsort(choices, kind="stable")[(choices == 1).sum() :]
    for i in free:
        ranks = np.flatnonzero(can[i])
        sender[i] = ranks[np.argmin(load[ranks] * num_ranks + turn[i, ranks])]
        load[sender[i]] += 1
    sender[free] = _relieved(sender[free], can[free], load)
    source[moves] = slot_at[np.arange(moves.size), sender]


def _relieved(sender, can, load) -> np.ndarray:
    """The senders, after shifts along chains of ranks from a fuller to an emptier one.

    Where there is no such chain, the loads are as even as they can be (Harvey et al., theorem 3.1).
    """
    # How many moves that one rank sends now another could send.
    shift = np.zeros((load.size, load.size), int)
    np.add.at(shift, sender, can)
    while True:
        for start in np.argsort(-load, kind="stable"):
            if load[start] < load.min() + 2:
                return sender
            chain = _chain(shift > 0, int(start), load)
            if chain:
                break
        else:
            return sender
        for here, there in itertools.pairwise(chain):
            i = np.flatnonzero((sender == here) & can[:, there])[0]
            sender[i] = there
            shift[here] -= can[i]
            shift[there] += can[i]
        load[chain[0]] -= 1
        load[chain[-1]] += 1


def _chain(shift, start: int, load) -> list[int]:
    """Ranks from `start` to the first found that has at least two less to send, or none."""
    before = {start: start}
    queue = [start]
    for rank in queue:
        if load[rank] <= load[start] - 2:
            chain = [rank]
            while chain[-1] != start:
                chain.append(before[chain[-1]])
            return chain[::-1]
        for further in np.flatnonzero(shift[rank]):
            if int(further) not in before:
                before[int(further)] = rank
                queue.append(int(further))
    return []
