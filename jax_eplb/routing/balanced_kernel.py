"""`balanced` in one GPU kernel: from the counts of all ranks to each rank's share.

Axes: P ranks, E experts, S slots, N slots per rank, J slots of experts that have several.

One block does it all for a rank, as the steps of the division depend on each other and launching a
kernel takes as long as a dozen of them. The matrix of the division stays in registers. Every block
works out the whole division: the device has room for as many, and they take no longer than one.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Int

from jax_eplb.kernels.threads import load, power_of_two, wait
from jax_eplb.kernels.varying import equally_varying
from jax_eplb.routing.leveling import Replicas, describe, total, whole_quota
from jax_eplb.routing.near_share import NodeSupply, Supply, near_share
from jax_eplb.routing.pair_shares import level_pairs, whole_share
from jax_eplb.routing.ranks import Ranks
from jax_eplb.tables import PlacementTables

# The J × J matrix must fit the registers of a block, and so must what levels pairs.
_MAX_REPLICATED, _MAX_PAIRS = 128, 64 * 128
_ROWS = 12  # of counts, loaded at a time
_EXPERTS = 64  # whose counts on all ranks are multiplied at a time
_LEAST = 16  # rows and columns of a product


def fits(ranks: Ranks, num_replicated: int) -> bool:
    """Whether the kernel can take J slots of so many ranks.

    >>> few, many = Ranks("expert", 36, 8), Ranks("expert", 128, 3)
    >>> fits(few, 64), fits(few, 0), fits(many, 128)
    (True, False, False)
    >>> fits(many._replace(prefers_near=True), 128)
    True
    """
    # Pairs of ranks are levelled in arrays P × J.
    pairs = 0 if ranks.prefers_near else _padded_ranks(ranks.num_ranks) * num_replicated
    return 0 < num_replicated <= _MAX_REPLICATED and pairs <= _MAX_PAIRS


def kernel_shares(
    counts: Int[Array, "P E"],
    tables: PlacementTables,
    ranks: Ranks,
    *,
    interpret: bool = False,
) -> Int[Array, "P S"]:
    """As `plain_shares`, for sizes that it `fits`."""
    num_ranks, num_experts = counts.shape
    num_slots = tables.slot_to_expert.size
    inputs = (
        counts,
        tables.slot_to_expert,
        tables.replica_count,
        tables.first_slot,
        tables.replicated_slots,
        lax.stop_gradient(tables.leveling),
        lax.stop_gradient(tables.handicap),
    )
    inputs = equally_varying(inputs)
    varying = {"manual_axis_type": jax.typeof(inputs[0]).manual_axis_type}
    shares, _ = pl.pallas_call(
        functools.partial(_kernel, ranks=ranks, interpret=interpret),
        out_shape=(
            jax.ShapeDtypeStruct((num_ranks, num_slots), jnp.int32, **varying),
            jax.ShapeDtypeStruct((num_ranks, _num_sums(ranks), num_experts), jnp.int32, **varying),
        ),
        grid=(num_ranks,),
        compiler_params=plgpu.CompilerParams(num_warps=8, num_stages=1),
        interpret=interpret,
        name="balanced_replica_choice",
    )(*inputs)
    return shares


def _kernel(
    counts_ref,
    expert_ref,
    replicas_ref,
    first_slot_ref,
    slots_ref,
    leveling_ref,
    handicap_ref,
    shares_ref,
    sums_ref,
    *,
    ranks: Ranks,
    interpret: bool,
):
    num_ranks, num_experts = counts_ref.shape
    num_slots, num_places = expert_ref.shape[0], slots_ref.shape[0]
    per_rank, per_node = ranks.slots_per_rank, ranks.ranks_per_node
    rank = pl.program_id(0)

    # What the placement says comes first: it can arrive while the counts are added up.
    slot = slots_ref[...]
    used = slot < num_slots
    alone = -1 - lax.iota(jnp.int32, num_places)
    expert = jnp.where(used, load(expert_ref, slot, used), alone)
    rank_of_slot = jnp.where(used, lax.div(slot, jnp.int32(per_rank)), alone)
    # At least as wide as the threads that share a row of `leveling`: then rows of both are laid out
    # alike.
    width = power_of_two(max(per_rank, num_places // 4))
    place = lax.broadcasted_iota(jnp.int32, (num_places, width), 1)
    beside = rank_of_slot[:, None] * per_rank + place  # the slots of the same rank, [J, N]
    is_beside = used[:, None] & (place < per_rank)
    expert_beside = load(expert_ref, beside, is_beside)
    is_filled = is_beside & (expert_beside < num_experts)
    is_single = is_filled & (load(replicas_ref, expert_beside, is_filled) == 1)
    if ranks.prefers_near:
        there = _load_two(counts_ref, rank_of_slot, expert, used)
    else:
        there = _fixed_pairs(counts_ref, replicas_ref, first_slot_ref, rank_of_slot, per_rank)
    leveling = leveling_ref[...]
    handicap = load(handicap_ref, rank_of_slot, used)

    sums = _add_up(counts_ref, rank, ranks)
    each = lax.iota(jnp.int32, power_of_two(num_experts))
    for row, values in enumerate(sums):
        plgpu.store(sums_ref.at[rank, row, each], values, mask=each < num_experts)
    wait(interpret)

    tokens, *before = (load(sums_ref, expert, used, rank, row) for row in range(len(sums)))
    fixed = load(sums_ref, expert_beside, is_single, rank, 0).sum(axis=1, dtype=jnp.int32)
    mean = sums[0].sum(dtype=jnp.int32).astype(jnp.float32) / num_ranks
    fixed = fixed + (handicap * mean).astype(jnp.int32)
    replicas = _laid_out_like(leveling, describe(expert, rank_of_slot))
    quota = whole_quota(tokens, fixed, mean, leveling, replicas)

    own = load(counts_ref, expert, used, rank)
    if ranks.prefers_near:
        near = None
        if per_node is not None:
            node = jnp.where(used, lax.div(rank_of_slot, jnp.int32(per_node)), alone)
            on_node = jnp.zeros_like(node)
            for i in range(per_node):
                on_node = on_node + _load_two(counts_ref, node * per_node + i, expert, used)
            near = NodeSupply(node, lax.div(rank, jnp.int32(per_node)), before[1], on_node)
        share = near_share(quota, Supply(own, before[0], there), near, rank, replicas)
    else:
        row = lax.broadcasted_iota(jnp.int32, (_padded_ranks(num_ranks), num_places), 0)
        each_own = _load_two(counts_ref, row, expert[None], (row < num_ranks) & used[None])
        level = level_pairs(quota, tokens, each_own, there, num_ranks, leveling, replicas)
        whole = jnp.floor(level).astype(jnp.int32)
        share, share_before = (
            jnp.where(chosen, whole, 0).sum(axis=0, dtype=jnp.int32)
            for chosen in (row == rank, row < rank)
        )
        quota_left = quota - whole.sum(axis=0, dtype=jnp.int32)
        share = whole_share(share, share_before, own, before[0], quota_left, replicas)
    plgpu.store(shares_ref.at[rank, slot], share, mask=used)

    every = lax.iota(jnp.int32, power_of_two(num_slots))
    exists = every < num_slots
    its_expert = load(expert_ref, every, exists)
    is_filled = exists & (its_expert < num_experts)
    alone = exists & (load(replicas_ref, its_expert, is_filled) <= 1)  # or empty
    tokens = load(counts_ref, its_expert, is_filled, rank)
    plgpu.store(shares_ref.at[rank, every], tokens, mask=alone)


def _laid_out_like(loaded, replicas: Replicas) -> Replicas:
    """The same, but a row of the masks is one warp's, as a row of what was loaded is.

    Triton spreads a row that it computes over two warps, and each sum over rows then takes two to
    six times as many barriers. The layout of a load spreads to what is computed from it.
    """

    def laid_out(mask):
        return jnp.where(jnp.isnan(loaded), 0, mask)  # no number is NaN

    same_expert = laid_out(replicas.same_expert)
    return replicas._replace(
        same_expert=same_expert,
        same_rank=laid_out(replicas.same_rank),
        count=total(same_expert, jnp.ones_like(replicas.index)),
    )


def _fixed_pairs(counts_ref, replicas_ref, first_slot_ref, rank_of_slot, per_rank: int):
    """What each rank sends each slot's rank, of experts that have one slot; float32[P, J]."""
    num_ranks, num_experts = counts_ref.shape
    row = lax.broadcasted_iota(jnp.int32, (_padded_ranks(num_ranks), 1), 0)
    pairs = jnp.zeros((row.shape[0], rank_of_slot.size), jnp.float32)

    def operands(start):
        expert = start + lax.iota(jnp.int32, _EXPERTS)
        exists = expert < num_experts
        is_single = exists & (load(replicas_ref, expert, exists) == 1)
        its_rank = lax.div(load(first_slot_ref, expert, exists), jnp.int32(per_rank))
        counts = _load_two(counts_ref, row, expert[None], (row < num_ranks) & exists[None])
        return counts, jnp.where(is_single, its_rank, num_ranks)  # no rank

    following = operands(0)
    for start in range(0, num_experts, _EXPERTS):
        counts, its_rank = following
        following = operands(start + _EXPERTS)  # on its way while this is multiplied
        there = its_rank[:, None] == rank_of_slot[None]
        pairs = pairs + jnp.dot(counts.astype(jnp.float32), there.astype(jnp.float32))
    return pairs


def _padded_ranks(num_ranks: int) -> int:
    return max(_LEAST, power_of_two(num_ranks))


def _num_sums(ranks: Ranks) -> int:
    return 3 if ranks.prefers_near else 2


def _add_up(counts_ref, rank, ranks: Ranks):
    """Tokens of each expert: all, and those on the ranks before this one.

    Where they are to stay near, also those on the ranks before it on its node.
    """
    num_ranks, num_experts = counts_ref.shape
    per_node = ranks.ranks_per_node
    each = lax.iota(jnp.int32, power_of_two(num_experts))
    first_near = jnp.int32(0) if per_node is None else lax.div(rank, jnp.int32(per_node)) * per_node

    def parts(row, values):
        before = jnp.where(row < rank, values, 0)
        on_node = [jnp.where(row >= first_near, before, 0)] if ranks.prefers_near else []
        return [values, before, *on_node]

    def add(chunk, sums):
        start = chunk * _ROWS
        # All loads of a chunk are on their way at once.
        rows = [
            load(counts_ref, each, (each < num_experts) & (start + i < num_ranks), start + i)
            for i in range(_ROWS)
        ]
        for i, values in enumerate(rows):
            sums = [sum(pair) for pair in zip(sums, parts(start + i, values), strict=True)]
        return sums

    zeros = [jnp.zeros(each.shape, jnp.int32)] * _num_sums(ranks)
    return lax.fori_loop(0, pl.cdiv(num_ranks, _ROWS), add, zeros)


def _load_two(ref, row, index, mask):
    return plgpu.load(
        ref.at[jnp.where(mask, row, 0), jnp.where(mask, index, 0)], mask=mask, other=0
    )
