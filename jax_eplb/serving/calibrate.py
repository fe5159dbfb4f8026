"""What a token costs on the rank that computes it: measured before serving.

Axes: N slots of a rank, D embedding width.
"""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

from jax_eplb.moe import MoEConfig
from jax_eplb.moe.feed_forward import ExpertWeights, expert_feed_forward

# Rows beyond those that fill the device, and so many more.
_ROWS = 1024
_TIMES = 5


def seconds_per_token(experts: ExpertWeights, config: MoEConfig) -> float:
    """Seconds for each choice computed in one layer, by the experts of the first rank.

    From the time that twice as many rows take longer, so that what does not depend on the load is
    left out. `experts` are stacked layers' banks, [L, S, ...].
    """
    local = jax.tree.map(lambda bank: bank.addressable_shards[0].data[0], experts)
    slots = config.slots_per_rank
    run = jax.jit(
        functools.partial(expert_feed_forward, activation=config.activation, kernel=config.kernel)
    )
    device = jax.tree.leaves(local)[0].devices()
    dtype = experts.gate_up.dtype
    best = []
    for rows in (_ROWS, 2 * _ROWS):
        tokens = jax.device_put(jnp.ones((rows, config.embed_dim), dtype), *device)
        sizes = np.full(slots, rows // slots, np.int32)
        sizes[0] += rows - sizes.sum()
        jax.block_until_ready(run(tokens, local, sizes))
        times = []
        for _ in range(_TIMES):
            begun = time.perf_counter()
            jax.block_until_ready(run(tokens, local, sizes))
            times.append(time.perf_counter() - begun)
        best.append(min(times))
    # Timers are coarse: never nothing.
    return max(best[1] - best[0], best[1] / 100) / _ROWS
