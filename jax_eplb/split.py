"""Split: how the tokens of a batch are divided among the replicas of their experts.

Axes: L layers, E experts, S slots, P ranks, N = S / P slots of a rank; `...` leading axes, such as
the W windows of a recording.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num

from jax_eplb.placement import Placement


def even_split(
    load: Num[Array, "*windows L E"] | np.ndarray,
    slot_to_expert: Int[Array, "L S"] | np.ndarray,
    num_experts: int,
) -> Float[Array, "*windows L S"]:
    """Tokens of each slot where each expert's tokens are dealt evenly over its replicas.

    The result is float32: an expert's tokens need not be a multiple of its replicas. Takes numpy
    counts of 64 bits too. Raises ValueError where the last two axes of `load` do not fit the table.

    >>> even_split(jnp.array([[6, 1, 2]]), jnp.array([[0, 1, 2, 0]]), 3).tolist()
    [[3.0, 1.0, 2.0, 3.0]]
    """
    expected = (slot_to_expert.shape[0], num_experts)
    if load.shape[-2:] != expected:
        raise ValueError(
            f"load has shape {load.shape}; expected [..., {expected[0]} layers, "
            f"{expected[1]} experts], as in the placement"
        )
    # Cast here: jit would wrap 64-bit counts around to 32 bits.
    return _even_split(jnp.asarray(load, jnp.float32), jnp.asarray(slot_to_expert, jnp.int32))


def rank_load(
    load: Num[Array, "*windows L E"] | np.ndarray, placement: Placement
) -> Float[Array, "*windows L P"]:
    """Tokens of each rank under `even_split`, float32.

    >>> placement = Placement.default(num_experts=3, num_slots=4, num_ranks=2)  # 0 1 | 1 2
    >>> rank_load(jnp.array([[6, 1, 2]]), placement).tolist()
    [[6.5, 2.5]]
    """
    tokens = even_split(load, placement.slot_to_expert, placement.num_experts)
    return sum_by_rank(tokens, placement.num_ranks)


def sum_by_rank(slot_tokens: Float[Array, "... S"], num_ranks: int) -> Float[Array, "... P"]:
    """Add up the slots of each rank.

    >>> sum_by_rank(jnp.array([3.0, 1.0, 2.0, 3.0]), 2).tolist()
    [4.0, 5.0]
    """
    return slot_tokens.reshape(*slot_tokens.shape[:-1], num_ranks, -1).sum(axis=-1)


def count_replicas(slot_to_expert: Int[Array, "L S"], num_experts: int) -> Int[Array, "L E"]:
    """How many slots hold each expert.

    >>> count_replicas(jnp.array([[0, 1, 2, 0]]), 3).tolist()
    [[2, 1, 1]]
    """
    return jax.vmap(lambda row: jnp.zeros(num_experts, jnp.int32).at[row].add(1))(slot_to_expert)


@jax.jit
def _even_split(
    load: Float[Array, "*windows L E"], slot_to_expert: Int[Array, "L S"]
) -> Float[Array, "*windows L S"]:
    count = jnp.maximum(count_replicas(slot_to_expert, load.shape[-1]), 1)
    share = load / jnp.broadcast_to(count.astype(jnp.float32), load.shape)
    pick = jax.vmap(lambda share, slots: share[..., slots], in_axes=(-2, 0), out_axes=-2)
    return pick(share, slot_to_expert)
