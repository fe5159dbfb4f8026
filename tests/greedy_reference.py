"""The well-known greedy planner in plain NumPy, to compare with; all layers at once.

Replicate: each spare slot goes to the expert with the largest load / replicas. Pack: the heaviest
replica goes to the least loaded rank with a free slot. Ties go to the lowest id. This is the method
of DeepSeek's EPLB without groups, of TensorRT-LLM, and of vLLM's and SGLang's defaults. It may put
two replicas of one expert on one rank.
"""

import numpy as np


def greedy_replicate(load: np.ndarray, num_slots: int) -> np.ndarray:
    """Replicas of each expert, int64[L, E], for loads [L, E]."""
    num_layers, num_experts = load.shape
    layers = np.arange(num_layers)
    count = np.ones(load.shape, np.int64)
    for _ in range(num_slots - num_experts):
        count[layers, (load / count.astype(load.dtype)).argmax(axis=1)] += 1
    return count


def greedy_pack(load: np.ndarray, count: np.ndarray, num_ranks: int) -> np.ndarray:
    """slot_to_expert int64[L, S]; a rank's slots stand in the order in which they were filled."""
    num_layers = len(load)
    num_slots = int(count[0].sum())
    per_rank = num_slots // num_ranks
    share = load / count.astype(load.dtype)
    heaviest_first = np.argsort(-share, axis=1, kind="stable")
    experts = np.stack(
        [np.repeat(order, n[order]) for order, n in zip(heaviest_first, count, strict=True)]
    )
    layers = np.arange(num_layers)
    rank_load = np.zeros((num_layers, num_ranks), load.dtype)
    used = np.zeros((num_layers, num_ranks), np.int64)
    slot_to_expert = np.zeros((num_layers, num_slots), np.int64)
    for expert in experts.T:
        rank = np.where(used < per_rank, rank_load, np.inf).argmin(axis=1)
        slot_to_expert[layers, rank * per_rank + used[layers, rank]] = expert
        rank_load[layers, rank] += share[layers, expert]
        used[layers, rank] += 1
    return slot_to_expert


def greedy_plan(load: np.ndarray, num_slots: int, num_ranks: int) -> np.ndarray:
    """slot_to_expert int64[L, S] for loads [L, E], in float64."""
    load = np.asarray(load, np.float64)
    return greedy_pack(load, greedy_replicate(load, num_slots), num_ranks)


def rank_load_of(load: np.ndarray, slot_to_expert: np.ndarray, num_ranks: int) -> np.ndarray:
    """Tokens of each rank under the even split, float64[L, P]."""
    tokens = np.zeros((len(load), num_ranks))
    for layer, slots in enumerate(slot_to_expert):
        share = load[layer] / np.maximum(np.bincount(slots, minlength=load.shape[1]), 1)
        tokens[layer] = share[slots].reshape(num_ranks, -1).sum(axis=1)
    return tokens


def imbalance_of(load: np.ndarray, slot_to_expert: np.ndarray, num_ranks: int) -> np.ndarray:
    """(max - mean) / mean of the ranks' tokens, float64[L]; 0 without load."""
    tokens = rank_load_of(load, slot_to_expert, num_ranks)
    mean = tokens.mean(axis=1)
    return (tokens.max(axis=1) - mean) / np.where(mean > 0, mean, 1)


def duplicates(slot_to_expert: np.ndarray, num_ranks: int) -> np.ndarray:
    """Slots whose expert stands on the same rank already, int64[L]."""
    ranks = np.sort(np.reshape(slot_to_expert, (len(slot_to_expert), num_ranks, -1)), axis=-1)
    return (ranks[..., 1:] == ranks[..., :-1]).sum(axis=(1, 2))
