"""Replica choice `fewest`: no more of an expert's replicas than its tokens are worth.

Axes: P ranks, E experts, S slots.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jax_eplb.routing.even import deal
from jax_eplb.routing.ranks import Ranks, SlotTokens
from jax_eplb.tables import PlacementTables

# Multiplying so many rows by an expert's weights takes as long as reading these. In bfloat16 it is
# operations over bytes per second: 268 on an H100, by the figures of docs/performance.md.
WORTH_READING = 256


def fewest(expert_tokens: Int[Array, "E"], tables: PlacementTables, ranks: Ranks) -> SlotTokens:
    """How many choices go to each slot; inside `shard_map` over the ranks.

    For decoding: below some 256 rows a slot takes as long as reading its weights does, so a second
    replica of an expert costs its rank time and saves the other none. That to balance the experts
    read, not the tokens, is better then is METRO's finding (Yu et al., arXiv 2512.09277), which
    chooses anew for each batch. Here each expert is served by its home (`home_slots`), the same
    in every batch, and by one replica more for each 256 of its tokens from the second 256 on, dealt
    in turn as `even` does. The ranks' speeds do not count.
    """
    return ranks.known_to_all(fewest_shares(ranks.gather(expert_tokens), tables))


def fewest_shares(counts: Int[Array, "P E"], tables: PlacementTables) -> Int[Array, "P S"]:
    """Each rank's choices for each slot, from the counts of all ranks.

    >>> from jax_eplb import Placement
    >>> placement = Placement.from_slots([[0, 1, 2, 0]], num_experts=3, num_ranks=2)
    >>> tables = placement.tables().of_layer(0)
    >>> fewest_shares(jnp.array([[200, 1, 1], [200, 0, 2]]), tables).tolist()
    [[200, 1, 1, 0], [200, 0, 2, 0]]
    >>> fewest_shares(jnp.array([[300, 1, 1], [301, 0, 2]]), tables).tolist()
    [[150, 1, 1, 150], [150, 0, 2, 151]]
    """
    tokens = counts.sum(axis=0, dtype=jnp.int32)
    used = jnp.clip(tokens // WORTH_READING, 1, tables.replica_count)
    is_used = tables.replica_index < used.at[tables.slot_to_expert].get(mode="fill", fill_value=0)

    def of_rank(counts, rank):
        share = deal(counts, tables, used, tables.replica_index, rank)
        return jnp.where(is_used, share, 0)

    return jax.vmap(of_rank)(counts, jnp.arange(len(counts), dtype=jnp.int32))
