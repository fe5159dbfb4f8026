"""The router's product, of tokens with float32 weights, as exact as float32 allows.

Axes: T tokens, D embedding width, E experts.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jax_eplb.kernels.row_blocks import by_row_blocks
from jax_eplb.kernels.varying import equally_varying


def logits(tokens: Float[Array, "T D"], router: Float[Array, "D E"]) -> Float[Array, "T E"]:
    """`tokens @ router` in float32: the router decides by small differences.

    And not in the TF32 that a GPU would make of it. NVIDIA GPUs since the A100 multiply bfloat16
    tokens with bfloat16 parts of the weights, which is exact but for the sums: on an H100 closer
    to float64 than products of float32 are, and with many tokens in two thirds of their time.

    >>> logits(jnp.array([[1.0, 2.0]], jnp.bfloat16), jnp.array([[1.0], [0.25]])).tolist()
    [[1.5]]
    """

    def in_full(tokens, router):
        def product(rows):
            return jnp.matmul(rows.astype(jnp.float32), router, precision="highest")

        return by_row_blocks(product, tokens)

    # XLA makes a product with a vector of its own, which leaves the smaller parts out.
    of_vector = 1 in (tokens.shape[0], router.shape[1])
    if tokens.dtype != jnp.bfloat16 or of_vector or not _multiplies_bfloat16():
        return in_full(tokens, router)
    arrays = equally_varying((tokens, router))
    return lax.platform_dependent(*arrays, cuda=in_parts, default=in_full)


def in_parts(tokens, router):
    """Three parts make a float32 number; XLA multiplies all that matter and adds the products."""
    precision = lax.DotAlgorithmPreset.BF16_BF16_F32_X6
    return lax.dot(tokens.astype(jnp.float32), router, precision=precision)


def _multiplies_bfloat16() -> bool:
    if jax.default_backend() != "gpu":
        return False
    capability = str(getattr(jax.devices()[0], "compute_capability", ""))  # "9.0" of an H100
    generation = capability.split(".")[0]
    return generation.isdecimal() and int(generation) >= 8
