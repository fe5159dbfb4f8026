"""The kernels for Hopper GPUs on machines that have none: lowered, and interpreted if JAX can."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import PartitionSpec as P

from jax_eplb import expert_mesh
from jax_eplb.kernels import ACTIVATIONS, grouped_matmul
from jax_eplb.kernels.mosaic import _tiles, mosaic
from jax_eplb.kernels.mosaic_gradient import mosaic_weight_gradient
from jax_eplb.kernels.mosaic_kernel import mosaic_product
from jax_eplb.kernels.mosaic_tiles import Tiles

pytestmark = pytest.mark.light_compile

SIZES = (30, 0, 150)


def shapes(num_rows=1024, groups=8, depth=128, width=512):
    bfloat16 = jnp.bfloat16
    return (
        jax.ShapeDtypeStruct((num_rows, depth), bfloat16),
        jax.ShapeDtypeStruct((1, groups, depth, width), bfloat16),
        jax.ShapeDtypeStruct((1, groups, width // 2, depth), bfloat16),
        jax.ShapeDtypeStruct((groups,), jnp.int32),
    )


def feed_forward(rows, up, down, sizes):
    layer = jnp.int32(0)
    return mosaic(mosaic(rows, up, sizes, layer, "swiglu"), down, sizes, layer)


def kernels_in(function, *arguments):
    lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",))
    return lowered.as_text().count("stablehlo.custom_call @mosaic_gpu")


@pytest.mark.slow
def test_a_feed_forward_is_two_kernels():
    assert kernels_in(feed_forward, *shapes()) == 2


@pytest.mark.slow
def test_its_gradient_writes_out_what_enters_the_activation_and_takes_six():
    def loss(*arguments):
        return feed_forward(*arguments).astype(jnp.float32).sum()

    assert kernels_in(jax.value_and_grad(loss, argnums=(0, 1, 2)), *shapes()) == 6


@pytest.mark.slow
def test_it_can_stand_in_shard_map_in_scan_and_be_differentiated_there():
    def scanned(rows, up, down, sizes):
        def layer(rows, _):
            return feed_forward(rows, up, down, sizes), None

        return jax.lax.scan(layer, rows, None, length=3)[0]

    def local(rows, *rest):
        out, transpose = jax.vjp(lambda rows: scanned(rows, *rest), rows)
        return transpose(out)[0]

    split = P("expert")
    run = jax.shard_map(local, mesh=expert_mesh(1), in_specs=(split,) * 4, out_specs=split)
    assert kernels_in(run, *shapes()) > 0


@pytest.mark.parametrize(
    ("rows", "weights", "activation", "message"),
    [
        ((8, 64, jnp.float32), (2, 64, 64, jnp.float32), None, "bfloat16, not float32 and float32"),
        ((8, 64, jnp.bfloat16), (2, 64, 64, jnp.float16), None, "not bfloat16 and float16"),
        ((8, 96, jnp.bfloat16), (2, 96, 64, jnp.bfloat16), None, "multiples of 64, not 96 and 64"),
        ((8, 64, jnp.bfloat16), (2, 64, 64, jnp.bfloat16), "swiglu", "second), not 64 and 32"),
        ((0, 64, jnp.bfloat16), (2, 64, 64, jnp.bfloat16), None, "at least one row"),
    ],
)
def test_what_it_cannot_take_is_refused_with_what_it_takes(rows, weights, activation, message):
    with pytest.raises(ValueError, match=message.replace(")", r"\)")):
        grouped_matmul(
            jnp.zeros(rows[:2], rows[2]),
            jnp.zeros(weights[:3], weights[3]),
            jnp.zeros(2, jnp.int32),
            activation=activation,
            implementation="mosaic",
        )


@pytest.mark.parametrize(
    ("num_rows", "num_groups", "depth", "width", "gated", "block"),
    [
        (1024, 36, 7168, 2048, False, (64, 256, False)),  # 28 rows a group
        (32768, 36, 7168, 2048, False, (128, 256, True)),  # 17 rounds of 256 columns, or 23 of 192
        (32768, 128, 768, 2048, False, (128, 256, False)),  # small weights are not worth sharing
        (2048, 9, 7168, 2048, False, (128, 192, True)),  # two rounds of either
        (2048, 9, 7168, 4096, True, (128, 256, True)),  # gate and up need halves of 64
    ],
)
def test_tiles_are_short_for_few_rows_narrow_where_rounds_would_be_half_empty_and_shared_if_large(
    num_rows, num_groups, depth, width, gated, block
):
    tiles = _tiles(num_rows, num_groups, depth, width, gated, num_blocks=132)
    assert (tiles.block_m, tiles.block_n, tiles.pair) == block


def interpreted(*, detect_races: bool):
    if jax.default_backend() == "gpu":
        return contextlib.nullcontext()
    return plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=detect_races))


can_interpret = pytest.mark.skipif(
    not hasattr(plgpu, "force_gpu_interpret_mode"), reason="JAX before 0.11 cannot interpret them"
)


def drawn(width):
    generator = np.random.default_rng(0)
    num_rows = sum(SIZES) + 70  # of padding
    shapes = (num_rows, 64), (len(SIZES), 64, width), (num_rows, width)
    return [jnp.asarray(generator.normal(size=shape), jnp.bfloat16) for shape in shapes]


def assert_close(found, exact):
    error = np.linalg.norm(np.asarray(found, np.float32) - exact)
    assert error < 0.005 * np.linalg.norm(exact)


def each_group():
    """The rows of each group, and its number."""
    for group, (end, size) in enumerate(zip(np.cumsum(SIZES), SIZES, strict=True)):
        yield slice(end - size, end), group


@pytest.mark.slow
@can_interpret
@pytest.mark.parametrize(
    ("tiles", "width"),
    [
        (Tiles(64), 64),
        (Tiles(64), 384),
        (Tiles(128), 192),
        (Tiles(128, pair=True), 384),
        (Tiles(128, 192, pair=True), 320),
    ],
    ids=["one", "short", "tall", "pair", "narrow pair"],
)
def test_interpreted_the_products_are_numpys(tiles, width):
    rows, weights, grad = drawn(width)
    sizes = jnp.array(SIZES, jnp.int32)
    stack, layer = jnp.stack([jnp.full_like(weights, jnp.nan), weights]), jnp.int32(1)
    gated = {"activation": ACTIVATIONS["swiglu"].function, "gated": True}
    # Without its detector of races, which takes the parts of a `RefUnion` for one.
    with interpreted(detect_races=False):
        run = functools.partial(mosaic_product, tiles=tiles, num_blocks=2)
        found = run(rows, stack, sizes, layer)
        transposed = run(grad, stack, sizes, layer, transpose_weights=True)
        activated = run(rows, stack, sizes, layer, **gated) if width % 128 == 0 else None
    rows, weights, grad = (np.asarray(x, np.float32) for x in (rows, weights, grad))
    product, grad_rows = np.zeros_like(grad), np.zeros_like(rows)
    for own, group in each_group():
        product[own] = rows[own] @ weights[group]
        grad_rows[own] = grad[own] @ weights[group].T
    assert_close(found, product)
    assert_close(transposed, grad_rows)
    if activated is not None:
        assert_close(activated, ACTIVATIONS["swiglu"](jnp.asarray(product)))


@pytest.mark.slow
@can_interpret
@pytest.mark.parametrize("width", [64, 384])
def test_interpreted_the_gradient_of_the_weights_is_numpys(width):
    rows, weights, grad = drawn(width)
    with interpreted(detect_races=True):
        found = mosaic_weight_gradient(rows, grad, jnp.array(SIZES, jnp.int32), num_blocks=2)
    rows, grad = (np.asarray(x, np.float32) for x in (rows, grad))
    exact = np.zeros(weights.shape, np.float32)
    for own, group in each_group():
        exact[group] = rows[own].T @ grad[own]
    assert_close(found, exact)
