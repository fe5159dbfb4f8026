"""The exchange: rows to the ranks that hold their slots, and results back, in bounded waves.

Axes: T tokens of this rank, K choices per token, P ranks, N slots per rank, C rows that one rank
sends another in one wave, D embedding width. A choice is one (token, k) pair, numbered t·K + k.

In a wave each rank sends each rank at most C rows (a padded `all_to_all`), computes what it
received, and sends the results back the way they came. Waves go on until the fullest pair of
ranks is done, so no token is ever dropped and the buffers stay P·C rows however skewed the load.
The gradient walks the same waves again, so that training is bounded alike.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jax_eplb.kernels.varying import zeros_varying_like
from jax_eplb.routing import occurrence

# (rows [M, D], parameters, group_sizes [N]) -> [M, D], rows sorted by slot of this rank.
Compute = Callable[[Float[Array, "M D"], Any, Int[Array, "N"]], Float[Array, "M D"]]


class ExchangeGrid(NamedTuple):
    """The static sizes of an exchange."""

    axis_name: str
    num_ranks: int
    slots_per_rank: int
    capacity: int  # C


class _Wave(NamedTuple):
    """What this rank sends in one wave, by row of the send buffer."""

    choice: Int[Array, "P*C"]  # T·K where the row is empty
    slot: Int[Array, "P*C"]  # on the receiving rank; N where the row is empty


def exchange(
    compute: Compute,
    grid: ExchangeGrid,
    rows: Float[Array, "T D"],
    slots: Int[Array, "T K"],
    params: Any,
) -> tuple[Float[Array, "T K D"], Int[Array, ""]]:
    """Run each choice's row through `compute` on the rank that holds its slot.

    Inside `shard_map` over `grid.axis_name`. Slots of S or more (padding) are not sent; their
    results are zero. Returns the results by choice, and the number of rows this rank computed.
    """
    if slots.size == 0:
        nothing = zeros_varying_like((*slots.shape, rows.shape[1]), rows.dtype, rows, slots)
        return nothing, zeros_varying_like((), jnp.int32, rows, slots)
    return _in_waves(compute, grid, rows, slots, params)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _in_waves(compute: Compute, grid: ExchangeGrid, rows, slots, params):
    position = _positions(slots, grid)

    def body(wave, carry):
        results, received = carry
        sent = _wave(slots, position, wave, grid)
        sent_rows = _take_rows(rows, sent, slots.shape[1])
        back, computed = _run_wave(compute, grid, sent, sent_rows, params)
        return results.at[sent.choice].set(back, mode="drop"), received + computed

    carry = (
        zeros_varying_like((slots.size, rows.shape[1]), rows.dtype, rows, slots),
        zeros_varying_like((), jnp.int32, rows, slots),
    )
    waves = _num_waves(slots, position, grid)
    results, received = jax.lax.fori_loop(0, waves, body, carry)
    return results.reshape(*slots.shape, rows.shape[1]), received


def _in_waves_forward(compute, grid, rows, slots, params):
    return _in_waves(compute, grid, rows, slots, params), (rows, slots, params)


def _in_waves_backward(compute, grid, residuals, grads):
    rows, slots, params = residuals
    grad_results = grads[0].reshape(slots.size, rows.shape[1])
    position = _positions(slots, grid)

    def body(wave, carry):
        grad_choices, grad_params = carry
        sent = _wave(slots, position, wave, grid)
        sent_rows = _take_rows(rows, sent, slots.shape[1])
        _, transpose = jax.vjp(
            lambda rows, params: _run_wave(compute, grid, sent, rows, params)[0], sent_rows, params
        )
        grad_back = grad_results.at[sent.choice].get(mode="fill", fill_value=0)
        grad_sent, grad_wave = transpose(grad_back)
        # Each choice is sent once, so its gradient is set, not added: no scattered additions.
        grad_choices = grad_choices.at[sent.choice].set(grad_sent, mode="drop")
        return grad_choices, jax.tree.map(jnp.add, grad_params, grad_wave)

    carry = (
        zeros_varying_like(grad_results.shape, rows.dtype, rows, slots),
        jax.tree.map(lambda x: zeros_varying_like(x.shape, x.dtype, x), params),
    )
    waves = _num_waves(slots, position, grid)
    grad_choices, grad_params = jax.lax.fori_loop(0, waves, body, carry)
    grad_rows = grad_choices.reshape(*slots.shape, -1).sum(axis=1)
    return grad_rows, None, grad_params


_in_waves.defvjp(_in_waves_forward, _in_waves_backward)


def _positions(slots: Int[Array, "T K"], grid: ExchangeGrid) -> Int[Array, "T*K"]:
    """Each choice's turn among those that this rank sends to the same rank."""
    peer = jnp.minimum(slots.reshape(-1) // grid.slots_per_rank, grid.num_ranks)
    return occurrence(peer, grid.num_ranks + 1)


def _num_waves(slots, position, grid: ExchangeGrid) -> Int[Array, ""]:
    """Waves until the fullest pair of ranks is done; the same on every rank."""
    sent = slots.reshape(-1) < grid.num_ranks * grid.slots_per_rank
    fullest = jnp.where(sent, position + 1, 0).max()
    return jax.lax.pmax(-(-fullest // grid.capacity), grid.axis_name)


def _wave(slots, position, wave, grid: ExchangeGrid) -> _Wave:
    flat = slots.reshape(-1)
    peer = flat // grid.slots_per_rank
    turn = position - wave * grid.capacity
    in_wave = (peer < grid.num_ranks) & (turn >= 0) & (turn < grid.capacity)
    size = grid.num_ranks * grid.capacity
    row = jnp.where(in_wave, peer * grid.capacity + turn, size)
    empty = jnp.full(size, flat.size, jnp.int32)
    choice = empty.at[row].set(jnp.arange(flat.size, dtype=jnp.int32), mode="drop")
    slot = flat.at[choice].get(mode="fill", fill_value=-1)
    return _Wave(choice, jnp.where(slot < 0, grid.slots_per_rank, slot % grid.slots_per_rank))


def _take_rows(rows, sent: _Wave, choices_per_token: int):
    return rows.at[sent.choice // choices_per_token].get(mode="fill", fill_value=0)


def _run_wave(compute: Compute, grid: ExchangeGrid, sent: _Wave, sent_rows, params):
    """One wave there and back: the results by row of the send buffer, and the rows computed."""
    swap = functools.partial(
        jax.lax.all_to_all, axis_name=grid.axis_name, split_axis=0, concat_axis=0, tiled=True
    )
    received = swap(sent_rows)
    slot = swap(sent.slot)
    order = jnp.argsort(slot, stable=True)  # empty rows, of slot N, go last
    count = jnp.zeros(grid.slots_per_rank, jnp.int32).at[slot].add(1, mode="drop")
    in_order = received.at[order].get(unique_indices=True, mode="promise_in_bounds")
    computed = compute(in_order, params, count)
    results = jnp.zeros_like(computed).at[order].set(computed, unique_indices=True)
    return swap(results), count.sum()
