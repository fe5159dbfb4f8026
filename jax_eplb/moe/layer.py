"""`MoE`: the sharded Mixture-of-Experts layer as a Flax module.

A thin shell: it owns the arrays and their shardings; `moe_forward` does the work.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float

from jax_eplb.moe.config import MoEConfig
from jax_eplb.moe.experts import experts_in_order, init_experts, lecun_normal, place_experts
from jax_eplb.moe.feed_forward import ExpertWeights, SharedWeights
from jax_eplb.moe.forward import LayerTables, MoEParams, moe_forward
from jax_eplb.placement import Placement


class SlotTable(nnx.Variable):
    """A table of the placement: traced, never trained, equal on every device."""


class LoadCount(nnx.Variable):
    """Choices counted since the last reset."""


class MoE(nnx.Module):
    """A Mixture-of-Experts layer whose experts are spread over one axis of a mesh.

    Tokens are divided over the same axis: each rank routes its own, and their rows travel to the
    ranks that hold the chosen experts. A change of placement changes values, not shapes: nothing
    is compiled again, and the output stays the same bit for bit.

    >>> from jax_eplb import MoE, MoEConfig, expert_mesh
    >>> mesh = expert_mesh(num_ranks=1)
    >>> config = MoEConfig(embed_dim=8, hidden_dim=16, num_experts=4, experts_per_token=2,
    ...                    num_slots=4, num_ranks=1)
    >>> layer = MoE(config, mesh=mesh, rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((2, 3, 8))).shape, layer.expert_tokens[...].sum().item()
    ((2, 3, 8), 12)
    """

    def __init__(
        self,
        config: MoEConfig,
        *,
        mesh: Mesh,
        rngs: nnx.Rngs,
        placement: Placement | None = None,
        axis_name: str = "expert",
        dtype=jnp.float32,
    ):
        if mesh.shape.get(axis_name) != config.num_ranks:
            raise ValueError(
                f"the mesh {dict(mesh.shape)} must have an axis {axis_name!r} of "
                f"{config.num_ranks} devices, the config's num_ranks"
            )
        self.config, self.mesh, self.axis_name = config, mesh, axis_name
        if placement is None:
            placement = Placement.default(
                num_experts=config.num_experts,
                num_slots=config.num_slots,
                num_ranks=config.num_ranks,
            )
        else:
            self._check(placement)
        tables = self._tables_of(placement)
        self.slot_to_expert, self.expert_to_slots, self.replica_count = map(SlotTable, tables)
        embed, hidden, shared = config.embed_dim, config.hidden_dim, config.shared_hidden_dim
        slots = self.slot_to_expert[...]

        def bank(shape):
            init = lecun_normal(shape[0], shape, dtype)
            return nnx.Param(init_experts(rngs.params(), slots, init, mesh, axis_name))

        def replicated(shape, dtype):
            weight = lecun_normal(shape[0], shape, dtype)(rngs.params())
            return nnx.Param(jax.device_put(weight, NamedSharding(mesh, P())))

        self.router = replicated((embed, config.num_experts), jnp.float32)
        self.gate_up = bank((embed, 2 * hidden))
        self.down = bank((hidden, embed))
        self.shared_gate_up = replicated((embed, 2 * shared), dtype) if shared else None
        self.shared_down = replicated((shared, embed), dtype) if shared else None
        counts = jnp.zeros(config.num_experts, jnp.int32)
        self.expert_tokens = LoadCount(jax.device_put(counts, NamedSharding(mesh, P())))
        ranks = jnp.zeros(config.num_ranks, jnp.int32)
        self.rank_tokens = LoadCount(jax.device_put(ranks, NamedSharding(mesh, P())))

    def __call__(
        self, tokens: Float[Array, "... D"], mask: Bool[Array, "..."] | None = None
    ) -> Float[Array, "... D"]:
        """Apply the layer; the number of tokens must be divisible by the number of ranks.

        Padding (mask False) is neither computed nor counted. Adds to `expert_tokens` int32[E] and
        `rank_tokens` int32[P].
        """
        width = self.config.embed_dim
        if tokens.shape[-1] != width:
            raise ValueError(f"the tokens have shape {tokens.shape}; expected (..., {width})")
        if mask is not None and mask.shape != tokens.shape[:-1]:
            raise ValueError(f"the mask has shape {mask.shape}; expected {tokens.shape[:-1]}")
        flat = tokens.reshape(-1, width)
        flat_mask = jnp.ones(len(flat), bool) if mask is None else mask.reshape(-1)
        if len(flat) % self.config.num_ranks:
            raise ValueError(
                f"{len(flat)} tokens (of {tokens.shape}) cannot be divided among "
                f"{self.config.num_ranks} ranks; pad them and give a mask"
            )
        tables = LayerTables(self.expert_to_slots[...], self.replica_count[...])
        out, expert_tokens, rank_tokens = _forward(
            self._params(),
            tables,
            flat,
            flat_mask,
            config=self.config,
            mesh=self.mesh,
            axis_name=self.axis_name,
        )
        self.expert_tokens[...] += expert_tokens
        self.rank_tokens[...] += rank_tokens
        return out.reshape(tokens.shape)

    def reset_counts(self) -> None:
        """Start counting anew."""
        self.expert_tokens[...] = jnp.zeros_like(self.expert_tokens[...])
        self.rank_tokens[...] = jnp.zeros_like(self.rank_tokens[...])

    def use_placement(self, placement: Placement) -> None:
        """Move the experts to the slots of a one-layer placement; shapes stay what they are.

        All or nothing: where the placement does not fit, ValueError, and all stays as it was.
        """
        self._check(placement)
        here = np.asarray(self.slot_to_expert[...])
        there = np.asarray(placement.slot_to_expert)[0]
        banks = (self.gate_up, self.down)
        moved = [
            place_experts(
                experts_in_order(bank[...], here, self.config.num_experts),
                there,
                bank[...].sharding,
            )
            for bank in banks
        ]
        tables = self._tables_of(placement)
        for bank, weights in zip(banks, moved, strict=True):
            bank[...] = weights
        self.slot_to_expert[...], self.expert_to_slots[...], self.replica_count[...] = tables

    def _check(self, placement: Placement) -> None:
        config = self.config
        given = (placement.num_layers, placement.num_experts)
        given += (placement.num_slots, placement.num_ranks)
        expected = (1, config.num_experts, config.num_slots, config.num_ranks)
        if given != expected:
            raise ValueError(
                f"the placement has (layers, experts, slots, ranks) {given}; this layer needs "
                f"{expected}"
            )
        Placement.from_slots(
            placement.slot_to_expert,
            num_experts=config.num_experts,
            num_ranks=config.num_ranks,
            layer_ids=placement.layer_ids,
        )

    def _tables_of(self, placement: Placement) -> tuple[Array, Array, Array]:
        """`slot_to_expert`, `expert_to_slots` and `replica_count`, on every device."""
        derived = placement.tables()
        tables = (placement.slot_to_expert, derived.expert_to_slots, derived.replica_count)
        first, second, third = (table[0] for table in tables)
        return jax.device_put((first, second, third), NamedSharding(self.mesh, P()))

    def _params(self) -> MoEParams:
        shared = None
        if self.shared_gate_up is not None and self.shared_down is not None:
            shared = SharedWeights(self.shared_gate_up[...], self.shared_down[...])
        experts = ExpertWeights(self.gate_up[...], self.down[...])
        return MoEParams(self.router[...], experts, shared)


# Jitted, so that a call outside of `jit` is one program too.
@functools.partial(jax.jit, static_argnames=("config", "mesh", "axis_name"))
def _forward(params, tables, tokens, mask, *, config: MoEConfig, mesh: Mesh, axis_name: str):
    """The tokens, and the counts of this call by expert and by rank, equal on every device."""
    axis: Any = P(axis_name)
    everywhere: Any = P()

    def local(params, tables, tokens, mask):
        output = moe_forward(params, tables, tokens, mask, config=config, axis_name=axis_name)
        return output.tokens, output.expert_tokens[None], output.rank_tokens[None]

    forward = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(MoEParams(everywhere, axis, everywhere), everywhere, axis, axis),
        out_specs=axis,
    )
    out, expert_tokens, rank_tokens = forward(params, tables, tokens, mask)
    # Counts that came back spread over the ranks would compile the next call anew.
    counts = jax.lax.with_sharding_constraint(
        (expert_tokens.sum(axis=0), rank_tokens), NamedSharding(mesh, everywhere)
    )
    return out, *counts
