"""One step of serving on all ranks, compiled once for each width of prompts.

Each rank serves its own sequences while the experts are spread over all ranks. Axes: P ranks,
B rows (sequences) of a rank's step, T tokens of a row, L MoE layers, E experts.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int

from jax_eplb.mesh import one_process
from jax_eplb.models import Cache, DecoderConfig, DecoderParams, decode, parameters
from jax_eplb.models.decoder import Batch, logits_of
from jax_eplb.moe import MoEConfig
from jax_eplb.tables import PlacementTables

AXIS = "expert"


class State(NamedTuple):
    """What stays on the device between steps."""

    cache: Cache
    last_tokens: Int[Array, "P*B"]  # by seat


class Rows(NamedTuple):
    """A rank's rows in one step. `run_step` gets those of all, [P·B], as one array [4, P·B]."""

    positions: Int[Array, "B"]
    lengths: Int[Array, "B"]
    seats: Int[Array, "B"]
    seeds: Int[Array, "B"]


class Statics(NamedTuple):
    """What a compiled step is specialised to."""

    config: DecoderConfig
    moe: MoEConfig
    mesh: Mesh


# Compiled for its sizes, whichever engine calls: another engine of the same sizes compiles nothing.
@functools.partial(jax.jit, static_argnames="statics", donate_argnames="state")
def run_step(
    statics: Statics,
    params: DecoderParams,
    tables: PlacementTables,
    state: State,
    prompts: Int[Array, "P*B T"] | None,  # None: each seat's last token
    rows: Int[Array, "4 P*B"],  # as `Rows` has them
    temperature,
):
    """One iteration on all ranks: the new state, the next tokens [P·B], and both counts.

    The counts are int32[1, L, E], of all ranks, and int32[P, L], the same on every device, so that
    the host reads them from one. Over several processes each gets all tokens, too.
    """
    rank: Any = P(AXIS)
    second: Any = P(None, AXIS)
    state_specs = State(Cache(second, second), rank)
    run = jax.shard_map(
        functools.partial(_local_step, statics),
        mesh=statics.mesh,
        in_specs=(
            parameters.specs(statics.config, AXIS),
            P(),
            state_specs,
            None if prompts is None else rank,
            second,
            P(),
        ),
        out_specs=(state_specs, rank, P(), P()),
    )
    state, next_tokens, *counts = run(params, tables, state, prompts, rows, temperature)
    if not one_process(statics.mesh):
        everywhere = NamedSharding(statics.mesh, P())
        next_tokens = jax.lax.with_sharding_constraint(next_tokens, everywhere)
    return state, next_tokens, *counts


def _local_step(statics, params, tables, state, prompts, rows, temperature):
    """This rank's part of a step."""
    rows = Rows(*rows)
    tokens = state.last_tokens[rows.seats][:, None] if prompts is None else prompts
    offsets = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    batch = Batch(
        tokens=tokens,
        positions=rows.positions[:, None] + offsets,
        valid=offsets < rows.lengths[:, None],
        seats=rows.seats,
    )
    output = decode(
        params,
        tables,
        batch,
        state.cache,
        config=statics.config,
        moe=statics.moe,
        axis_name=AXIS,
    )
    last = jnp.maximum(rows.lengths - 1, 0)
    hidden = jnp.take_along_axis(output.hidden, last[:, None, None], axis=1)[:, 0]
    logits = logits_of(hidden, params)
    next_tokens = _sample(logits, rows, temperature)
    # A row without a sequence writes nowhere.
    seats = jnp.where(rows.lengths > 0, rows.seats, state.last_tokens.shape[0])
    last_tokens = state.last_tokens.at[seats].set(next_tokens, mode="drop")
    state = state._replace(cache=output.cache, last_tokens=last_tokens)
    own = jnp.zeros((statics.moe.num_ranks, output.rank_tokens.size), jnp.int32)
    own = own.at[jax.lax.axis_index(AXIS)].set(output.rank_tokens)
    expert_tokens, rank_tokens = jax.lax.psum((output.expert_tokens, own), AXIS)
    return state, next_tokens, expert_tokens[None], rank_tokens


def _sample(logits, rows: Rows, temperature) -> Int[Array, "B"]:
    """The token with the largest logit plus temperature times Gumbel noise.

    The noise depends on the request's seed and the position alone, so that a request gets the
    same tokens wherever and with whomever it runs.
    """

    def noise(seed, position):
        key = jax.random.fold_in(jax.random.key(seed), position)
        return jax.random.gumbel(key, logits.shape[1:], jnp.float32)

    gumbel = jax.vmap(noise)(rows.seeds, rows.positions + rows.lengths)
    return (logits + temperature * gumbel).argmax(axis=-1).astype(jnp.int32)
