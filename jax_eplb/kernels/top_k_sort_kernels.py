"""The kernels of `top_k_sort`, in Triton's terms: bodies that see references to whole arrays.

Axes: T tokens, E experts, K choices per token, B blocks of C tokens. Capitals of two letters are
sizes of tiles, powers of two.
"""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from jax_eplb.kernels.threads import power_of_two, wait

_COUNTS = 8192  # of a tile of counts
_WARP = 128  # scores of a token that one warp takes at once
_LEAST = -(2**31)


def whole_kernel(scores_ref, mask_ref, *refs, block: int, interpret: bool):
    """All in one program."""
    *rank, values_ref, experts_ref, choice_ref, place_ref, tokens_ref, sizes_ref, start_ref = refs
    num_experts = scores_ref.shape[1]
    experts, taken, own = _choose(scores_ref, mask_ref, values_ref, experts_ref, block)
    parts = _parts(num_experts)
    counts = [x.sum(0, dtype=jnp.int32) for x in taken]
    for expert, count in zip(parts, counts, strict=True):
        exists = expert < num_experts
        plgpu.store(tokens_ref.at[expert], count, mask=exists)
        plgpu.store(sizes_ref.at[_rank_of(rank, expert, num_experts)], count, mask=exists)
    if rank:
        wait(interpret)
        sizes = [_load(sizes_ref, expert, expert < num_experts) for expert in parts]
        for expert, start in zip(parts, _starts(sizes), strict=True):
            plgpu.store(start_ref.at[expert], start, mask=expert < num_experts)
        wait(interpret)
        ranks = [_rank_of(rank, expert, num_experts) for expert in parts]
        starts = [_load(start_ref, x, x < num_experts) for x in ranks]
    else:
        starts = _starts(counts)
    places = _look_up(experts, [x[None] + _earlier(y) for x, y in zip(starts, taken, strict=True)])
    total = functools.reduce(jnp.add, counts).sum(dtype=jnp.int32)
    _store_order(choice_ref, place_ref, _choices(block, place_ref), places, own, total)


def choose_kernel(scores_ref, mask_ref, *refs, block: int, interpret: bool):
    """The choices of a block; the earlier ones of the same expert there; how many of each rank."""
    *rank, values_ref, experts_ref, earlier_ref, counts_ref = refs
    num_experts = scores_ref.shape[1]
    experts, taken, _ = _choose(scores_ref, mask_ref, values_ref, experts_ref, block)
    for expert, one in zip(_parts(num_experts), taken, strict=True):
        at = jnp.full_like(expert, pl.program_id(0)), _rank_of(rank, expert, num_experts)
        plgpu.store(counts_ref.at[at], one.sum(0, dtype=jnp.int32), mask=expert < num_experts)
    at, real = _choices(block, earlier_ref)
    plgpu.store(earlier_ref.at[at], _look_up(experts, [_earlier(x) for x in taken]), mask=real)


def place_kernel(mask_ref, experts_ref, earlier_ref, counts_ref, *refs, block: int, interpret):
    """A choice's place: experts before its own, its own in earlier blocks, and in its block."""
    *rank, choice_ref, place_ref, tokens_ref, sizes_ref, start_ref = refs
    blocks, num_experts = counts_ref.shape
    own_block = pl.program_id(0)
    expert = jnp.arange(power_of_two(num_experts), dtype=jnp.int32)
    exists = expert < num_experts
    chunk = min(max(_COUNTS // len(expert), 1), power_of_two(blocks))
    row = jnp.arange(chunk, dtype=jnp.int32)

    def add(index, sums):
        above, counts = sums
        which = index * chunk + row
        there = (which < blocks)[:, None] & exists[None]
        found = plgpu.load(counts_ref.at[which[:, None], expert[None]], mask=there, other=0)
        earlier = jnp.where((which < own_block)[:, None], found, 0)
        return above + earlier.sum(0, dtype=jnp.int32), counts + found.sum(0, dtype=jnp.int32)

    zeros = jnp.zeros(expert.shape, jnp.int32)
    chunks = jnp.int32(pl.cdiv(blocks, chunk))
    above, counts = lax.fori_loop(jnp.int32(0), chunks, add, (zeros, zeros))
    start = jnp.cumsum(counts) - counts + above
    plgpu.store(start_ref.at[jnp.full_like(expert, own_block), expert], start, mask=exists)
    # All programs store the same totals.
    plgpu.store(sizes_ref.at[expert], counts, mask=exists)
    wait(interpret)
    totals = _load(sizes_ref, _rank_of(rank, expert, num_experts), exists)
    plgpu.store(tokens_ref.at[expert], totals, mask=exists)

    at, real = _choices(block, place_ref)
    chosen = _load(experts_ref, at, real)
    chosen = _load(rank[0], chosen, real) if rank else chosen
    place = _load(start_ref, (jnp.full_like(chosen, own_block), chosen), real)
    place = place + _load(earlier_ref, at, real)
    own = _load(mask_ref, at[0], real) & real
    _store_order(choice_ref, place_ref, (at, real), place, own, counts.sum(dtype=jnp.int32))


def _choose(scores_ref, mask_ref, values_ref, experts_ref, block: int):
    """Store a block's choices; K vectors of experts, which were taken, the choices that count.

    By comparing integers, in the total order of floats: any number has its place in it, NaN too.
    """
    num_tokens, num_experts = scores_ref.shape
    token = _tokens(block)
    real = token < num_tokens
    parts = _parts(num_experts)
    keys = []
    for expert in parts:
        exists = (expert < num_experts)[None]
        at = token[:, None], expert[None]
        scores = plgpu.load(scores_ref.at[at], mask=real[:, None] & exists, other=0)
        key = _ordered(lax.bitcast_convert_type(scores, jnp.int32))
        keys.append(jnp.where(exists, jnp.maximum(key, _LEAST + 1), _LEAST))
    bests, experts = [], []
    for _ in range(values_ref.shape[1]):
        best = functools.reduce(jnp.maximum, keys).max(axis=1)
        ties = [
            jnp.where(key == best[:, None], expert[None], num_experts - 1)
            for key, expert in zip(keys, parts, strict=True)
        ]
        chosen = functools.reduce(jnp.minimum, ties).min(axis=1)
        keys = [
            jnp.where(expert[None] == chosen[:, None], _LEAST, key)
            for key, expert in zip(keys, parts, strict=True)
        ]
        bests.append(best)
        experts.append(chosen)
    at, exists = _choices(block, values_ref)
    values = lax.bitcast_convert_type(_ordered(_side_by_side(bests)), jnp.float32)
    plgpu.store(values_ref.at[at], values, mask=exists)
    plgpu.store(experts_ref.at[at], _side_by_side(experts), mask=exists)
    own = _load(mask_ref, token, real) & real
    taken = [
        ((key == _LEAST) & (expert < num_experts)[None] & own[:, None]).astype(jnp.int32)
        for key, expert in zip(keys, parts, strict=True)
    ]
    return experts, taken, _load(mask_ref, at[0], exists) & exists


def _ordered(bits):
    """A float's bits to an integer that compares as the float does; its own inverse."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _parts(num_experts: int):
    """All experts, in vectors so short that a row of them is one warp's: its maximum is quick."""
    width = min(power_of_two(num_experts), _WARP)
    return [jnp.arange(width, dtype=jnp.int32) + i for i in range(0, num_experts, width)]


def _side_by_side(columns):
    """K vectors [C] as one tile [C, KK]."""
    column = jnp.arange(power_of_two(len(columns)), dtype=jnp.int32)[None]
    tile = jnp.zeros((len(columns[0]), column.size), jnp.int32)
    for k, values in enumerate(columns):
        tile = jnp.where(column == k, values[:, None], tile)
    return tile


def _look_up(experts, tables):
    """What the parts of a table [C, E] hold for the K experts of each token; [C, KK]."""

    def of(chosen):
        parts = _parts(sum(x.shape[1] for x in tables))
        found = [
            jnp.where(chosen[:, None] == expert[None], table, 0)
            for expert, table in zip(parts, tables, strict=True)
        ]
        return functools.reduce(jnp.add, found).sum(1, dtype=jnp.int32)

    return _side_by_side([of(chosen) for chosen in experts])


def _earlier(taken):
    """How often each expert was taken by earlier tokens of the block."""
    return jnp.cumsum(taken, axis=0) - taken


def _starts(sizes):
    """Where the run of each expert begins; sizes and starts in parts."""
    starts, total = [], jnp.int32(0)
    for size in sizes:
        starts.append(jnp.cumsum(size) - size + total)
        total = total + size.sum(dtype=jnp.int32)
    return starts


def _store_order(choice_ref, place_ref, choices, place, own, total):
    """Each choice to its place; places past the last are filled by the programs of their number."""
    (at, real), (num_tokens, per_token) = choices, place_ref.shape
    choice, none = at[0] * per_token + at[1], num_tokens * per_token
    plgpu.store(place_ref.at[at], jnp.where(own, place, none), mask=real)
    plgpu.store(choice_ref.at[jnp.where(own, place, none)], choice, mask=own)
    rest = jnp.full_like(choice, none)
    plgpu.store(choice_ref.at[choice], rest, mask=real & (choice >= total))


def _choices(block: int, ref):
    """Token and k of each choice of this program, [C, KK], and which of them exist."""
    num_tokens, per_token = ref.shape
    k = jnp.arange(power_of_two(per_token), dtype=jnp.int32)
    token = jnp.broadcast_to(_tokens(block)[:, None], (block, len(k)))
    k = jnp.broadcast_to(k[None], token.shape)
    return (token, k), (token < num_tokens) & (k < per_token)


def _tokens(block: int):
    return pl.program_id(0) * block + jnp.arange(block, dtype=jnp.int32)


def _rank_of(rank, expert, num_experts: int):
    exists = expert < num_experts
    return jnp.where(exists, _load(rank[0], expert, exists), expert) if rank else expert


def _load(ref, index, mask):
    return plgpu.load(ref.at[index], mask=mask, other=False if ref.dtype == bool else 0)
