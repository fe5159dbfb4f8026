"""The order by slot from that by expert in one GPU kernel: a decoding step waits for launches.

Axes: T tokens, K choices per token, S slots, C choices of one program. A choice is one (token, k)
pair, numbered t·K + k; TK = T·K.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Int

from jax_eplb.kernels.threads import load, power_of_two, segment, wait
from jax_eplb.kernels.varying import equally_varying

_CHOICES = 1024  # of a program


def order_by_kernel(
    place: Int[Array, "T K"],  # in the order by expert; past the last for padding
    slot_tokens: Int[Array, "S"],
    slots_by_expert: Int[Array, "S"],
    *,
    interpret: bool = False,
) -> tuple[Int[Array, "TK"], Int[Array, "T K"]]:
    """As `order_by_xla`, for S up to `LONGEST`."""
    inputs = equally_varying((place.reshape(-1), slot_tokens, slots_by_expert))
    varying = {"manual_axis_type": jax.typeof(inputs[0]).manual_axis_type}
    choices = jax.ShapeDtypeStruct((place.size,), jnp.int32, **varying)
    slots = jax.ShapeDtypeStruct(slot_tokens.shape, jnp.int32, **varying)
    block = min(_CHOICES, power_of_two(place.size))
    choice, moved, *_ = pl.pallas_call(
        functools.partial(_kernel, block=block, interpret=interpret),
        out_shape=(choices, choices, slots, slots, slots),
        grid=(pl.cdiv(place.size, block),),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="order_by_slot",
    )(*inputs)
    return choice, moved.reshape(place.shape)


def _kernel(
    place_ref,
    sizes_ref,
    slots_ref,
    choice_ref,
    moved_ref,
    # What threads tell each other; all programs store the same.
    slot_start_ref,
    run_end_ref,
    shift_ref,
    *,
    block: int,
    interpret: bool,
):
    num_choices, num_slots = place_ref.shape[0], sizes_ref.shape[0]
    each = jnp.arange(power_of_two(num_slots), dtype=jnp.int32)
    exists = each < num_slots
    sizes = load(sizes_ref, each, exists)
    slots = load(slots_ref, each, exists)
    run_sizes = load(sizes_ref, slots, exists)  # by expert
    run_end = jnp.cumsum(run_sizes)
    plgpu.store(slot_start_ref.at[each], jnp.cumsum(sizes) - sizes, mask=exists)
    plgpu.store(run_end_ref.at[each], run_end, mask=exists)
    wait(interpret)
    shift = load(slot_start_ref, slots, exists) - (run_end - run_sizes)
    plgpu.store(shift_ref.at[each], shift, mask=exists)
    wait(interpret)

    choice = pl.program_id(0) * block + jnp.arange(block, dtype=jnp.int32)
    real, total = choice < num_choices, sizes.sum(dtype=jnp.int32)
    place = plgpu.load(place_ref.at[choice], mask=real, other=num_choices)
    served = real & (place < total)
    run = segment(run_end_ref, place, served, 0, num_slots)
    moved = jnp.where(served, place + load(shift_ref, run, served), num_choices)
    plgpu.store(moved_ref.at[choice], moved, mask=real)
    plgpu.store(choice_ref.at[moved], choice, mask=served)
    nobody = jnp.full_like(choice, num_choices)
    plgpu.store(choice_ref.at[choice], nobody, mask=real & (choice >= total))
