"""`MoE`: the sharded Mixture-of-Experts layer as a Flax module.

A thin shell: it owns the arrays and their shardings; `moe_forward` does the work.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float

from jax_eplb.moe.config import MoEConfig
from jax_eplb.moe.experts import init_experts, lecun_normal
from jax_eplb.moe.feed_forward import ExpertWeights, SharedWeights
from jax_eplb.moe.forward import MoEOutput, MoEParams, moe_forward
from jax_eplb.moe.replica_gradients import tie_replicas
from jax_eplb.moe.sharding import MeshAxes, param_specs
from jax_eplb.moving import rebalance
from jax_eplb.placement import Placement
from jax_eplb.routing import update_selection_bias
from jax_eplb.tables import PlacementTables


class SlotTable(nnx.Variable):
    """A table of the placement: traced, never trained, equal on every device."""


class LoadCount(nnx.Variable):
    """Choices counted since the last reset."""


class SelectionBias(nnx.Variable):
    """The router's selection bias: moved by the load, not by a gradient."""


class MoE(nnx.Module):
    """A Mixture-of-Experts layer whose experts are spread over one axis of a mesh.

    Tokens are divided over the same axis, and over those of `data_axes`: each rank routes its own,
    and their rows travel to the ranks that hold the chosen experts. `tensor_axis` divides the
    experts' hidden width. A change of placement changes values, not shapes: nothing is compiled
    again, and the output stays the same bit for bit.

    >>> from jax_eplb import MoE, MoEConfig, expert_mesh
    >>> mesh = expert_mesh(num_ranks=1)
    >>> config = MoEConfig(embed_dim=8, hidden_dim=16, num_experts=4, experts_per_token=2,
    ...                    num_slots=4, num_ranks=1)
    >>> layer = MoE(config, mesh=mesh, rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((2, 3, 8))).shape, layer.expert_tokens[...].sum().item()
    ((2, 3, 8), 12)
    """

    slot_to_expert: SlotTable  # and the other tables of `PlacementTables`, by their names

    def __init__(
        self,
        config: MoEConfig,
        *,
        mesh: Mesh,
        rngs: nnx.Rngs,
        placement: Placement | None = None,
        axis_name: str = "expert",
        data_axes: tuple[str, ...] = (),
        tensor_axis: str | None = None,
        dtype=jnp.float32,
    ):
        self.config, self.mesh = config, mesh
        self.axes = MeshAxes(axis_name, tuple(data_axes), tensor_axis)
        self.axes.check(mesh, config)
        if placement is None:
            placement = Placement.default(
                num_experts=config.num_experts,
                num_slots=config.num_slots,
                num_ranks=config.num_ranks,
            )
        else:
            self._check(placement)
        for name, table in self._tables_of(placement)._asdict().items():
            setattr(self, name, SlotTable(table))
        embed, hidden, shared = config.embed_dim, config.hidden_dim, config.shared_hidden_dim
        parts = config.gate_up_dim // hidden  # gate and up, or up alone
        slots, everywhere = self.slot_to_expert[...], P()
        specs: Any = param_specs(config, self.axes)
        experts, one = specs.experts, specs.shared

        def bank(shape, spec):
            init = lecun_normal(shape[0], shape, dtype)
            weights = init_experts(rngs.params(), slots, init, mesh, spec)
            # What a program makes may not name an axis of one device, and moves go by the name.
            return nnx.Param(jax.device_put(weights, NamedSharding(mesh, spec)))

        def matrix(shape, dtype, spec=everywhere):
            weight = lecun_normal(shape[0], shape, dtype)(rngs.params())
            return nnx.Param(jax.device_put(weight, NamedSharding(mesh, spec)))

        def zeros(shape, dtype, spec=everywhere):
            return jax.device_put(jnp.zeros(shape, dtype), NamedSharding(mesh, spec))

        def bias(shape, spec):
            full = (config.num_slots, *shape)
            return None if spec is None else nnx.Param(zeros(full, dtype, spec))

        def by_expert(dtype):
            return zeros((config.num_experts,), dtype)

        self.router = matrix((embed, config.num_experts), jnp.float32)
        self.gate_up = bank((embed, parts, hidden), experts.gate_up)
        self.down = bank((hidden, embed), experts.down)
        self.gate_up_bias = bias((parts, hidden), experts.gate_up_bias)
        self.down_bias = bias((embed,), experts.down_bias)
        self.shared_gate_up = one and matrix((embed, parts, shared), dtype, one.gate_up)
        self.shared_down = one and matrix((shared, embed), dtype, one.down)
        self.shared_gate = matrix((embed, 1), dtype) if config.shared_gate else None
        logits_bias, selection_bias = config.router.logits_bias, config.router.selection_bias
        self.router_bias = nnx.Param(by_expert(jnp.float32)) if logits_bias else None
        self.selection_bias = SelectionBias(by_expert(jnp.float32)) if selection_bias else None
        self.expert_tokens = LoadCount(by_expert(jnp.int32))
        self.rank_tokens = LoadCount(zeros((config.num_ranks,), jnp.int32))

    def __call__(
        self, tokens: Float[Array, "... D"], mask: Bool[Array, "..."] | None = None
    ) -> Float[Array, "... D"]:
        """Apply the layer; the number of tokens must be divisible among the devices they go to.

        Padding (mask False) is neither computed nor counted. Adds to `expert_tokens` int32[E] and
        `rank_tokens` int32[P].
        """
        return self.forward(tokens, mask).tokens

    def forward(
        self, tokens: Float[Array, "... D"], mask: Bool[Array, "..."] | None = None
    ) -> MoEOutput:
        """As a call, with what training needs: `router_logits` [..., E], and this call's counts.

        `routing.load_balancing_loss` and its like make losses of them.
        """
        width = self.config.embed_dim
        if tokens.shape[-1] != width:
            raise ValueError(f"the tokens have shape {tokens.shape}; expected (..., {width})")
        if mask is not None and mask.shape != tokens.shape[:-1]:
            raise ValueError(f"the mask has shape {mask.shape}; expected {tokens.shape[:-1]}")
        flat = tokens.reshape(-1, width)
        flat_mask = jnp.ones(len(flat), bool) if mask is None else mask.reshape(-1)
        shares = math.prod(self.mesh.shape[axis] for axis in (*self.axes.data, self.axes.expert))
        if len(flat) % shares:
            raise ValueError(
                f"{len(flat)} tokens (of {tokens.shape}) cannot be divided among "
                f"{shares} ranks; pad them and give a mask"
            )
        output = _forward(
            self.params(),
            self.tables(),
            flat,
            flat_mask,
            config=self.config,
            mesh=self.mesh,
            axes=self.axes,
        )
        self.expert_tokens[...] += output.expert_tokens
        self.rank_tokens[...] += output.rank_tokens
        return output._replace(
            tokens=output.tokens.reshape(tokens.shape),
            router_logits=output.router_logits.reshape(*tokens.shape[:-1], -1),
        )

    def reset_counts(self) -> None:
        """Start counting anew."""
        self.expert_tokens[...] = jnp.zeros_like(self.expert_tokens[...])
        self.rank_tokens[...] = jnp.zeros_like(self.rank_tokens[...])

    def update_selection_bias(self, rate: float) -> None:
        """Make experts that got more than the mean since the last reset a little less likely.

        DeepSeek-V3's balancing without an auxiliary loss; call it after each step of training,
        then `reset_counts`. Raises ValueError where the router has no selection bias.
        """
        if self.selection_bias is None:
            raise ValueError("this router has no selection bias; set it in RouterConfig")
        bias = self.selection_bias[...]
        self.selection_bias[...] = update_selection_bias(bias, self.expert_tokens[...], rate)

    def use_placement(self, placement: Placement) -> None:
        """Move the experts to the slots of a one-layer placement; shapes stay what they are.

        Only slots that change move, from device to device. All or nothing: where the placement
        does not fit, ValueError, and all stays as it was. An optimiser's moments are not the
        layer's: `jax_eplb.rebalance` moves them, with a whole state of `nnx.split`.
        """
        self._check(placement)
        config = self.config
        here = Placement(
            self.slot_to_expert[...][None],
            config.num_experts,
            config.num_ranks,
            placement.layer_ids,
        )
        specs: Any = self.specs().experts
        banks = [
            (getattr(self, name), NamedSharding(self.mesh, spec))
            for name, spec in specs._asdict().items()
            if spec is not None
        ]
        moved = rebalance(
            # Nor may what a jitted step made name it.
            [jax.device_put(bank[...], sharding) for bank, sharding in banks],
            here,
            placement,
            axis_name=self.axes.expert,
            donate=False,  # others may hold these arrays
        )
        tables = self._tables_of(placement)
        for (bank, _), weights in zip(banks, moved, strict=True):
            bank[...] = weights
        for name, table in tables._asdict().items():
            getattr(self, name)[...] = table

    def params(self) -> MoEParams:
        """The parameters as `moe_forward` takes them, spread over the mesh as `specs` says."""

        def value(variable):
            return None if variable is None else variable[...]

        shared = None
        if self.shared_gate_up is not None and self.shared_down is not None:
            gate = value(self.shared_gate)
            shared = SharedWeights(self.shared_gate_up[...], self.shared_down[...], gate)
        return MoEParams(
            router=self.router[...],
            experts=ExpertWeights(
                self.gate_up[...],
                self.down[...],
                value(self.gate_up_bias),
                value(self.down_bias),
            ),
            shared=shared,
            router_bias=value(self.router_bias),
            selection_bias=value(self.selection_bias),
        )

    def tables(self) -> PlacementTables:
        """The placement's tables as `moe_forward` takes them, equal on every device."""
        return PlacementTables(*(getattr(self, name)[...] for name in PlacementTables._fields))

    def specs(self) -> MoEParams:
        """How `params` are spread over the mesh, for a `shard_map` of your own."""
        return param_specs(self.config, self.axes)

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
            may_be_empty=True,
        )

    def _tables_of(self, placement: Placement) -> PlacementTables:
        """The tables of the only layer, on every device."""
        tables = placement.tables(with_leveling=self.config.needs_leveling).of_layer(0)
        return jax.device_put(tables, NamedSharding(self.mesh, P()))


# Jitted, so that a call outside of `jit` is one program too.
@functools.partial(jax.jit, static_argnames=("config", "mesh", "axes"))
def _forward(params, tables, tokens, mask, *, config: MoEConfig, mesh: Mesh, axes: MeshAxes):
    """The output by token, and the counts of this call by expert and by rank, on every device."""
    everywhere: Any = P()

    def local(params, tables, tokens, mask):
        experts = tie_replicas(params.experts, tables, config.ranks(axes.expert))
        output = moe_forward(
            params._replace(experts=experts),
            tables,
            tokens,
            mask,
            config=config,
            axis_name=axes.expert,
            tensor_axis=axes.tensor,
        )
        expert_tokens = output.expert_tokens[None]
        return output._replace(expert_tokens=expert_tokens, rank_tokens=output.rank_tokens[None])

    output = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(param_specs(config, axes), everywhere, axes.tokens, axes.tokens),
        out_specs=axes.tokens,
    )(params, tables, tokens, mask)
    # Counts that came back spread over the ranks would compile the next call anew.
    expert_tokens, rank_tokens = jax.lax.with_sharding_constraint(
        (
            output.expert_tokens.sum(axis=0),
            output.rank_tokens.reshape(-1, config.num_ranks).sum(axis=0),
        ),
        NamedSharding(mesh, everywhere),
    )
    return output._replace(expert_tokens=expert_tokens, rank_tokens=rank_tokens)
