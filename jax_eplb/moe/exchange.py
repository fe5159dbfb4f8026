"""The exchange: rows to the ranks that hold their slots, through the experts, and back, combined.

Axes: T tokens of this rank, K choices per token, P ranks, N slots per rank, D embedding width, B
rows that a rank sends in one wave, M rows that it computes in one. A choice is one (token, k) pair.

Waves go on until the fullest pair of ranks is done, so no token is ever dropped, and the buffers
stay what they are however skewed the load; nearly always one wave does. While one of several is
computed the next one's rows travel. Rows are computed in blocks of one size, placed, and added in
the order of the choices: so neither the placement, nor the waves, nor the way they travel changes a
bit of the result. The gradient walks the same waves again and computes each one anew, so that
training is bounded alike.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jax_eplb.kernels.varying import equally_varying, zeros_varying_like
from jax_eplb.moe.exchange_sizes import ExchangeSizes
from jax_eplb.moe.gathered import Gathered
from jax_eplb.moe.waves import Waves
from jax_eplb.routing import Ranks, SlotOrder

# (rows [M, D], parameters, group_sizes [N]) -> [M, D], rows sorted by slot of this rank.
Compute = Callable[[Float[Array, "M D"], Any, Int[Array, "N"]], Float[Array, "M D"]]


def exchange(
    compute: Compute,
    sizes: ExchangeSizes,
    ranks: Ranks,
    tokens: Float[Array, "T D"],
    weights: Float[Array, "T K"],
    order: SlotOrder,
    params: Any,
) -> tuple[Float[Array, "T D"], Int[Array, ""]]:
    """Run each choice through its slot on the rank that holds it; the weighted sum by token.

    Inside `shard_map` over `ranks.axis_name`. The sum is float32; choices of padding add nothing.
    Also returns how many rows this rank computed.
    """
    if weights.size == 0:
        nothing = zeros_varying_like(tokens.shape, jnp.float32, tokens, weights)
        return nothing, zeros_varying_like((), jnp.int32, tokens, weights)
    # The loops below carry values of one type: all as varying as the most varying.
    tokens, weights, order, params = equally_varying((tokens, weights, order, params))
    return _exchange(compute, sizes, ranks, tokens, weights, order, params)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _exchange(compute: Compute, sizes: ExchangeSizes, ranks: Ranks, tokens, weights, order, params):
    def send(transport, wave):
        return transport.send_tokens(wave, tokens)

    def run(transport, wave, rows):
        computed = compute(rows, params, wave.group_sizes)
        return transport.send_back(wave, computed), wave.group_sizes.sum()

    def finish(results, place):
        return _sum_by_token(results, place, weights)

    return _in_waves(sizes, ranks, order, send, run, finish)


def _exchange_forward(compute, sizes, ranks, *arrays):
    return _exchange(compute, sizes, ranks, *arrays), arrays


def _exchange_backward(compute, sizes, ranks, arrays, grads):
    tokens, weights, order, params = arrays
    grad_sums = grads[0].astype(tokens.dtype)

    def send(transport, wave):
        rows = transport.send_tokens(wave, tokens)
        grad_rows = transport.send_tokens(wave, grad_sums)
        return rows, grad_rows, transport.send_choices(wave, weights)[:, None]

    def run(transport, wave, sent):
        rows, grad_rows, weight = sent
        computed, transpose = jax.vjp(
            lambda rows, params: compute(rows, params, wave.group_sizes), rows, params
        )
        wide = grad_rows.astype(jnp.float32)
        grad_rows, grad_params = transpose((wide * weight).astype(computed.dtype))
        # Integers, such as a stack's layer, have no gradients that could be added up.
        grad_params = jax.tree.map(
            lambda x: None if x.dtype == jax.dtypes.float0 else x, grad_params
        )
        grad_weight = (wide * computed.astype(jnp.float32)).sum(axis=1)
        back = transport.send_back(wave, grad_rows), transport.send_back(wave, grad_weight)
        return back, grad_params

    def finish(back, place):
        grad_rows, grad_weight = back
        ones = jnp.ones_like(weights)
        grad_tokens = _sum_by_token(grad_rows, place, ones).astype(tokens.dtype)
        return grad_tokens, grad_weight.at[place].get(mode="fill", fill_value=0)

    (grad_tokens, grad_weights), grad_params = _in_waves(sizes, ranks, order, send, run, finish)
    return grad_tokens, grad_weights, None, grad_params


_exchange.defvjp(_exchange_forward, _exchange_backward)


def _in_waves(sizes: ExchangeSizes, ranks: Ranks, order: SlotOrder, send, run, finish):
    """Run the waves that it takes: what `finish` makes of all rows, and the sum of the rest.

    `run(transport, wave, send(transport, wave))` gives rows of the send buffer, and values to add
    up over waves; `finish(rows, place)` is given a table of rows, and each choice's row in it.
    """

    def transport_of(capacity):
        if sizes.implementation == "all_gather":
            return Gathered(order, ranks, capacity)
        return Waves(order, ranks, capacity, sizes.implementation == "ragged")

    def at_once(capacity):
        transport = transport_of(capacity)
        wave = transport.wave(0)
        rows, total = run(transport, wave, send(transport, wave))
        return finish(rows, wave.place), total

    def one_by_one(capacity):
        return _one_by_one(transport_of(capacity), order, send, run, finish)

    ways = [functools.partial(at_once, capacity) for capacity in sizes.in_one_wave]
    if sizes.in_several is not None:
        ways.append(functools.partial(one_by_one, sizes.in_several))
    first = jnp.int32(0)  # of the ways that does
    for capacity in sizes.in_one_wave[: len(ways) - 1]:
        first = first + jnp.asarray(transport_of(capacity).num_waves() > 1, jnp.int32)
    return jax.lax.switch(first, ways)


def _one_by_one(transport: Gathered | Waves, order: SlotOrder, send, run, finish):
    """Several waves, whose rows wait for each other in a table by choice."""
    num_choices = order.choice.size

    def add_wave(done, wave, sent):
        placed, total = done
        rows, more = run(transport, wave, sent)
        # Empty rows go to nowhere, each elsewhere: at indices that may repeat, a GPU puts rows of
        # 2-byte numbers by compare and swap, in five times as long.
        nowhere = num_choices + jnp.arange(len(wave.choice), dtype=jnp.int32)
        at = jnp.where(wave.choice < num_choices, wave.choice, nowhere)
        placed = jax.tree.map(
            lambda x, new: x.at[at].set(new, mode="drop", unique_indices=True), placed, rows
        )
        return placed, jax.tree.map(jnp.add, total, more)

    def body(index, carry):
        done, wave, sent = carry
        following = transport.wave(index + 1)
        coming = send(transport, following)  # while the one at hand is computed
        return equally_varying((add_wave(done, wave, sent), following, coming))

    wave = transport.wave(0)
    sent = send(transport, wave)
    rows, total = jax.eval_shape(lambda: run(transport, wave, sent))
    done = (
        # Nobody reads what is not written: that of padding.
        jax.tree.map(lambda x: jax.lax.empty((num_choices, *x.shape[1:]), x.dtype), rows),
        jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), total),
    )
    carry = equally_varying((done, wave, sent))
    # The last wave has none to wait for, so it is not the loop's.
    done, wave, sent = jax.lax.fori_loop(0, transport.num_waves() - 1, body, carry)
    placed, total = add_wave(done, wave, sent)
    each = jnp.arange(num_choices, dtype=jnp.int32).reshape(order.place.shape)
    return finish(placed, jnp.where(order.place < num_choices, each, num_choices)), total


def _sum_by_token(rows, place: Int[Array, "T K"], weights: Float[Array, "T K"]):
    """The weighted sum of each token's rows, float32, always in the order of its choices."""

    # Clipped and masked: what `mode="fill"` fills, a GPU finds out in a launch for each choice.
    exists = place < len(rows)

    def choice(place, weights, exists):
        picked = rows.at[place].get(mode="clip")  # [T, D]
        picked = jnp.where(exists[:, None], picked, jnp.zeros_like(picked))
        return picked.astype(jnp.float32) * weights[:, None]

    choices = map(choice, *(jnp.unstack(x, axis=1) for x in (place, weights, exists)))
    return functools.reduce(jnp.add, choices)
