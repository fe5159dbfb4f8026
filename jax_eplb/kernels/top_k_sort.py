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
from jax_eplb.kernels.threads import power_of_two
from jax_eplb.kernels.top_k_sort_kernels import (
    choose_kernel,
    place_kernel,
    whole_kernel,
)
from jax_eplb.kernels.varying import equally_varying, varying_like

MAX_EXPERTS = 512  # more of them do not fit the registers of a program
_ONE_PROGRAM = 4096  # scores of the largest tile that one program takes alone
# Tokens of a program where there are several, by the number of tokens: as measured on an H100.
_BLOCKS = ((512, 16), (4096, 32), (None, 64))


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
    arrays = equally_varying(arrays)
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
    width = power_of_two(num_experts)
    if block is None:
        block = power_of_two(num_tokens)
        if block * width > _ONE_PROGRAM:
            # Every program of the second kernel reads the counts of all.
            block = next(size for most, size in _BLOCKS if most is None or num_tokens <= most)
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
        return TopKSorted(*call(whole_kernel, "top_k_sort", outputs, warps, *inputs)[:-1])
    of_blocks = ((blocks, num_experts), jnp.int32)
    outputs = [*chosen, (choices, jnp.int32), of_blocks]
    values, experts, earlier, counts = call(choose_kernel, "top_k", outputs, warps, *inputs)
    outputs = [*order, (of_experts, jnp.int32), (of_experts, jnp.int32), of_blocks]
    inputs = [mask, experts, earlier, counts, *inputs[2:]]
    return TopKSorted(
        values, experts, *call(place_kernel, "sort_choices", outputs, 8, *inputs)[:-1]
    )
