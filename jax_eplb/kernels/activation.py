"""Activations of expert feed-forwards, by the names that configurations use.

Axes: M rows, F expert hidden width. A gated activation reads the halves of a row of 2F values,
gate then up; an ungated one reads F values.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

_CLAMP = 7.0
_SIGMOID_SLOPE = 1.702


@dataclasses.dataclass(frozen=True)
class Activation:
    """`function(gate, up)` if gated, else `function(x)`; elementwise."""

    function: Callable[..., jax.Array]
    gated: bool

    def __call__(self, x: Float[Array, "M F or 2F"]) -> Float[Array, "M F"]:
        """Apply to whole rows, in float32 at least; the result has x's type."""
        parts = jnp.split(x, 2, axis=-1) if self.gated else [x]
        wide = jnp.float64 if x.dtype == jnp.float64 else jnp.float32
        return self.function(*(part.astype(wide) for part in parts)).astype(x.dtype)


def _sigmoid(x):
    # Written out, since kernels lower `exp` and division but not every function of jax.nn; of the
    # absolute value, so that neither it nor its derivative overflows.
    decay = jnp.exp(-jnp.abs(x))
    return jnp.where(x >= 0, 1.0, decay) / (1.0 + decay)


def _gelu_tanh(x):
    # x · sigmoid(2z) is x · (1 + tanh(z)) / 2.
    return x * _sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


def _swiglu(gate, up):
    return gate * _sigmoid(gate) * up


def _clamped_swiglu(gate, up):
    gate, up = jnp.minimum(gate, _CLAMP), jnp.clip(up, -_CLAMP, _CLAMP)
    return (up + 1.0) * gate * _sigmoid(_SIGMOID_SLOPE * gate)


def _geglu(gate, up):
    return _gelu_tanh(gate) * up


# swiglu: Mixtral, Qwen, DeepSeek. clamped_swiglu: gpt-oss. geglu and gelu: the tanh form of GELU.
ACTIVATIONS: dict[str, Activation] = {
    "swiglu": Activation(_swiglu, gated=True),
    "clamped_swiglu": Activation(_clamped_swiglu, gated=True),
    "geglu": Activation(_geglu, gated=True),
    "gelu": Activation(_gelu_tanh, gated=False),
}


def activation_named(name: str) -> Activation:
    """The activation of that name.

    >>> activation_named("swiglu")(jnp.array([[0.0, 5.0]])).tolist()
    [[0.0]]
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r}; use one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]
