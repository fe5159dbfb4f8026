"""Programs compiled beforehand, so that nothing compiles while a model serves."""

import jax
import numpy as np
from jax.sharding import NamedSharding

from jax_eplb.mesh import one_process
from jax_eplb.moving import packs
from jax_eplb.moving.banks import Banks, find_banks
from jax_eplb.moving.exchange import exchange_rows
from jax_eplb.moving.rows import read_rows, write_program
from jax_eplb.moving.staging import padded


def prepare_moves(
    params, most: int, *, banks: Banks | None = None, collective: bool = False
) -> None:
    """Compile what moves need, for each power of two up to `most` slots of a rank at once.

    `banks` and `collective` as for `stage_moves`. Runs nothing and changes nothing. Groups of the
    same shapes share their programs.
    """
    banks = find_banks(params) if banks is None else banks
    leaves = banks.leaves(params)
    for group in banks.groups:
        arrays, spread = [leaves[i] for i in group.leaves], group.spread
        specs = tuple(packs.specs(arrays, spread))
        shardings = [NamedSharding(spread.mesh, spec) for spec in specs]
        for power in range(padded(most).bit_length()):
            table = np.zeros((banks.num_ranks, 1 << power, 2), np.int32)
            read = read_rows.lower(arrays, table, spread=spread)
            rows = [
                [
                    jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
                    for x, sharding in zip(row, shardings, strict=True)
                ]
                for row in read.out_info
            ]
            read.compile()
            if collective or not one_process(spread.mesh):
                exchange_rows.lower(rows, table, spread=spread, specs=specs).compile()
            write_program.lower(arrays, rows, table, spread=spread).compile()
