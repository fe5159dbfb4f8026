"""The gradient of grouped weights on Hopper GPUs: each group's rowsᵀ times its gradients.

Axes: M rows sorted by group, G groups, D columns of the rows, N columns of the gradients.

Built like the product (`mosaic_kernel`), with the rows of a group as the axis that is summed.
Copies begin at a row that is a multiple of 8, so the first and the last may hold rows of other
groups: there the gradients are set to zero. A group without rows gets a gradient of zero.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from jax_eplb.kernels.groups import group_starts
from jax_eplb.kernels.mosaic_kernel import SWIZZLE, WARPGROUPS, aligned
from jax_eplb.kernels.tile_table import ALIGN, STEP
from jax_eplb.kernels.varying import varying_like

_BLOCK_D, _PART_N, _STAGES = 128, 128, 4


def mosaic_weight_gradient(
    rows: Float[Array, "M D"],
    grad: Float[Array, "M N"],
    group_sizes: Int[Array, "G"],
    *,
    num_blocks: int = 132,
) -> Float[Array, "G D N"]:
    """For each group, the sum over its rows of row times gradient; D and N multiples of 64."""
    padding = -len(rows) % ALIGN
    rows, grad = (jnp.pad(x, ((0, padding), (0, 0))) if padding else x for x in (rows, grad))
    kernel = plgpu.kernel(
        functools.partial(_body, num_blocks=num_blocks),
        out_type=jax.ShapeDtypeStruct((len(group_sizes), rows.shape[1], grad.shape[1]), rows.dtype),
        grid=(num_blocks,),
        grid_names=("block",),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )
    out = kernel(group_starts(group_sizes), rows, grad)
    return varying_like(out, rows, grad, group_sizes)


def _body(starts_ref, x_gmem, y_gmem, out_gmem, *, num_blocks: int):
    dtype = x_gmem.dtype
    num_groups, depth, width = out_gmem.shape
    num_d, num_n = pl.cdiv(depth, _BLOCK_D), pl.cdiv(width, _PART_N * WARPGROUPS)
    narrow = width % (_PART_N * WARPGROUPS) != 0  # the last tile reaches past the result
    total = num_groups * num_d * num_n
    count = (total - 1 - lax.axis_index("block") + num_blocks) // num_blocks

    def tile_at(i):
        """This block's i-th tile: group, first row and column, first row of the first copy."""
        linear = lax.axis_index("block") + i * num_blocks
        group, rest = lax.div(linear, num_d * num_n), lax.rem(linear, num_d * num_n)
        begin, end = starts_ref[group], starts_ref[group + 1]
        first = lax.div(begin, ALIGN) * ALIGN
        stages = jnp.where(begin < end, lax.div(end - first + (STEP - 1), STEP), 0)
        row, column = lax.rem(rest, num_d) * _BLOCK_D, lax.div(rest, num_d) * (2 * _PART_N)
        return group, row, column, first, begin, end, stages

    @functools.partial(
        pl.run_scoped,
        x_smem=plgpu.SMEM((_STAGES, STEP, _BLOCK_D), dtype, transforms=SWIZZLE),
        y_smem=plgpu.SMEM((_STAGES, WARPGROUPS, STEP, _PART_N), dtype, transforms=SWIZZLE),
        out_smem=plgpu.SMEM((WARPGROUPS, 2, STEP, STEP), dtype, transforms=SWIZZLE),
        full=plgpu.Barrier(num_arrivals=1 + WARPGROUPS, num_barriers=_STAGES),
        empty=plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=_STAGES),
        collective_axes="warpgroup",
    )
    def _scoped(x_smem, y_smem, out_smem, full, empty):
        warpgroup = lax.axis_index("warpgroup")

        def slot_of(step):
            return lax.rem(step, jnp.int32(_STAGES))

        @pl.when(warpgroup == WARPGROUPS)
        def _fetch():
            plgpu.set_max_registers(40, action="decrease")

            def tile(i, step):
                _, row, column, first, _, _, stages = tile_at(i)

                def stage(k, step):
                    slot = slot_of(step)
                    plgpu.barrier_wait(empty.at[slot])
                    own = aligned(first + k * STEP, STEP, ALIGN)
                    at = own, aligned(row, _BLOCK_D)
                    plgpu.copy_gmem_to_smem(x_gmem.at[at], x_smem.at[slot], full.at[slot])
                    for part in range(WARPGROUPS):
                        at = own, aligned(column + part * _PART_N, _PART_N)
                        plgpu.copy_gmem_to_smem(y_gmem.at[at], y_smem.at[slot, part], full.at[slot])
                    return step + 1

                return lax.fori_loop(0, stages, stage, step)

            lax.fori_loop(0, count, tile, jnp.int32(0))
            for slot in range(_STAGES):
                plgpu.barrier_wait(empty.at[slot])

        @pl.when(warpgroup < WARPGROUPS)
        def _multiply():
            plgpu.set_max_registers(232, action="increase")
            for slot in range(_STAGES):
                plgpu.barrier_arrive(empty.at[slot])

            def tile(i, step):
                group, row, column, first, begin, end, stages = tile_at(i)

                def product(acc_ref):
                    def stage(k, step):
                        slot = slot_of(step)
                        plgpu.barrier_wait(full.at[slot])
                        y = y_smem.at[slot, warpgroup]

                        @pl.when((k == 0) | (k == stages - 1))
                        def _():
                            index = plgpu.layout_cast(
                                lax.broadcasted_iota(jnp.int32, (STEP, _PART_N), 0),
                                plgpu.Layout.WGMMA,
                            )
                            index = index + (first + k * STEP)
                            y[...] = jnp.where((index >= begin) & (index < end), y[...], 0)
                            plgpu.commit_smem()

                        plgpu.wgmma(acc_ref, x_smem.at[slot].transpose((1, 0)), y)
                        plgpu.wgmma_wait(1)

                        @pl.when(k > 0)
                        def _():
                            plgpu.barrier_arrive(empty.at[slot_of(step + (_STAGES - 1))])

                        return step + 1

                    lax.fori_loop(0, stages, stage, step)
                    return acc_ref[...]

                acc = pl.run_scoped(product, plgpu.WGMMAAccumulatorRef((_BLOCK_D, _PART_N)))

                @pl.when(stages > 0)
                def _():
                    plgpu.barrier_arrive(empty.at[slot_of(step + stages - 1)])

                column = column + warpgroup * _PART_N
                for i, top in enumerate(range(0, _BLOCK_D, STEP)):
                    for j, n in enumerate(range(0, _PART_N, STEP)):

                        @pl.when((row + top < depth) & (column + n < width))
                        def _(i=i, j=j, top=top, n=n):
                            # Two buffers in turn, unless some writes are left out.
                            smem = out_smem.at[warpgroup, 0 if narrow else j % 2]
                            pending = 0 if narrow or (i, j) == (0, 0) else 1
                            plgpu.wait_smem_to_gmem(pending, wait_read_only=True)
                            smem[...] = acc[top : top + STEP, n : n + STEP].astype(dtype)
                            plgpu.commit_smem()
                            at = group, aligned(row + top, STEP), aligned(column + n, STEP)
                            plgpu.copy_smem_to_gmem(smem, out_gmem.at[at])

                return step + stages

            lax.fori_loop(0, count, tile, jnp.int32(0))
            plgpu.wait_smem_to_gmem(0)
