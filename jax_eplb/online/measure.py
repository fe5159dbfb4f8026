"""What moving weights costs on this machine: bytes of an expert, and bytes per second."""

import time
from typing import Any

import jax
import numpy as np

from jax_eplb.moving import Banks, Moves, stage_moves
from jax_eplb.online.config import BalancerConfig
from jax_eplb.online.digest import from_first_process
from jax_eplb.online.worth import Costs

_TIMES = 3


def measured_costs(
    params: Any, banks: Banks, config: BalancerConfig, seconds_per_token: float | None
) -> Costs:
    """Process 0's costs on every process: those that the config gives, else those measured.

    Raises ValueError where there is a horizon, and nobody gave the time of a token.
    """
    per_token = config.seconds_per_token or seconds_per_token
    if per_token is None and config.horizon is not None:
        raise ValueError(
            "a horizon weighs time against time: give seconds_per_token, what a token takes on a "
            "rank in one layer"
        )
    speed = config.bytes_per_second or measure_bytes_per_second(params, banks)
    found = from_first_process(np.array([per_token or 0.0, speed]))
    return Costs(float(found[0]), float(found[1]), bytes_of_slot(params, banks))


def bytes_of_slot(params: Any, banks: Banks) -> int:
    """Bytes of one expert's weights in one layer, whatever else goes with them included."""
    leaves = banks.leaves(params)
    sizes = {}
    for group in banks.groups:
        arrays = [leaves[i] for i in group.leaves]
        slots = [
            array.shape[0] * array.shape[1] if group.layer is None else array.shape[0]
            for array in arrays
        ]
        sizes[group.layer] = sum(a.nbytes // s for a, s in zip(arrays, slots, strict=True))
    # Stacked banks belong to every layer.
    stacked = sizes.pop(None, 0)
    return stacked + max(sizes.values(), default=0)


def measure_bytes_per_second(params: Any, banks: Banks) -> float:
    """How fast every rank sends a row to the next one: the best of three times. Moves nothing."""
    num_ranks, per_rank = banks.num_ranks, banks.slots_per_rank
    first = (np.arange(num_ranks) * per_rank).astype(np.int32)
    layer = banks.groups[0].layer or 0
    moves = Moves(np.full(num_ranks, layer, np.int32), np.roll(first, 1), first)
    best = np.inf
    for _ in range(1 + _TIMES):  # the first may be slow
        begun = time.perf_counter()
        jax.block_until_ready(stage_moves(params, moves, banks=banks).arrays())
        best = min(best, time.perf_counter() - begun)
    return num_ranks * bytes_of_slot(params, banks) / best
