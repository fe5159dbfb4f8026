"""The grouped matrix product: sorted rows, each times the weights of its group.

Axes: M rows sorted by group, L layers, G groups, D in, F out.
Rows past the sum of the group sizes are padding: their results are zero and so are their
gradients. A row's result depends on the row and its group's weights alone, bit for bit, in every
implementation but `ragged_dot` and `reference`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jax_eplb.kernels.activation import activation_named
from jax_eplb.kernels.blocked import blocked
from jax_eplb.kernels.groups import group_of_rows
from jax_eplb.kernels.mosaic import mosaic, unsupported
from jax_eplb.kernels.ragged import ragged_dot
from jax_eplb.kernels.reference import reference
from jax_eplb.kernels.stack import layer_of
from jax_eplb.kernels.triton import triton

# (rows [M, D], weights [L, G, D, F], group_sizes [G], layer) -> [M, F].
IMPLEMENTATIONS: dict[str, Callable] = {
    "reference": reference,
    "blocked": blocked,
    "mosaic": mosaic,
    "triton": triton,
    "ragged_dot": ragged_dot,
}


def grouped_matmul(
    rows: Float[Array, "M D"],
    weights: Float[Array, "*L G D F"],
    group_sizes: Int[Array, "G"],
    *,
    bias: Float[Array, "*L G F"] | None = None,
    layer: Int[Array, ""] | None = None,
    activation: str | None = None,
    implementation: str | None = None,
) -> Float[Array, "M F"]:
    """Multiply each row with its group's weights; differentiable in rows, weights and bias.

    `activation` is a name of `ACTIVATIONS`, applied after the bias; a gated one reads gate and up
    from weights [G, D, 2F], gate first, and leaves F values a row. `implementation` is a name of
    `IMPLEMENTATIONS`, or None for the best one on the backend that the program is lowered for.

    With `layer`, weights and bias are stacks of layers', of which that one is meant. Kernels read
    it where it is; a slice of the stack, used in a loop or a branch, XLA would copy first.

    >>> rows, weights = jax.numpy.ones((3, 2)), jax.numpy.array([[[1.0], [1.0]], [[2.0], [3.0]]])
    >>> grouped_matmul(rows, weights, jax.numpy.array([1, 1])).tolist()
    [[2.0], [5.0], [0.0]]
    """
    if activation is not None:
        activation_named(activation)
    if layer is None:
        weights, layer = weights[None], jnp.int32(0)
    elif bias is not None:
        bias = layer_of(bias, layer)
    biases = () if bias is None else (bias,)

    def run(product) -> Any:
        def whole(rows, weights, group_sizes, layer, *biases):
            if product is mosaic and not biases:  # it applies the activation in the kernel
                return mosaic(rows, weights, group_sizes, layer, activation)
            out = product(rows, weights, group_sizes, layer)
            for bias in biases:
                out = out + _bias_of_rows(bias, out, group_sizes)
            return out if activation is None else activation_named(activation)(out)

        return whole

    operands = rows, weights, group_sizes, jnp.asarray(layer, jnp.int32), *biases
    if implementation is not None:
        check_implementation(implementation)
        return run(IMPLEMENTATIONS[implementation])(*operands)
    branches: dict[str, Any] = {"cpu": run(blocked), "default": run(ragged_dot)}
    if jax.default_backend() == "gpu":  # else there is no device to ask what it can do
        fits = unsupported(rows, weights, activation if bias is None else None) is None
        branches["cuda"] = run(mosaic if fits and _is_hopper() else triton)
    return jax.lax.platform_dependent(*operands, **branches)


def check_implementation(name: str) -> None:
    """Raise ValueError unless `name` is one of `IMPLEMENTATIONS`."""
    if name not in IMPLEMENTATIONS:
        known = ", ".join(sorted(IMPLEMENTATIONS))
        raise ValueError(f"unknown grouped_matmul implementation {name!r}; use one of {known}")


def _is_hopper() -> bool:
    return getattr(jax.devices()[0], "compute_capability", None) == "9.0"


def _bias_of_rows(bias, out, group_sizes):
    """Each row's bias; zero for padding, so that its gradient is zero too."""
    group = group_of_rows(len(out), group_sizes)
    return bias.astype(out.dtype).at[group].get(mode="fill", fill_value=0)
