"""Each token's best experts, and all choices in the order of their experts: two launches on a GPU.

Axes: T tokens, E experts, K choices per token, B blocks of C tokens. A choice is one (token, k)
pair, numbered t·K + k; TK = T·K. Capitals of two letters are sizes of tiles, powers of two.

A decoding step is a chain of launches that take longer to start than to run; XLA makes seven of
`top_k` and `counting_sort`. A few tokens are one program's work, and one launch.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Bool, Float, Int

from jax_eplb.kernels.counting_sort import counting_sort
from jax_eplb.kernels.varying import varying_like

MAX_EXPERTS = 512  # more of them do not fit the registers of a program
_ONE_PROGRAM = 16384  # scores of the largest tile that one program takes alone
_COUNTS = 8192  # of a tile of counts
_LEAST = -(2**31)


class TopKSorted(NamedTuple):
    """The best experts of each token, the best first; and the choices by expert, padding last."""

    values: Float[Array, "T K"]  # float32, the scores of the chosen
    experts: Int[Array, "T K"]
    choice: Int[Array, "TK"]  # the choice at each place of the order; T·K for padding
    place: Int[Array, "T K"]  # each choice's place in the order; T·K for padding
    expert_tokens: Int[Array, "E"]  # choices of each expert; padding is not counted
    run_sizes: Int[Array, "E"]  # the same, in the order that the choices have


def top_k_sort(
    scores: Float[Array, "T E"],
    mask: Bool[Array, "T"],
    experts_per_token: int,
    rank_of_expert: Int[Array, "E"] | None = None,
) -> TopKSorted:
    """Choose the K best experts of each token, and sort the choices by expert.

    As `lax.top_k` chooses: ties go to the lowest expert. The sort is stable; with `rank_of_expert`,
    a permutation, it is by that instead of the expert's number. Tokens with a False mask are
    padding: they choose, too, but their choices come last and are not counted.
    The values are differentiable in the scores.

    >>> scores = jnp.array([[1.0, 3.0, 3.0], [2.0, 0.0, 1.0], [5.0, 6.0, 7.0]])
    >>> found = top_k_sort(scores, jnp.array([True, True, False]), 2)
    >>> found.experts.tolist(), found.choice.tolist(), found.expert_tokens.tolist()
    ([[1, 2], [0, 2], [2, 1]], [2, 0, 1, 3, 6, 6], [1, 1, 2])
    """
    arrays = [lax.stop_gradient(scores).astype(jnp.float32), mask]
    arrays += [] if rank_of_expert is None else [rank_of_expert.astype(jnp.int32)]
    arrays = [varying_like(x, *arrays) for x in arrays]
    plain = functools.partial(by_xla, experts_per_token=experts_per_token)
    if jax.default_backend() != "gpu" or not scores.size or scores.shape[1] > MAX_EXPERTS:
        found = plain(*arrays)
    else:
        by_kernels = functools.partial(top_k_sort_by_kernels, experts_per_token=experts_per_token)
        found = lax.platform_dependent(*arrays, cuda=by_kernels, default=plain)
    scores = varying_like(scores.astype(jnp.float32), found.values)
    return found._replace(values=_chosen(scores, found.experts, found.values))


@jax.custom_jvp
def _chosen(scores, experts, values):
    """`values`, which are the scores of the experts, not looked up again but differentiable."""
    return values


@_chosen.defjvp
def _chosen_tangent(primals, tangents):
    _, experts, values = primals
    return values, jnp.take_along_axis(tangents[0], experts, axis=1)


def by_xla(scores, mask, rank_of_expert=None, *, experts_per_token: int) -> TopKSorted:
    """The same on any device."""
    num_experts = scores.shape[1]
    values, experts = lax.top_k(scores, experts_per_token)
    ranks = experts if rank_of_expert is None else rank_of_expert[experts]
    ranks = jnp.where(mask[:, None], ranks, num_experts)
    found = counting_sort(ranks.reshape(-1), num_experts)
    counts = found.counts
    place = jnp.arange(ranks.size, dtype=jnp.int32)
    return TopKSorted(
        values,
        experts,
        jnp.where(place < counts.sum(), found.order, ranks.size),
        jnp.where(mask[:, None], found.place.reshape(ranks.shape), ranks.size),
        counts if rank_of_expert is None else counts[rank_of_expert],
        counts,
    )


def top_k_sort_by_kernels(
    scores,
    mask,
    rank_of_expert=None,
    *,
    experts_per_token: int,
    block: int | None = None,
    interpret: bool = False,
) -> TopKSorted:
    """The same by kernels of our own, in programs of `block` tokens (a power of two)."""
    num_tokens, num_experts = scores.shape
    width = _power(num_experts)
    if block is None:
        block = _power(num_tokens)
        if block * width > _ONE_PROGRAM:
            # Every program of the second kernel reads the counts of all.
            block = 32 if num_tokens <= 4096 else 64
    inputs = [scores, mask] + ([] if rank_of_expert is None else [rank_of_expert])
    varying = jax.typeof(scores).manual_axis_type

    def call(kernel, name, outputs, num_warps, *arrays):
        shapes = [jax.ShapeDtypeStruct(*x, manual_axis_type=varying) for x in outputs]
        return pl.pallas_call(
            functools.partial(kernel, block=block, interpret=interpret),
            out_shape=shapes,
            grid=(blocks,),
            compiler_params=plgpu.CompilerParams(num_warps=num_warps, num_stages=1),
            interpret=interpret,
            name=name,
        )(*arrays)

    blocks = pl.cdiv(num_tokens, block)
    choices, of_experts = (num_tokens, experts_per_token), (num_experts,)
    chosen = [(choices, jnp.float32), (choices, jnp.int32)]
    order = [((num_tokens * experts_per_token,), jnp.int32), (choices, jnp.int32)]
    # So many that a thread holds 16 scores where one program does all, else 32.
    warps = min(max(block * width // (512 if blocks == 1 else 1024), 4), 16)
    if blocks == 1:
        outputs = [*chosen, *order] + [(of_experts, jnp.int32)] * 3
        return TopKSorted(*call(_whole_kernel, "top_k_sort", outputs, warps, *inputs)[:-1])
    of_blocks = ((blocks, num_experts), jnp.int32)
    outputs = [*chosen, (choices, jnp.int32), of_blocks]
    values, experts, earlier, counts = call(_choose_kernel, "top_k", outputs, warps, *inputs)
    outputs = [*order, (of_experts, jnp.int32), (of_experts, jnp.int32), of_blocks]
    inputs = [mask, experts, earlier, counts, *inputs[2:]]
    return TopKSorted(
        values, experts, *call(_place_kernel, "sort_choices", outputs, 8, *inputs)[:-1]
    )


def _whole_kernel(scores_ref, mask_ref, *refs, block: int, interpret: bool):
    """All in one program."""
    *rank, values_ref, experts_ref, choice_ref, place_ref, tokens_ref, sizes_ref, start_ref = refs
    num_experts = scores_ref.shape[1]
    expert = jnp.arange(_power(num_experts), dtype=jnp.int32)
    exists = expert < num_experts
    experts, taken, own = _choose(scores_ref, mask_ref, values_ref, experts_ref, block)
    counts = taken.sum(0, dtype=jnp.int32)
    plgpu.store(tokens_ref.at[expert], counts, mask=exists)
    if rank:
        rank = _ranks(rank, expert, exists)
        plgpu.store(sizes_ref.at[rank], counts, mask=exists)
        _wait(interpret)
        sizes = _load(sizes_ref, expert, exists)
        plgpu.store(start_ref.at[expert], jnp.cumsum(sizes) - sizes, mask=exists)
        _wait(interpret)
        start = _load(start_ref, rank, exists)
    else:
        plgpu.store(sizes_ref.at[expert], counts, mask=exists)
        start = jnp.cumsum(counts) - counts
    places = start[None] + jnp.cumsum(taken, axis=0) - taken
    token = jnp.arange(block, dtype=jnp.int32)
    for k, chosen in enumerate(experts):
        place = jnp.where(chosen[:, None] == expert[None], places, 0).sum(1, dtype=jnp.int32)
        at = token, jnp.full_like(token, k)
        _store_order(choice_ref, place_ref, at, place, own, counts.sum(dtype=jnp.int32))


def _choose_kernel(scores_ref, mask_ref, *refs, block: int, interpret: bool):
    """The choices of a block; the earlier ones of the same expert there; how many of each rank."""
    *rank, values_ref, experts_ref, earlier_ref, counts_ref = refs
    num_tokens, num_experts = scores_ref.shape
    expert = jnp.arange(_power(num_experts), dtype=jnp.int32)
    exists = expert < num_experts
    experts, taken, _ = _choose(scores_ref, mask_ref, values_ref, experts_ref, block)
    rank = _ranks(rank, expert, exists)
    counts = taken.sum(0, dtype=jnp.int32)
    at = jnp.full_like(rank, pl.program_id(0)), rank
    plgpu.store(counts_ref.at[at], counts, mask=exists)
    before = jnp.cumsum(taken, axis=0) - taken
    token = _tokens(block)
    for k, chosen in enumerate(experts):
        earlier = jnp.where(chosen[:, None] == expert[None], before, 0).sum(1, dtype=jnp.int32)
        plgpu.store(
            earlier_ref.at[token, jnp.full_like(token, k)], earlier, mask=token < num_tokens
        )


def _choose(scores_ref, mask_ref, values_ref, experts_ref, block: int):
    """Store a block's choices: K vectors of experts, which were taken [C, EE], tokens that count.

    By comparing integers, in the total order of floats: any number has its place in it, NaN too.
    """
    num_tokens, num_experts = scores_ref.shape
    token, expert = _tokens(block), jnp.arange(_power(num_experts), dtype=jnp.int32)
    real, exists = token < num_tokens, (expert < num_experts)[None]
    safe = jnp.where(real, token, 0)[:, None], jnp.where(exists, expert[None], 0)
    scores = plgpu.load(scores_ref.at[safe], mask=real[:, None] & exists, other=0)
    key = _ordered(lax.bitcast_convert_type(scores, jnp.int32))
    key = jnp.where(exists, jnp.maximum(key, _LEAST + 1), _LEAST)
    experts = []
    for k in range(values_ref.shape[1]):
        best = key.max(axis=1)
        ties = jnp.where(key == best[:, None], expert[None], num_experts - 1)
        experts.append(ties.min(axis=1))
        key = jnp.where(expert[None] == experts[-1][:, None], _LEAST, key)
        at = token, jnp.full_like(token, k)
        value = lax.bitcast_convert_type(_ordered(best), jnp.float32)
        plgpu.store(values_ref.at[at], value, mask=real)
        plgpu.store(experts_ref.at[at], experts[-1], mask=real)
    own = plgpu.load(mask_ref.at[jnp.where(real, token, 0)], mask=real, other=False) & real
    taken = (key == _LEAST) & exists & own[:, None]
    return experts, taken.astype(jnp.int32), own


def _ordered(bits):
    """A float's bits to an integer that compares as the float does; its own inverse."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _place_kernel(mask_ref, experts_ref, earlier_ref, counts_ref, *refs, block: int, interpret):
    """A choice's place: experts before its own, its own in earlier blocks, and in its block."""
    *rank, choice_ref, place_ref, tokens_ref, sizes_ref, start_ref = refs
    num_tokens, per_token = experts_ref.shape
    blocks, num_experts = counts_ref.shape
    own_block = pl.program_id(0)
    expert = jnp.arange(_power(num_experts), dtype=jnp.int32)
    exists = expert < num_experts
    chunk = min(max(_COUNTS // len(expert), 1), _power(blocks))
    row = jnp.arange(chunk, dtype=jnp.int32)

    def add(index, sums):
        above, counts = sums
        which = index * chunk + row
        there = (which < blocks)[:, None] & exists[None]
        at = jnp.where(which < blocks, which, 0)[:, None], jnp.where(exists, expert, 0)[None]
        found = plgpu.load(counts_ref.at[at], mask=there, other=0)
        earlier = jnp.where((which < own_block)[:, None], found, 0)
        return above + earlier.sum(0, dtype=jnp.int32), counts + found.sum(0, dtype=jnp.int32)

    zeros = jnp.zeros(expert.shape, jnp.int32)
    chunks = jnp.int32(pl.cdiv(blocks, chunk))
    above, counts = lax.fori_loop(jnp.int32(0), chunks, add, (zeros, zeros))
    start = jnp.cumsum(counts) - counts + above
    plgpu.store(start_ref.at[jnp.full_like(expert, own_block), expert], start, mask=exists)
    # All programs store the same totals.
    plgpu.store(sizes_ref.at[expert], counts, mask=exists)
    _wait(interpret)
    totals = _load(sizes_ref, _ranks(rank, expert, exists), exists)
    plgpu.store(tokens_ref.at[expert], totals, mask=exists)

    token = _tokens(block)[:, None]
    k = jnp.arange(_power(per_token), dtype=jnp.int32)[None]
    at = jnp.broadcast_to(token, (block, k.size)), jnp.broadcast_to(k, (block, k.size))
    real = (token < num_tokens) & (k < per_token)
    safe = tuple(jnp.where(real, x, 0) for x in at)
    chosen = plgpu.load(experts_ref.at[safe], mask=real, other=0)
    chosen = plgpu.load(rank[0].at[chosen], mask=real, other=0) if rank else chosen
    place = plgpu.load(start_ref.at[jnp.full_like(chosen, own_block), chosen], mask=real, other=0)
    place = place + plgpu.load(earlier_ref.at[safe], mask=real, other=0)
    own = plgpu.load(mask_ref.at[safe[0]], mask=real, other=False)
    _store_order(choice_ref, place_ref, at, place, own, counts.sum(dtype=jnp.int32))


def _store_order(choice_ref, place_ref, at, place, own, total):
    """Each choice to its place; places past the last are filled by the programs of their number."""
    (token, k), (num_tokens, per_token) = at, place_ref.shape
    real, choice = (token < num_tokens) & (k < per_token), token * per_token + k
    own, none = own & real, num_tokens * per_token
    plgpu.store(place_ref.at[at], jnp.where(own, place, none), mask=real)
    plgpu.store(choice_ref.at[jnp.where(own, place, none)], choice, mask=own)
    rest = real & (choice >= total)
    plgpu.store(choice_ref.at[choice], jnp.full_like(choice, none), mask=rest)


def _tokens(block: int):
    return pl.program_id(0) * block + jnp.arange(block, dtype=jnp.int32)


def _load(ref, index, mask):
    return plgpu.load(ref.at[jnp.where(mask, index, 0)], mask=mask, other=0)


def _ranks(rank, expert, exists):
    return jnp.where(exists, _load(rank[0], expert, exists), expert) if rank else expert


def _wait(interpret: bool):
    if not interpret:
        plgpu.debug_barrier()  # other threads read what was stored


def _power(size: int) -> int:
    """The least power of two that is not smaller."""
    return 1 << (size - 1).bit_length()
