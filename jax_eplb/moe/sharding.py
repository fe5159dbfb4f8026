"""How a layer is spread over a mesh: experts, batches, and perhaps the experts' hidden width."""

from typing import Any, NamedTuple

from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jax_eplb.moe.config import MoEConfig
from jax_eplb.moe.feed_forward import ExpertWeights, SharedWeights
from jax_eplb.moe.forward import MoEParams


class MeshAxes(NamedTuple):
    """The axes of the mesh that the layer uses; static."""

    expert: str = "expert"
    data: tuple[str, ...] = ()  # batches side by side, each with all experts
    tensor: str | None = None  # the experts' hidden width in parts

    @property
    def tokens(self) -> Any:
        """How tokens are divided."""
        return P((*self.data, self.expert))

    def check(self, mesh: Mesh, config: MoEConfig) -> None:
        """Raise ValueError unless the mesh has these axes, and the config's sizes fit them."""
        shape = dict(mesh.shape)
        if shape.get(self.expert) != config.num_ranks:
            raise ValueError(
                f"the mesh {shape} must have an axis {self.expert!r} of "
                f"{config.num_ranks} devices, the config's num_ranks"
            )
        used = [self.expert, *self.data, *([] if self.tensor is None else [self.tensor])]
        for axis in used:
            if axis not in shape or used.count(axis) > 1:
                raise ValueError(
                    f"the layer uses the mesh axes {used}; each must be one of the mesh, {shape}, "
                    "and stand once"
                )
        if self.tensor is None:
            return
        parts = shape[self.tensor]
        for name in ("hidden_dim", "shared_hidden_dim"):
            if getattr(config, name) % parts:
                raise ValueError(
                    f"{name} is {getattr(config, name)}; it cannot be divided among the {parts} "
                    f"devices of {self.tensor!r}"
                )


def param_specs(config: MoEConfig, axes: MeshAxes) -> MoEParams:
    """How each parameter of a layer is spread over the mesh."""

    def spread(*names: str | None) -> Any:  # where MoEParams has an array
        return P(*names)

    everywhere, expert, tensor = spread(), axes.expert, axes.tensor
    biases = (spread(expert, None, tensor), spread(expert)) if config.expert_biases else ()
    shared = None
    if config.shared_hidden_dim:
        gate = everywhere if config.shared_gate else None
        shared = SharedWeights(spread(None, None, tensor), spread(tensor), gate)
    return MoEParams(
        router=everywhere,
        experts=ExpertWeights(spread(expert, None, None, tensor), spread(expert, tensor), *biases),
        shared=shared,
        router_bias=everywhere if config.router.logits_bias else None,
        selection_bias=everywhere if config.router.selection_bias else None,
    )
