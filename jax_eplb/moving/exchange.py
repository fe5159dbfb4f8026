"""Rows sent across processes: two exchanges of equal parts, whatever goes where.

Axes: P ranks, M rows of a rank at most, C = width / P of a row, rounded up.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int, Num

from jax_eplb.moving.banks import Spread


@functools.partial(jax.jit, static_argnames=("spread", "specs"))
def exchange_rows(
    rows: list[list[jax.Array]], origin: np.ndarray, *, spread: Spread, specs: tuple[P, ...]
) -> list[list[jax.Array]]:
    """Row m of rank r comes from rank and row origin[r, m], int32[P, M, 2]; packs as they came.

    An `all_to_all` padded to the fullest pair of ranks would send P rows for each that moves.
    Instead every row is cut into P parts, one to each rank, which sends them on to where the row
    belongs: each rank sends 2 M rows in all, and no pair of ranks more than another. After
    Valiant: A scheme for fast parallel communication, 1982. Rows that stay on their rank do not
    need this; they are taken as they are.
    """

    def local(rows, origin):
        me = jax.lax.axis_index(spread.axis_name)
        stays = origin[me, :, 0] == me
        stacks = [jnp.concatenate(row) for row in zip(*rows, strict=True)]  # [M, width] each
        sent = [_send(stack, origin, spread) for stack in stacks]
        own = [stack[origin[me, :, 1]] for stack in stacks]
        arrived = [jnp.where(stays[:, None], a, b) for a, b in zip(own, sent, strict=True)]
        return [[stack[m][None] for stack in arrived] for m in range(len(rows))]

    every = [list(specs) for _ in rows]
    return jax.shard_map(local, mesh=spread.mesh, in_specs=(every, P()), out_specs=every)(
        rows, jnp.asarray(origin)
    )


def _send(stack: Num[Array, "M width"], origin: Int[Array, "P M 2"], spread: Spread):
    num_rows, width = stack.shape
    ranks = spread.num_ranks
    size = -(-width // ranks)
    exchange = functools.partial(
        jax.lax.all_to_all, axis_name=spread.axis_name, split_axis=0, concat_axis=0
    )
    cut = jnp.pad(stack, ((0, 0), (0, size * ranks - width))).reshape(num_rows, ranks, size)
    parts = exchange(cut.transpose(1, 0, 2))  # [P, M, C]: this rank's part of every row
    onward = parts.reshape(ranks * num_rows, size)[origin[..., 0] * num_rows + origin[..., 1]]
    back = exchange(onward)  # [P, M, C]: all parts of this rank's rows
    return back.transpose(1, 0, 2).reshape(num_rows, ranks * size)[:, :width]
