"""The order of a wave by one GPU kernel.

Axes: T tokens of this rank, K choices per token, P ranks, N slots per rank, S = P·N slots, C rows
at most that one rank sends another, M = P·C rows of a buffer. A choice is one (token, k) pair; TK =
T·K. What XLA makes of this arithmetic are a dozen launches, which a decoding step waits for.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Int

from jax_eplb.kernels.threads import load, power_of_two, segment, wait
from jax_eplb.kernels.varying import equally_varying
from jax_eplb.moe.wave_order import Wave
from jax_eplb.routing import SlotOrder

_ROWS = 512  # of a program


def wave_order_by_kernel(
    order: SlotOrder,
    rank: Int[Array, ""],
    first: Int[Array, ""],
    *,
    capacity: int,
    interpret: bool = False,
) -> Wave:
    """As `wave_order_by_xla`, for S up to `LONGEST` and buffers that are not packed."""
    num_ranks, num_slots = order.slot_tokens.of_all.shape
    numbers_of = (rank.reshape(1), first.reshape(1))
    inputs = (order.choice, order.place.reshape(-1), *order.slot_tokens, *numbers_of)
    inputs = equally_varying(inputs)
    varying = {"manual_axis_type": jax.typeof(inputs[0]).manual_axis_type}

    def numbers(size):
        return jax.ShapeDtypeStruct((size,), jnp.int32, **varying)

    rows = num_ranks * capacity
    num_choices = order.choice.size
    most = max(rows, num_choices)
    block = min(_ROWS, power_of_two(most))
    outputs = [rows, num_choices, num_slots // num_ranks, rows, rows] + [num_slots] * 4
    choice, place, group_sizes, arrival, departure, *_ = pl.pallas_call(
        functools.partial(_kernel, capacity=capacity, block=block, interpret=interpret),
        out_shape=[numbers(size) for size in outputs],
        grid=(pl.cdiv(most, block),),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="wave_order",
    )(*inputs)
    place = place.reshape(order.place.shape)
    return Wave(choice, place, group_sizes, arrival, departure, first)


def _kernel(
    choice_ref,
    place_ref,
    own_ref,
    of_all_ref,
    rank_ref,
    first_ref,
    chosen_ref,
    places_ref,
    sizes_ref,
    arrival_ref,
    departure_ref,
    # What threads tell each other; all programs store the same. Sums of rows: sent, by slot;
    # received, by rank and slot of it; received in this wave, by slot and rank.
    sent_end_ref,
    received_end_ref,
    placed_end_ref,
    skipped_ref,  # by slot and rank: rows of the rank's buffer before the slot's
    *,
    capacity: int,
    block: int,
    interpret: bool,
):
    num_ranks, num_slots = of_all_ref.shape
    per_rank, num_choices = num_slots // num_ranks, choice_ref.shape[0]
    rank, first = rank_ref[0], first_ref[0]
    each = jnp.arange(power_of_two(num_slots), dtype=jnp.int32)
    exists = each < num_slots

    sender, slot = lax.div(each, jnp.int32(per_rank)), lax.rem(each, jnp.int32(per_rank))
    at = jnp.where(exists, sender, 0), jnp.where(exists, rank * per_rank + slot, 0)
    received = plgpu.load(of_all_ref.at[at], mask=exists, other=0)
    plgpu.store(sent_end_ref.at[each], jnp.cumsum(load(own_ref, each, exists)), mask=exists)
    plgpu.store(received_end_ref.at[each], jnp.cumsum(received), mask=exists)
    wait(interpret)

    slot, sender = lax.div(each, jnp.int32(num_ranks)), lax.rem(each, jnp.int32(num_ranks))
    run = sender * per_rank + slot
    before = _end(received_end_ref, sender * per_rank, exists) + first
    skipped = jnp.clip(_end(received_end_ref, run, exists) - before, 0, capacity)
    stop = jnp.clip(load(received_end_ref, run, exists) - before, 0, capacity)
    placed = jnp.where(exists, stop - skipped, 0)
    plgpu.store(placed_end_ref.at[each], jnp.cumsum(placed), mask=exists)
    plgpu.store(skipped_ref.at[each], skipped, mask=exists)
    wait(interpret)

    is_slot = each < per_rank
    slot_start = _end(placed_end_ref, each * num_ranks, is_slot)
    slot_end = load(placed_end_ref, each * num_ranks + (num_ranks - 1), is_slot)
    plgpu.store(sizes_ref.at[each], slot_end - slot_start, mask=is_slot)

    row = pl.program_id(0) * block + jnp.arange(block, dtype=jnp.int32)
    is_row, last = row < num_ranks * capacity, num_ranks * capacity - 1
    peer, turn = lax.div(row, jnp.int32(capacity)), lax.rem(row, jnp.int32(capacity))

    # What is sent: the runs of the slots of each rank, this wave's part of them.
    start, stop = _run_of(sent_end_ref, peer, is_row, per_rank)
    source = start + first + turn
    goes = is_row & (source < stop)
    chosen = jnp.where(goes, load(choice_ref, source, goes), num_choices)
    plgpu.store(chosen_ref.at[row], chosen, mask=is_row)

    is_choice = row < num_choices
    place = load(place_ref, row, is_choice)
    slot = segment(sent_end_ref, place, is_choice, 0, num_slots)
    served = is_choice & (slot < num_slots)
    to = lax.div(slot, jnp.int32(per_rank))
    start, _ = _run_of(sent_end_ref, to, served, per_rank)
    of_run = place - start - first
    goes = served & (of_run >= 0) & (of_run < capacity)
    at = jnp.where(goes, to * capacity + of_run, num_ranks * capacity)
    plgpu.store(places_ref.at[row], at, mask=is_choice)

    # What is received: by rank and then by slot; computed by slot and then by rank.
    run = segment(placed_end_ref, row, is_row, 0, num_slots)
    filled = is_row & (run < num_slots)
    sender = lax.rem(run, jnp.int32(num_ranks))
    start = _end(placed_end_ref, run, filled)
    arrival = sender * capacity + load(skipped_ref, run, filled) + row - start
    plgpu.store(arrival_ref.at[row], jnp.where(filled, arrival, last), mask=is_row)

    before = _end(received_end_ref, peer * per_rank, is_row) + first
    found = segment(received_end_ref, before + turn, is_row, peer * per_rank, per_rank)
    slot = found - peer * per_rank
    filled = is_row & (slot < per_rank)
    run = slot * num_ranks + peer
    start = _end(placed_end_ref, run, filled) - load(skipped_ref, run, filled)
    plgpu.store(departure_ref.at[row], jnp.where(filled, start + turn, last), mask=is_row)


def _run_of(sent_end_ref, peer, mask, per_rank: int):
    """Where the run of rows for a rank begins and ends in the order by slot."""
    start = _end(sent_end_ref, peer * per_rank, mask)
    return start, load(sent_end_ref, peer * per_rank + (per_rank - 1), mask)


def _end(ends_ref, index, mask):
    """Where the segment before this one ends."""
    return load(ends_ref, index - 1, mask & (index > 0))
