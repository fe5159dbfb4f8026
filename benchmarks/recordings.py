"""Plan on one part of a recording, score on another: what a plan is worth for tokens to come.

Axes: W windows, L layers, E experts, S slots, P ranks.
"""

import itertools
from collections.abc import Sequence

import numpy as np

PROTOCOLS = ("half", "interleaved", "online")
_CHUNKS = 10


def splits(windows: np.ndarray, protocol: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """Pairs of windows [W, L, E] to plan on and windows to score, in time order.

    half: the first half, then the second. interleaved: even windows, then odd ones. online: ten
    chunks of equal length (windows left over at the end are dropped), each followed by the next.

    >>> [(a.ravel().tolist(), b.ravel().tolist()) for a, b in splits(np.arange(5), "interleaved")]
    [([0, 2, 4], [1, 3])]
    """
    if protocol == "half":
        return [(windows[: len(windows) // 2], windows[len(windows) // 2 :])]
    if protocol == "interleaved":
        return [(windows[::2], windows[1::2])]
    if protocol == "online":
        size = len(windows) // _CHUNKS
        if not size:
            raise ValueError(f"{len(windows)} windows: online needs at least {_CHUNKS}")
        chunks = [windows[i * size : (i + 1) * size] for i in range(_CHUNKS)]
        return list(itertools.pairwise(chunks))
    raise ValueError(f"protocol {protocol!r} must be one of: {', '.join(PROTOCOLS)}")


def condense(windows: np.ndarray, most: int = 64) -> np.ndarray:
    """Sum neighbouring windows [W, L, E] so that at most `most` remain; the last may sum fewer.

    FlashLB looks at 64 samples: of 65 to 127 windows it would drop the oldest.

    >>> condense(np.arange(5), 2).tolist()
    [3, 7]
    """
    return np.add.reduceat(windows, range(0, len(windows), max(1, -(-len(windows) // most))))


def window_imbalance(slot_to_expert: np.ndarray, windows: np.ndarray, num_ranks: int) -> np.ndarray:
    """(max - mean) / mean of the ranks' tokens under the even split, float64[W, L].

    slot_to_expert: int[L, S]. windows: [W, L, E]. 0 in a window without tokens.
    """
    table = np.asarray(slot_to_expert)
    count = (table[:, None, :] == np.arange(windows.shape[-1])[:, None]).sum(axis=-1)  # [L, E]
    share = windows / np.maximum(count, 1)
    of_slots = np.take_along_axis(share, np.broadcast_to(table, (len(windows), *table.shape)), -1)
    load = of_slots.reshape(*of_slots.shape[:2], num_ranks, -1).sum(axis=-1)  # [W, L, P]
    mean = load.mean(axis=-1)
    return (load.max(axis=-1) - mean) / np.where(mean > 0, mean, 1)


def held_out_imbalance(
    tables: Sequence[np.ndarray], tests: Sequence[np.ndarray], num_ranks: int
) -> float:
    """Mean imbalance over windows and layers, table i [L, S] scored on windows i [W, L, E]."""
    pairs = zip(tables, tests, strict=True)
    each = [window_imbalance(table, windows, num_ranks) for table, windows in pairs]
    return float(np.concatenate(each).mean())


def fetched_experts(old: np.ndarray, new: np.ndarray, num_experts: int, num_ranks: int) -> float:
    """Experts that ranks must load to turn table `old` into `new`, both [L, S]; mean of a layer."""

    def held(table: np.ndarray) -> np.ndarray:  # [L, P, E]
        by_rank = table.reshape(len(table), num_ranks, -1)
        holds = np.zeros((*by_rank.shape[:2], num_experts), bool)
        np.put_along_axis(holds, by_rank, True, axis=-1)
        return holds

    return float((held(new) & ~held(old)).sum(axis=(1, 2)).mean())
