"""The feed-forward of experts: up (with a gate beside it), an activation, and down.

Axes: M rows, L layers, N slots of this rank, D embedding width, F expert hidden width; U = 2F for a
gated activation, whose gate and up stand side by side, F for one without a gate.
"""

from typing import NamedTuple

import jax
from jaxtyping import Array, Float, Int

from jax_eplb.kernels import activation_named, by_row_blocks, grouped_matmul


class ExpertWeights(NamedTuple):
    """Expert weights by slot; gate and up side by side, so that both are one product.

    With `layer`, the arrays are stacks of layers', of which that one is meant. So a scan over
    layers, for inference, reads weights where they are; a slice of a stack a GPU would copy first.
    """

    gate_up: Float[Array, "*L N D U"]
    down: Float[Array, "*L N F D"]
    gate_up_bias: Float[Array, "*L N U"] | None = None
    down_bias: Float[Array, "*L N D"] | None = None
    layer: Int[Array, ""] | None = None


class SharedWeights(NamedTuple):
    """The weights of the expert that serves every token."""

    gate_up: Float[Array, "D U"]
    down: Float[Array, "F D"]
    gate: Float[Array, "D 1"] | None = None  # how much it counts, through a sigmoid (Qwen2-MoE)


def expert_feed_forward(
    rows: Float[Array, "M D"],
    weights: ExpertWeights,
    group_sizes: Int[Array, "N"],
    *,
    activation: str = "swiglu",
    kernel: str | None = None,
) -> Float[Array, "M D"]:
    """Each row, sorted by slot, through its slot's expert; zero past the groups' sum."""
    hidden = grouped_matmul(
        rows,
        weights.gate_up,
        group_sizes,
        bias=weights.gate_up_bias,
        layer=weights.layer,
        activation=activation,
        implementation=kernel,
    )
    return grouped_matmul(
        hidden,
        weights.down,
        group_sizes,
        bias=weights.down_bias,
        layer=weights.layer,
        implementation=kernel,
    )


def shared_feed_forward(
    tokens: Float[Array, "T D"], weights: SharedWeights, *, activation: str = "swiglu"
) -> Float[Array, "T D"]:
    """Every token through the same expert."""
    activate = activation_named(activation)
    gate_up = weights.gate_up.reshape(len(weights.gate_up), -1)  # [D, 2, F] is as good

    def serve(rows):
        out = activate(rows @ gate_up) @ weights.down
        return out if weights.gate is None else jax.nn.sigmoid(rows @ weights.gate) * out

    return by_row_blocks(serve, tokens)
