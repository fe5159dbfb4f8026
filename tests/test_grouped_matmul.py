import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jax_eplb.kernels import ACTIVATIONS, IMPLEMENTATIONS, activation_named, grouped_matmul
from tests.light_compile import light_compile
from tests.placement_cases import seeds

pytestmark = pytest.mark.light_compile

ON_HOPPER = getattr(jax.devices()[0], "compute_capability", None) == "9.0"
# `mosaic` needs the GPU that it is made for, and takes multiples of 64 in 16 bits alone.
ANY_SHAPE = [name for name in IMPLEMENTATIONS if name != "mosaic"]
EVERY = [None, *ANY_SHAPE]
# On CPUs this one is interpreted.
SLOW = "triton"
EVERY_ONE_SLOW = [pytest.param(n, marks=pytest.mark.slow) if n == SLOW else n for n in EVERY]
WIDE = [None, *ANY_SHAPE, *(["mosaic"] if ON_HOPPER else [])]
G, M, D, F = 8, 400, 5, 3
FUSED = (None, "triton", "mosaic")
BIT_STABLE = [None, "blocked", pytest.param(SLOW, marks=pytest.mark.slow)]


def drawn(seed, *shapes):
    generator = np.random.default_rng(seed)
    return [generator.normal(size=shape).astype(np.float32) for shape in shapes]


@functools.cache
def product_and_gradients(implementation, *, bits=False):
    """Jitted: the product, and the gradients of its inner product with `cotangent`.

    Fully optimised where bits are compared.
    """

    @jax.jit
    @jax.default_matmul_precision("highest")  # a GPU's default would round float32
    def run(rows, weights, sizes, cotangent, layer=None):
        def product(rows, weights):
            return grouped_matmul(rows, weights, sizes, layer=layer, implementation=implementation)

        out, transpose = jax.vjp(product, rows, weights)
        return out, *transpose(cotangent)

    def run_as_compiled(*arguments):
        with light_compile(not bits):
            return run(*arguments)

    return run_as_compiled


def by_numpy(rows, weights, sizes, cotangent):
    rows, weights, cotangent = (x.astype(np.float64) for x in (rows, weights, cotangent))
    out, grad_rows = np.zeros(cotangent.shape), np.zeros(rows.shape)
    grad_weights = np.zeros(weights.shape)
    ends = np.cumsum(sizes)
    for group, (end, size) in enumerate(zip(ends, sizes, strict=True)):
        own = slice(end - size, end)
        out[own] = rows[own] @ weights[group]
        grad_rows[own] = cotangent[own] @ weights[group].T
        grad_weights[group] = rows[own].T @ cotangent[own]
    return out, grad_rows, grad_weights


@pytest.mark.parametrize("implementation", EVERY_ONE_SLOW)
def test_every_pattern_of_empty_groups_gives_numpys_product_and_gradients(implementation):
    used = np.array(list(itertools.product([0, 1], repeat=G)))  # [256, G]
    # Shorter and longer than a block of 32 rows, and as long as one.
    sizes = (used * np.array([1, 50, 32, 7, 64, 2, 33, 31])).astype(np.int32)
    rows, weights, cotangent = drawn(0, (M, D), (G, D, F), (M, F))
    run = product_and_gradients(implementation)
    for pattern in sizes:
        found = run(rows, weights, pattern, cotangent)
        for got, expected in zip(found, by_numpy(rows, weights, pattern, cotangent), strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("implementation", EVERY_ONE_SLOW)
def test_padding_rows_are_zero_and_have_no_gradient_whatever_they_hold(implementation):
    rows, weights, cotangent = drawn(1, (M, D), (G, D, F), (M, F))
    sizes = np.full(G, 9, np.int32)
    padding = np.arange(M) >= sizes.sum()
    run = product_and_gradients(implementation)
    out, grad_rows, grad_weights = run(rows, weights, sizes, cotangent)
    assert not np.asarray(out)[padding].any()
    assert not np.asarray(grad_rows)[padding].any()
    rows[padding], cotangent[padding] = 1e6, -1e6
    again = run(rows, weights, sizes, cotangent)
    np.testing.assert_array_equal(again[2], grad_weights)
    np.testing.assert_array_equal(again[0], out)


@pytest.mark.parametrize("implementation", EVERY)
def test_no_rows_at_all_give_no_results_and_a_gradient_of_zero(implementation):
    rows, weights, cotangent = drawn(2, (0, D), (G, D, F), (0, F))
    sizes = np.zeros(G, np.int32)
    out, grad_rows, grad_weights = product_and_gradients(implementation)(
        rows, weights, sizes, cotangent
    )
    assert out.shape == (0, F)
    assert grad_rows.shape == (0, D)
    assert not np.asarray(grad_weights).any()


@pytest.mark.parametrize("implementation", BIT_STABLE)
@given(seed=seeds, position=st.integers(0, 200))
def test_no_bit_of_a_row_depends_on_its_neighbours(implementation, seed, position):
    row, weights, others, cotangent = drawn(seed, (D,), (G, D, F), (M, D), (M, F))
    run = product_and_gradients(implementation, bits=True)
    group = seed % G
    alone = np.zeros((M, D), np.float32)
    alone[0] = row
    cotangent[0] = cotangent[position]
    sizes = np.zeros(G, np.int32)
    sizes[group] = 1
    expected = run(alone, weights, sizes, cotangent)
    # Now the row stands at `position`, in a group that begins where chance will have it.
    others[position] = row
    sizes = np.ones(G, np.int32)
    before = np.random.default_rng(seed).integers(0, position + 1) if group else 0
    sizes[0], sizes[group] = max(before - group + 1, 0), 0
    sizes[group] = position + 1 - sizes[:group].sum()
    if sizes[group] < 1:
        sizes[:group], sizes[group] = 0, position + 1
    found = run(others, weights, sizes, cotangent)
    np.testing.assert_array_equal(found[0][position], expected[0][0])
    np.testing.assert_array_equal(found[1][position], expected[1][0])


# The kernels have tiles, which the width concerns; for the others one width does.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("implementation", "width"),
    [
        (name, width)
        for name in WIDE
        for width in ((64, 192, 384) if name in ("blocked", "triton", "mosaic") else (192,))
    ],
)
def test_bfloat16_stays_bfloat16(implementation, width):
    rows, weights, cotangent = (
        jnp.asarray(x, jnp.bfloat16) for x in drawn(3, (M, 64), (G, 64, width), (M, width))
    )
    # Groups that begin anywhere, some empty, some longer than a tile; and padding.
    sizes = np.array([3, 0, 130, 40, 0, 65, 1, 100], np.int32)
    found = product_and_gradients(implementation)(rows, weights, sizes, cotangent)
    assert {x.dtype for x in found} == {jnp.dtype(jnp.bfloat16)}
    wide = [np.asarray(x, np.float32) for x in (rows, weights, cotangent)]
    expected = by_numpy(wide[0], wide[1], sizes, wide[2])
    for got, exact in zip(found, expected, strict=True):
        error = np.linalg.norm(np.asarray(got, np.float32) - exact)
        assert error < 0.005 * np.linalg.norm(exact)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", WIDE[1:])
def test_a_layer_of_a_stack_gives_what_it_gives_alone_and_the_others_are_not_read(implementation):
    rows, weights, cotangent = (
        jnp.asarray(x, jnp.bfloat16) for x in drawn(3, (M, 64), (G, 64, 64), (M, 64))
    )
    sizes = np.array([3, 0, 130, 40, 0, 65, 1, 100], np.int32)
    run = product_and_gradients(implementation, bits=True)
    expected = run(rows, weights, sizes, cotangent)
    stack = jnp.full((3, *weights.shape), jnp.nan, weights.dtype).at[1].set(weights)
    *found, grad_stack = run(rows, stack, sizes, cotangent, jnp.int32(1))
    for got, alone in zip([*found, grad_stack[1]], expected, strict=True):
        np.testing.assert_array_equal(got, alone)
    assert not np.asarray(grad_stack[::2]).any()


@pytest.mark.slow
def test_no_bit_of_a_row_depends_on_its_place_in_bfloat16_either():
    row, weights = (jnp.asarray(x, jnp.bfloat16) for x in drawn(4, (1, 64), (G, 64, 192)))
    run = product_and_gradients(None, bits=True)
    found = set()
    for before in (0, 1, 7, 8, 63, 64, 130):
        rows = jnp.concatenate([jnp.ones((before, 64), jnp.bfloat16), row])
        rows = jnp.pad(rows, ((0, M - before - 1), (0, 0)))
        sizes = np.array([before, 0, 1, 20, 0, 0, 0, 0], np.int32)
        out = run(rows, weights, sizes, jnp.zeros((M, 192), jnp.bfloat16))[0]
        found.add(np.asarray(out[before]).tobytes())
    assert len(found) == 1


@pytest.mark.slow
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("implementation", [name for name in WIDE if name in FUSED])
def test_the_activation_follows_the_product(implementation, activation):
    width = 256
    rows, weights, cotangent = (
        jnp.asarray(x, jnp.bfloat16) for x in drawn(5, (M, 64), (G, 64, width), (M, width))
    )
    gated = activation_named(activation).gated
    weights, cotangent = weights / 8, cotangent[:, : width // 2] if gated else cotangent
    sizes = np.array([3, 0, 130, 40, 0, 65, 1, 100], np.int32)

    def run(rows, weights, cotangent, implementation=implementation):
        def product(rows, weights):
            return grouped_matmul(
                rows, weights, sizes, activation=activation, implementation=implementation
            )

        out, transpose = jax.vjp(product, rows, weights)
        return out, *transpose(cotangent), product(rows, weights)

    exact = [x.astype(jnp.float32) for x in (rows, weights, cotangent)]
    with jax.default_matmul_precision("highest"):
        expected = jax.jit(functools.partial(run, implementation="reference"))(*exact)
    for got, exact in zip(jax.jit(run)(rows, weights, cotangent), expected, strict=True):
        error = np.linalg.norm(np.asarray(got, np.float32) - exact)
        assert error < 0.02 * np.linalg.norm(exact)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", EVERY)
def test_each_row_gets_its_groups_bias_and_each_bias_its_rows_gradient(implementation):
    rows, weights, bias, cotangent = drawn(6, (M, D), (G, D, 2 * F), (G, 2 * F), (M, F))
    sizes = np.array([3, 0, 130, 40, 0, 65, 1, 100], np.int32)
    group = np.repeat(np.arange(G), sizes)

    @jax.jit
    def run(bias):
        def product(bias):
            return grouped_matmul(
                rows,
                weights,
                sizes,
                bias=bias,
                activation="clamped_swiglu",
                implementation=implementation,
            )

        out, transpose = jax.vjp(product, bias)
        return out, transpose(cotangent)[0]

    def plainly(bias):
        gate_up = jnp.einsum("md,mdf->mf", rows[: len(group)], weights[group]) + bias[group]
        gate, up = jnp.split(gate_up, 2, axis=1)
        gate, up = jnp.minimum(gate, 7.0), jnp.clip(up, -7.0, 7.0)
        return (up + 1) * gate * jax.nn.sigmoid(1.702 * gate)

    with jax.default_matmul_precision("highest"):
        expected, transpose = jax.vjp(plainly, jnp.asarray(bias))
        out, grad = run(bias)
    np.testing.assert_allclose(out[: len(group)], expected, rtol=1e-4, atol=1e-4)
    assert not np.asarray(out[len(group) :]).any()
    np.testing.assert_allclose(
        grad, transpose(jnp.asarray(cotangent[: len(group)]))[0], rtol=1e-4, atol=1e-4
    )


def test_an_unknown_implementation_is_refused_with_those_there_are():
    with pytest.raises(
        ValueError, match="'fast'; use one of blocked, mosaic, ragged_dot, reference, triton"
    ):
        grouped_matmul(
            jnp.ones((1, 1)), jnp.ones((1, 1, 1)), jnp.ones(1, int), implementation="fast"
        )


def test_an_unknown_activation_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match="'relu'; use one of swiglu, clamped_swiglu, geglu, gelu"):
        grouped_matmul(jnp.ones((1, 1)), jnp.ones((1, 1, 1)), jnp.ones(1, int), activation="relu")
