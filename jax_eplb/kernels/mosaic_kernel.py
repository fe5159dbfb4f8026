"""The grouped product on Hopper GPUs: one persistent, warp-specialised Pallas kernel.

Axes: M rows sorted by group, L layers, G groups, D in (contracted), N columns of the weights, F
columns of the result; F is N, or N / 2 where a gated activation joins gate and up.

Each streaming multiprocessor runs one block of three warpgroups. One feeds tiles of rows and
weights through shared memory by the copy engine, as many stages ahead as fit; the other two
multiply, each half of the tile, and write the result while the next tile's operands arrive
already. Tiles begin where their group begins, so that none holds rows of two groups: a copy may
read rows of the next group, the product computes them, and the write leaves them out.

Large products are bounded by what the cache can send to the multiprocessors, and by power. So two
blocks may work as a pair, in which each reads half of what both need, for both.
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

from jax_eplb.kernels.mosaic_tiles import Tiles, Walk
from jax_eplb.kernels.tile_table import ALIGN, STEP
from jax_eplb.kernels.varying import varying_like

WARPGROUPS = 2  # that compute
SWIZZLE = (plgpu.TilingTransform((ALIGN, STEP)), plgpu.SwizzleTransform(128))


def mosaic_product(
    rows: Float[Array, "M D"],
    weights: Float[Array, "L G D N"],
    group_sizes: Int[Array, "G"],
    layer: Int[Array, ""],
    tiles: Tiles,
    *,
    transpose_weights: bool = False,
    activation: Callable[..., jax.Array] | None = None,
    gated: bool = False,
    num_blocks: int = 132,
) -> Float[Array, "M F"]:
    """Each row times its group's weights in the layer, [L, G, N, D] if transposed."""
    num_rows = rows.shape[0]
    padding = -num_rows % ALIGN
    rows = jnp.pad(rows, ((0, padding), (0, 0))) if padding else rows
    num_columns = weights.shape[2 if transpose_weights else 3]
    shape = (rows.shape[0], num_columns // 2 if gated else num_columns)
    units_at_once = num_blocks // 2 if tiles.pair else num_blocks
    body = functools.partial(
        _body,
        tiles=tiles,
        transpose_weights=transpose_weights,
        activation=activation,
        gated=gated,
        units_at_once=units_at_once,
    )
    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(shape, rows.dtype),
        grid=(units_at_once,),
        grid_names=("unit",),
        cluster=(2,) if tiles.pair else (),
        cluster_names=("half",) if tiles.pair else (),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup, approx_math=True
        ),
    )
    # Layers and groups as one axis: the copy engine takes five, and tiles of a matrix have four.
    flat = weights.reshape(-1, *weights.shape[2:])
    out = kernel(group_sizes.astype(jnp.int32), layer.reshape(1), rows, flat)
    out = varying_like(out, rows, weights, group_sizes, layer)
    return out[:num_rows] if padding else out


def _body(
    sizes_ref,
    layer_ref,
    x_gmem,
    w_gmem,
    out_gmem,
    *,
    tiles: Tiles,
    transpose_weights: bool,
    activation,
    gated: bool,
    units_at_once: int,
):
    dtype, num_groups = x_gmem.dtype, sizes_ref.shape[0]
    num_rows, width = out_gmem.shape
    depth_steps = x_gmem.shape[1] // STEP
    # The warpgroups share a tile's rows, or its columns where there are too few rows for that.
    by_rows = tiles.block_m >= WARPGROUPS * STEP
    own_rows = tiles.block_m // WARPGROUPS if by_rows else tiles.block_m
    parts = 1 if by_rows else WARPGROUPS
    # A part of the columns is one piece of the weights, or one of gate and one of up.
    pieces = (0, width) if gated else (0,)
    piece_n = tiles.block_n // parts // len(pieces)
    block_f = piece_n * parts
    num_columns = pl.cdiv(width, block_f)
    # Whether a tile may reach past the result.
    narrow = width % block_f != 0 or (tiles.pair and num_columns % 2 != 0)
    piece_shape = (piece_n, STEP) if transpose_weights else (STEP, piece_n)
    heights = range(0, tiles.block_m, STEP)  # where a tile's copies of 64 rows begin
    walk = Walk(tiles, num_rows, num_groups, num_columns)

    def for_each_tile(do):
        """`step = do(tile, step)` for the tiles of this block, one after the other."""
        half = lax.axis_index("half") if tiles.pair else jnp.int32(0)

        def body(state):
            place, step = state
            step = do(walk.tile(place, half), step)
            return walk.go_on(sizes_ref, place, jnp.int32(units_at_once)), step

        first = walk.begin(sizes_ref, lax.axis_index("unit").astype(jnp.int32))
        lax.while_loop(lambda state: walk.goes_on(state[0]), body, (first, jnp.int32(0)))

    def stages_of(tile):
        return jnp.where(tile.group < num_groups, depth_steps, 0)

    # A stage that a pair reads together is empty when both blocks are done with it.
    cluster_barrier = functools.partial(plgpu.ClusterBarrier, collective_axes=("half",))
    empty_barrier = cluster_barrier if tiles.pair else plgpu.Barrier

    @functools.partial(
        pl.run_scoped,
        x_smem=plgpu.SMEM((tiles.steps, tiles.block_m, STEP), dtype, transforms=SWIZZLE),
        w_smem=plgpu.SMEM(
            (tiles.steps, parts, len(pieces), *piece_shape), dtype, transforms=SWIZZLE
        ),
        # Whole tiles leave swizzled, without bank conflicts; parts of tiles leave row by row.
        results=plgpu.RefUnion(
            plgpu.SMEM((WARPGROUPS, 2, STEP, STEP), dtype, transforms=SWIZZLE),
            plgpu.SMEM((WARPGROUPS, 2, STEP, STEP), dtype),
        ),
        full=plgpu.Barrier(
            num_arrivals=len(heights) + parts * len(pieces), num_barriers=tiles.steps
        ),
        empty=empty_barrier(num_arrivals=WARPGROUPS, num_barriers=tiles.steps),
        collective_axes="warpgroup",
    )
    def _scoped(x_smem, w_smem, results, full, empty):
        warpgroup = lax.axis_index("warpgroup")

        def slot_of(step):
            return lax.rem(step, jnp.int32(tiles.steps))

        @pl.when(warpgroup == WARPGROUPS)
        def _fetch():
            plgpu.set_max_registers(40, action="decrease")
            first_group = layer_ref[0] * num_groups

            def fetch(tile, step):
                column = tile.column * block_f

                def copy_weights(slot, deep, **how):
                    for part in range(parts):
                        for piece, offset in enumerate(pieces):
                            own = aligned(column + (part * piece_n + offset), piece_n, STEP)
                            at = (own, deep) if transpose_weights else (deep, own)
                            source = w_gmem.at[first_group + tile.group, *at]
                            smem = w_smem.at[slot, part, piece]
                            plgpu.copy_gmem_to_smem(source, smem, full.at[slot], **how)

                def copy_rows(slot, deep, **how):
                    for height in heights:
                        # Past the last row the copy engine fills with zeros and reads nothing.
                        row = jnp.where(height < tile.end, tile.start + height, num_rows)
                        source = x_gmem.at[aligned(row, STEP, ALIGN), deep]
                        smem = x_smem.at[slot, pl.ds(height, STEP)]
                        plgpu.copy_gmem_to_smem(source, smem, full.at[slot], **how)

                def stage(k, step):
                    slot, deep = slot_of(step), aligned(k * STEP, STEP)
                    plgpu.barrier_wait(empty.at[slot])
                    if not tiles.pair:
                        copy_weights(slot, deep)
                        copy_rows(slot, deep)
                        return step + 1

                    @pl.when(tile.shares_weights)
                    def _():
                        copy_weights(slot, deep, collective_axes="half")
                        copy_rows(slot, deep)

                    @pl.when(jnp.logical_not(tile.shares_weights))
                    def _():
                        copy_weights(slot, deep)
                        copy_rows(slot, deep, collective_axes="half")

                    return step + 1

                return lax.fori_loop(0, stages_of(tile), stage, step)

            for_each_tile(fetch)
            for slot in range(tiles.steps):
                plgpu.barrier_wait(empty.at[slot])

        @pl.when(warpgroup < WARPGROUPS)
        def _multiply():
            plgpu.set_max_registers(232, action="increase")
            for slot in range(tiles.steps):
                plgpu.barrier_arrive(empty.at[slot])
            part = 0 if by_rows else warpgroup
            top = warpgroup * own_rows if by_rows else 0

            def write(tile, accs):
                # Columns past the result's width must not be written: the copy engine drops an
                # axis of one tile, and would write to its only tile.
                whole_smem, part_smem = (smem.at[warpgroup] for smem in results)
                column = tile.column * block_f + part * piece_n

                def result(row, n):
                    own = (slice(row, row + STEP), slice(n, n + STEP))
                    values = [acc[own] for acc in accs]
                    return (activation(*values) if activation else values[0]).astype(dtype)

                for row in range(0, own_rows, STEP):
                    start = tile.start + (top + row)
                    first = jnp.clip(tile.begin - (top + row), 0, STEP)
                    rows = jnp.clip(tile.end - (top + row), 0, STEP) - first
                    for n in range(0, piece_n, STEP):
                        exists = column + n < width

                        @pl.when((rows == STEP) & exists)
                        def _(row=row, n=n, start=start):
                            # Two buffers in turn, unless some writes are left out.
                            turn = 0 if narrow else (row * piece_n // STEP + n) // STEP % 2
                            pending = 0 if narrow or (row, n) == (0, 0) else 1
                            plgpu.wait_smem_to_gmem(pending, wait_read_only=True)
                            whole_smem[turn] = result(row, n)
                            plgpu.commit_smem()
                            at = aligned(start, STEP, ALIGN), aligned(column + n, STEP)
                            plgpu.copy_smem_to_gmem(whole_smem.at[turn], out_gmem.at[at])

                        @pl.when((rows > 0) & (rows < STEP) & exists)
                        def _(row=row, n=n, start=start, first=first, rows=rows):
                            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                            part_smem[0] = result(row, n)
                            plgpu.commit_smem()
                            _write_rows(part_smem.at[0], out_gmem, start, first, rows, column + n)
                            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

            def multiply(tile, step):
                stages = stages_of(tile)

                def product(*acc_refs):
                    def stage(k, step):
                        slot = slot_of(step)
                        plgpu.barrier_wait(full.at[slot])
                        x = x_smem.at[slot, pl.ds(top, own_rows)]
                        for piece, acc_ref in enumerate(acc_refs):
                            w = w_smem.at[slot, part, piece]
                            w = w.transpose((1, 0)) if transpose_weights else w
                            plgpu.wgmma(acc_ref, x, w)
                        # The stage before is done with; this one goes on.
                        plgpu.wgmma_wait(len(pieces))

                        @pl.when(k > 0)
                        def _():
                            plgpu.barrier_arrive(empty.at[slot_of(step + (tiles.steps - 1))])

                        return step + 1

                    lax.fori_loop(0, stages, stage, step)
                    return [acc_ref[...] for acc_ref in acc_refs]

                accumulators = [plgpu.WGMMAAccumulatorRef((own_rows, piece_n)) for _ in pieces]
                accs = pl.run_scoped(product, *accumulators)

                @pl.when(stages > 0)
                def _():
                    plgpu.barrier_arrive(empty.at[slot_of(step + stages - 1)])

                write(tile, accs)
                return step + stages

            for_each_tile(multiply)
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
