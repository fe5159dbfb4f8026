"""The grouped product on Hopper GPUs: one persistent, warp-specialised Pallas kernel.

Axes: M rows sorted by group, G groups, D in (contracted), N columns of the weights, F columns of
the result; F is N, or N / 2 where a gated activation joins gate and up.

Each streaming multiprocessor runs one block of three warpgroups. One feeds tiles of rows and
weights through shared memory by the copy engine, as many stages ahead as fit; the other two
multiply, each its half of the columns, and write the result while the next tile's operands arrive
already. Tiles begin where their group begins, so that none holds rows of two groups: a copy may
read rows of the next group, the product computes them, and the write leaves them out.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from jax_eplb.kernels.tile_table import ALIGN, STEP, Tiles, tile_table
from jax_eplb.kernels.varying import varying_like

WARPGROUPS = 2  # that compute
SWIZZLE = (plgpu.TilingTransform((ALIGN, STEP)), plgpu.SwizzleTransform(128))


def mosaic_product(
    rows: Float[Array, "M D"],
    weights: Float[Array, "G D N"],
    group_sizes: Int[Array, "G"],
    tiles: Tiles,
    *,
    transpose_weights: bool = False,
    activation: Callable[..., jax.Array] | None = None,
    gated: bool = False,
    num_blocks: int = 132,
) -> Float[Array, "M F"]:
    """Each row times its group's weights, which are [G, N, D] if transposed."""
    num_rows = rows.shape[0]
    padding = -num_rows % ALIGN
    rows = jnp.pad(rows, ((0, padding), (0, 0))) if padding else rows
    num_columns = weights.shape[1 if transpose_weights else 2]
    shape = (rows.shape[0], num_columns // 2 if gated else num_columns)
    body = functools.partial(
        _body,
        tiles=tiles,
        transpose_weights=transpose_weights,
        activation=activation,
        gated=gated,
        num_blocks=num_blocks,
    )
    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(shape, rows.dtype),
        grid=(num_blocks,),
        grid_names=("block",),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup, approx_math=True
        ),
    )
    out = kernel(*tile_table(rows.shape[0], group_sizes, tiles.block_m), rows, weights)
    out = varying_like(out, rows, weights, group_sizes)
    return out[:num_rows] if padding else out


def _body(
    group_ref,
    start_ref,
    begin_ref,
    end_ref,
    used_ref,
    x_gmem,
    w_gmem,
    out_gmem,
    *,
    tiles: Tiles,
    transpose_weights: bool,
    activation,
    gated: bool,
    num_blocks: int,
):
    dtype, num_groups = x_gmem.dtype, w_gmem.shape[0]
    depth_steps = x_gmem.shape[1] // STEP
    # A warpgroup's columns of the weights are one piece, or one of gate and one of up.
    pieces = (0, out_gmem.shape[1]) if gated else (0,)
    piece_n = tiles.block_n // WARPGROUPS // len(pieces)
    block_f = piece_n * WARPGROUPS
    num_n = pl.cdiv(out_gmem.shape[1], block_f)
    narrow = out_gmem.shape[1] % block_f != 0  # the last tile reaches past the result
    piece_shape = (piece_n, STEP) if transpose_weights else (STEP, piece_n)
    heights = range(0, tiles.block_m, STEP)  # where a tile's copies of 64 rows begin

    def tile_at(i):
        """This block's i-th tile: its place in the table, its first column, and its stages."""
        linear = lax.axis_index("block") + i * num_blocks
        window = lax.div(linear, jnp.int32(tiles.window * num_n))
        rest = linear - window * (tiles.window * num_n)
        # The last window may be narrower.
        width = jnp.minimum(jnp.int32(tiles.window), used_ref[0] - window * tiles.window)
        m = window * tiles.window + lax.rem(rest, width)
        used = (group_ref[m] < num_groups) & (begin_ref[m] < end_ref[m])
        return m, lax.div(rest, width) * block_f, jnp.where(used, depth_steps, 0)

    @functools.partial(
        pl.run_scoped,
        x_smem=plgpu.SMEM((tiles.steps, tiles.block_m, STEP), dtype, transforms=SWIZZLE),
        w_smem=plgpu.SMEM(
            (tiles.steps, WARPGROUPS, len(pieces), *piece_shape), dtype, transforms=SWIZZLE
        ),
        # Whole tiles leave swizzled, without bank conflicts; parts of tiles leave row by row.
        results=plgpu.RefUnion(
            plgpu.SMEM((WARPGROUPS, 2, STEP, STEP), dtype, transforms=SWIZZLE),
            plgpu.SMEM((WARPGROUPS, 2, STEP, STEP), dtype),
        ),
        full=plgpu.Barrier(
            num_arrivals=len(heights) + WARPGROUPS * len(pieces), num_barriers=tiles.steps
        ),
        empty=plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=tiles.steps),
        collective_axes="warpgroup",
    )
    def _scoped(x_smem, w_smem, results, full, empty):
        warpgroup = lax.axis_index("warpgroup")
        left = used_ref[0] * num_n - lax.axis_index("block")
        count = lax.div(left + (num_blocks - 1), jnp.int32(num_blocks))

        def slot_of(step):
            return lax.rem(step, jnp.int32(tiles.steps))

        def write(accs, m, column):
            # Columns past the result's width must not be written: the copy engine drops an axis of
            # one tile, and would write to its only tile.
            whole_smem, part_smem = results

            def result(top, n):
                own = (slice(top, top + STEP), slice(n, n + STEP))
                values = [acc[own] for acc in accs]
                return (activation(*values) if activation else values[0]).astype(dtype)

            for top in heights:
                first = jnp.clip(begin_ref[m] - top, 0, STEP)
                rows = jnp.clip(end_ref[m] - top, 0, STEP) - first
                row = start_ref[m] + top

                @pl.when(rows == STEP)
                def _(top=top, row=row):
                    for n in range(0, piece_n, STEP):

                        @pl.when(column + n < out_gmem.shape[1])
                        def _(n=n):
                            # Two buffers in turn, unless some writes are left out.
                            turn = 0 if narrow else (top * piece_n // STEP + n) // STEP % 2
                            smem = whole_smem.at[warpgroup, turn]
                            pending = 0 if narrow or (top, n) == (0, 0) else 1
                            plgpu.wait_smem_to_gmem(pending, wait_read_only=True)
                            smem[...] = result(top, n)
                            plgpu.commit_smem()
                            at = aligned(row, STEP, ALIGN), aligned(column + n, STEP)
                            plgpu.copy_smem_to_gmem(smem, out_gmem.at[at])

                @pl.when((rows > 0) & (rows < STEP))
                def _(top=top, row=row, first=first, rows=rows):
                    smem = part_smem.at[warpgroup, 0]
                    for n in range(0, piece_n, STEP):

                        @pl.when(column + n < out_gmem.shape[1])
                        def _(n=n):
                            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                            smem[...] = result(top, n)
                            plgpu.commit_smem()
                            _write_rows(smem, out_gmem, row, first, rows, column + n)
                            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        @pl.when(warpgroup == WARPGROUPS)
        def _fetch():
            plgpu.set_max_registers(40, action="decrease")

            def tile(i, step):
                m, column, stages = tile_at(i)
                group, start, end = group_ref[m], start_ref[m], end_ref[m]

                def stage(k, step):
                    slot = slot_of(step)
                    plgpu.barrier_wait(empty.at[slot])
                    deep = aligned(k * STEP, STEP)
                    for part in range(WARPGROUPS):
                        for piece, offset in enumerate(pieces):
                            own = aligned(column + (part * piece_n + offset), piece_n, STEP)
                            at = (group, own, deep) if transpose_weights else (group, deep, own)
                            plgpu.copy_gmem_to_smem(
                                w_gmem.at[at], w_smem.at[slot, part, piece], full.at[slot]
                            )
                    for height in heights:
                        # Past the last row the copy engine fills with zeros and reads nothing.
                        row = jnp.where(height < end, start + height, x_gmem.shape[0])
                        plgpu.copy_gmem_to_smem(
                            x_gmem.at[aligned(row, STEP, ALIGN), deep],
                            x_smem.at[slot, pl.ds(height, STEP)],
                            full.at[slot],
                        )
                    return step + 1

                return lax.fori_loop(0, stages, stage, step)

            lax.fori_loop(0, count, tile, jnp.int32(0))
            for slot in range(tiles.steps):
                plgpu.barrier_wait(empty.at[slot])

        @pl.when(warpgroup < WARPGROUPS)
        def _multiply():
            plgpu.set_max_registers(232, action="increase")
            for slot in range(tiles.steps):
                plgpu.barrier_arrive(empty.at[slot])

            def tile(i, step):
                m, column, stages = tile_at(i)

                def product(*acc_refs):
                    def stage(k, step):
                        slot = slot_of(step)
                        plgpu.barrier_wait(full.at[slot])
                        for piece, acc_ref in enumerate(acc_refs):
                            w = w_smem.at[slot, warpgroup, piece]
                            w = w.transpose((1, 0)) if transpose_weights else w
                            plgpu.wgmma(acc_ref, x_smem.at[slot], w)
                        # The stage before is done with; this one goes on.
                        plgpu.wgmma_wait(len(pieces))

                        @pl.when(k > 0)
                        def _():
                            plgpu.barrier_arrive(empty.at[slot_of(step + (tiles.steps - 1))])

                        return step + 1

                    lax.fori_loop(0, stages, stage, step)
                    return [acc_ref[...] for acc_ref in acc_refs]

                accumulators = [plgpu.WGMMAAccumulatorRef((tiles.block_m, piece_n)) for _ in pieces]
                accs = pl.run_scoped(product, *accumulators)

                @pl.when(stages > 0)
                def _():
                    plgpu.barrier_arrive(empty.at[slot_of(step + stages - 1)])

                write(accs, m, column + warpgroup * piece_n)
                return step + stages

            lax.fori_loop(0, count, tile, jnp.int32(0))
            plgpu.wait_smem_to_gmem(0)


def aligned(start, size, multiple=None):
    """The slice of `size` from `start`, a multiple of `multiple` or else of `size`."""
    return pl.ds(pl.multiple_of(start, multiple or size), size)


def _write_rows(smem, out_gmem, row, first, rows, column):
    """Write `rows` < 64 rows from `first`: a copy has a fixed size, so one for each set bit."""
    for power in reversed(range(int(math.log2(STEP)))):
        size = 1 << power

        @pl.when((rows & size) != 0)
        def _(first=first, size=size):
            at = pl.ds(row + first, size), pl.ds(column, STEP)
            plgpu.copy_smem_to_gmem(smem.at[pl.ds(first, size)], out_gmem.at[at])

        first = first + (rows & size)
