"""Rows read from the slots of banks and written into them, on every device for itself.

Axes: P ranks, N slots of a rank, M rows of a rank. A table int32[P, M, 2] says, for each rank, the
layer and the slot (counted within the rank) of each of its rows.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from jax_eplb.moving import packs
from jax_eplb.moving.banks import Spread

Rows = list[list[jax.Array]]  # [M][pack]: [P, width], a row of each rank


@functools.partial(jax.jit, static_argnames="spread")
def read_rows(banks: list[jax.Array], table: np.ndarray, *, spread: Spread) -> Rows:
    """Each rank's rows of `table`."""

    def local(banks, table):
        mine = table[jax.lax.axis_index(spread.axis_name)]
        ats = [_index(place, spread) for place in mine]
        return [packs.pack([bank[at] for bank in banks], banks, spread) for at in ats]

    row_specs = packs.specs(banks, spread)
    return jax.shard_map(
        local,
        mesh=spread.mesh,
        in_specs=(spread.banks, P()),
        out_specs=[row_specs] * table.shape[1],
    )(banks, jnp.asarray(table))


def write_rows(
    banks: list[jax.Array], rows: Rows, table: np.ndarray, *, spread: Spread
) -> list[jax.Array]:
    """The banks, used up, with each rank's rows in the slots of `table`; slot N is nowhere."""
    shardings = [bank.sharding for bank in banks]
    written = write_program(banks, rows, table, spread=spread)
    # On one rank a result may not name the axis, and banks are found by its name.
    return [
        bank if bank.sharding == sharding else jax.device_put(bank, sharding)
        for bank, sharding in zip(written, shardings, strict=True)
    ]


@functools.partial(jax.jit, static_argnames="spread", donate_argnums=0)
def write_program(
    banks: list[jax.Array], rows: Rows, table: np.ndarray, *, spread: Spread
) -> list[jax.Array]:
    """The program of `write_rows`."""

    def local(banks, rows, table):
        mine = table[jax.lax.axis_index(spread.axis_name)]
        at = _index(mine.T, spread)
        parts = zip(*(packs.unpack(row, banks, spread) for row in rows), strict=True)
        # A scatter, as XLA does it in place; `dynamic_update_slice` with a row kept where there is
        # nothing to write copies the bank. One for all rows: on a GPU one launch, not four a row.
        return [
            bank.at[at].set(jnp.stack(part), mode="drop", unique_indices=True)
            for bank, part in zip(banks, parts, strict=True)
        ]

    row_specs = packs.specs(banks, spread)
    return jax.shard_map(
        local,
        mesh=spread.mesh,
        in_specs=(spread.banks, [row_specs] * len(rows), P()),
        out_specs=spread.banks,
    )(banks, rows, jnp.asarray(table))


def _index(place, spread: Spread):
    layer, slot = place[0], place[1]
    return (layer, slot) if spread.stacked else (slot,)
