"""The gated feed-forward of experts: silu(x · gate) · (x · up), then down (SwiGLU).

Axes: M rows, N slots of this rank, D embedding width, F expert hidden width.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jax_eplb.kernels import by_row_blocks, grouped_matmul


class ExpertWeights(NamedTuple):
    """Expert weights by slot; gate and up side by side, so that both are one product."""

    gate_up: Float[Array, "N D 2F"]
    down: Float[Array, "N F D"]


class SharedWeights(NamedTuple):
    """The weights of the expert that serves every token."""

    gate_up: Float[Array, "D 2F"]
    down: Float[Array, "F D"]


def _gate(gate_up: Float[Array, "M 2F"]) -> Float[Array, "M F"]:
    gate, up = jnp.split(gate_up, 2, axis=-1)
    return jax.nn.silu(gate) * up


def expert_feed_forward(
    rows: Float[Array, "M D"],
    weights: ExpertWeights,
    group_sizes: Int[Array, "N"],
    *,
    kernel: str | None = None,
) -> Float[Array, "M D"]:
    """Each row, sorted by slot, through its slot's expert; zero past the groups' sum."""
    gate_up = grouped_matmul(rows, weights.gate_up, group_sizes, implementation=kernel)
    return grouped_matmul(_gate(gate_up), weights.down, group_sizes, implementation=kernel)


def shared_feed_forward(rows: Float[Array, "M D"], weights: SharedWeights) -> Float[Array, "M D"]:
    """Every row through the shared expert."""
    return by_row_blocks(lambda block: _gate(block @ weights.gate_up) @ weights.down, rows)
