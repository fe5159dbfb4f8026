"""The router's product, of tokens with float32 weights, as exact as float32 allows.

Axes: T tokens, D embedding width, E experts.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jax_eplb.kernels.row_blocks import by_row_blocks
from jax_eplb.kernels.varying import equally_varying

_MANY = 1024  # tokens, from which on half the products are worth a launch more
_DEEPEST = 1024  # features whose products are added up by tensor cores alone


def logits(tokens: Float[Array, "T D"], router: Float[Array, "D E"]) -> Float[Array, "T E"]:
    """`tokens @ router` in float32: the router decides by small differences.

    And not in the TF32 that a GPU would make of it. NVIDIA GPUs since the A100 multiply bfloat16
    tokens with bfloat16 parts of the weights, which is exact but for the sums. With few tokens
    the result is closer to float64 than products of float32 are; with many it is as close, and on
    an H100 takes a third of their time or less.

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
    many = len(tokens) >= _MANY and _pieces(len(router)) is not None
    by_parts = in_three_products if many else in_parts
    return lax.platform_dependent(*arrays, cuda=by_parts, default=in_full)


def in_parts(tokens, router):
    """Three parts make a float32 number; XLA multiplies all that matter and adds the products."""
    precision = lax.DotAlgorithmPreset.BF16_BF16_F32_X6
    return lax.dot(tokens.astype(jnp.float32), router, precision=precision)


@jax.custom_vjp
def in_three_products(
    tokens: Float[Array, "T D"], router: Float[Array, "D E"]
) -> Float[Array, "T E"]:
    """The same with half the products, as tokens of bfloat16 have no smaller parts.

    Tensor cores round each sum towards zero, so they add up 1,024 products at most. Raises
    ValueError where the depth does not divide into such pieces.
    """
    depth, num_experts = router.shape
    if (pieces := _pieces(depth)) is None:
        raise ValueError(f"{depth} features have no divisor that leaves at most {_DEEPEST} of them")
    # Not by conversions, there and back: XLA leaves those out.
    large = lax.reduce_precision(router, 8, 7)
    middle = lax.reduce_precision(router - large, 8, 7)
    parts = jnp.stack([router - large - middle, middle, large], axis=1).astype(jnp.bfloat16)
    sums = jnp.einsum(
        "tpd,pde->pte",
        tokens.reshape(-1, pieces, depth // pieces),
        parts.reshape(pieces, depth // pieces, 3 * num_experts),
        preferred_element_type=jnp.float32,
    )
    return sums.reshape(pieces, -1, 3, num_experts).sum(axis=(0, 2))


def _forward(tokens, router):
    return in_three_products(tokens, router), (tokens, router)


def _backward(residuals, grad):
    return jax.vjp(in_parts, *residuals)[1](grad)


in_three_products.defvjp(_forward, _backward)


def _pieces(depth: int) -> int | None:
    """The fewest equal pieces of at most 1,024 features, a multiple of 8.

    >>> _pieces(7168), _pieces(2880), _pieces(1031)
    (7, 3, None)
    """
    fewest = -(-depth // _DEEPEST)
    possible = (n for n in range(fewest, 2 * fewest) if depth % (8 * n) == 0)
    return next(possible, None)


def _multiplies_bfloat16() -> bool:
    if jax.default_backend() != "gpu":
        return False
    capability = str(getattr(jax.devices()[0], "compute_capability", ""))  # "9.0" of an H100
    generation = capability.split(".")[0]
    return generation.isdecimal() and int(generation) >= 8
