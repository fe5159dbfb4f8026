import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jax_eplb import MoEConfig, Placement, expert_mesh
from jax_eplb.moe import MoEParams, moe_forward
from jax_eplb.moe.feed_forward import ExpertWeights
from tests.moe_reference import moe_by_numpy, moe_dense

pytestmark = pytest.mark.light_compile

E, K, D, F, T = 6, 2, 5, 4, 16


def drawn(seed=0):
    """Tokens [T, D], and router, gate_up and down in expert order."""
    generator = np.random.default_rng(seed)
    shapes = ((T, D), (D, E), (E, D, 2 * F), (E, F, D))
    return [generator.normal(size=shape).astype(np.float32) for shape in shapes]


def config_of(ranks, **keywords):
    sizes = {"embed_dim": D, "hidden_dim": F, "num_experts": E, "experts_per_token": K}
    return MoEConfig(**sizes | {"num_slots": 12, "num_ranks": ranks} | keywords)


@functools.cache
def forward(config):
    placement = Placement.default(
        num_experts=E, num_slots=config.num_slots, num_ranks=config.num_ranks
    )
    tables = placement.tables().of_layer(0)

    def local(params, tokens, mask):
        out = moe_forward(params, tables, tokens, mask, config=config, axis_name="expert")
        return out._replace(
            expert_tokens=out.expert_tokens[None], rank_tokens=out.rank_tokens[None]
        )

    axis = P("expert")
    specs = MoEParams(P(), ExpertWeights(axis, axis))
    run = jax.shard_map(
        local, mesh=expert_mesh(config.num_ranks), in_specs=(specs, axis, axis), out_specs=axis
    )

    def from_expert_order(tokens, router, gate_up, down, mask):
        slots = placement.slot_to_expert[0]
        params = MoEParams(router, ExpertWeights(gate_up[slots], down[slots]))
        return run(params, tokens, mask)

    return jax.jit(from_expert_order)


@pytest.mark.slow
def test_what_it_saw_is_told_by_rank_and_by_expert():
    tokens, router, gate_up, down = drawn()
    mask = np.arange(T) % 4 != 0
    out = forward(config_of(4))(tokens, router, gate_up, down, mask)
    logits = tokens.astype(np.float64) @ router
    chosen = np.argsort(-logits, axis=1)[:, :K]
    np.testing.assert_allclose(out.router_logits, logits, rtol=1e-4, atol=1e-5)
    for rank in range(4):
        own = chosen[4 * rank : 4 * rank + 4][1:]
        np.testing.assert_array_equal(
            out.expert_tokens[rank], np.bincount(own.ravel(), minlength=E)
        )
    assert out.rank_tokens.sum() == mask.sum() * K


@pytest.mark.slow
@pytest.mark.parametrize("kernel", [None, "reference", "ragged_dot"])
def test_every_kernel_gives_numpys_layer(kernel):
    tokens, router, gate_up, down = drawn(1)
    out = forward(config_of(4, kernel=kernel))(tokens, router, gate_up, down, np.ones(T, bool))
    expected = moe_by_numpy(tokens, router, gate_up, down, K)
    np.testing.assert_allclose(out.tokens, expected, rtol=1e-4, atol=1e-5)


def loss_gradients(function, arrays, mask):
    weights = np.random.default_rng(9).normal(size=(T, D)).astype(np.float32)
    run = jax.grad(lambda *x: (function(*x, mask) * weights).sum(), argnums=(0, 1, 2, 3))
    return jax.jit(run)(*arrays)


@pytest.mark.slow
def test_the_gradients_over_many_waves_are_those_of_the_dense_layer():
    arrays, mask = drawn(2), np.arange(T) != 3
    sharded = forward(config_of(4, moe_max_num_tokens=4))
    found = loss_gradients(lambda *x: sharded(*x).tokens, arrays, mask)
    expected = loss_gradients(lambda *x: moe_dense(*x[:-1], K, mask=x[-1]), arrays, mask)
    for got, want in zip(found, expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-4)


@pytest.mark.slow
def test_the_gradients_are_the_finite_differences():
    arrays = [x.astype(np.float64) for x in drawn(3)]
    mask, weights = np.ones(T, bool), np.random.default_rng(9).normal(size=(T, D))
    run = forward(config_of(4))
    found = loss_gradients(lambda *x: run(*x).tokens, [x.astype(np.float32) for x in arrays], mask)
    generator = np.random.default_rng(4)
    for which, gradient in enumerate(found):
        direction = generator.normal(size=gradient.shape)
        sides = []
        for step in (1e-6, -1e-6):
            moved = list(arrays)
            moved[which] = moved[which] + step * direction
            sides.append((moe_by_numpy(*moved, K) * weights).sum())
        slope = (sides[0] - sides[1]) / 2e-6
        assert (np.asarray(gradient) * direction).sum() == pytest.approx(slope, rel=1e-3, abs=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["blocked", "triton", "mosaic"])
def test_no_layer_is_cut_out_of_a_stack(kernel):
    sizes = {"embed_dim": 128, "hidden_dim": 64, "num_experts": 8, "experts_per_token": 2}
    config = MoEConfig(**sizes, num_slots=8, num_ranks=1, kernel=kernel)
    tables = Placement.default(num_experts=8, num_ranks=1).tables().of_layer(0)

    def run(router, experts, tokens):
        def layer(tokens, index):
            params = MoEParams(router, experts._replace(layer=index))
            mask = jnp.ones(len(tokens), bool)
            return moe_forward(params, tables, tokens, mask, config=config).tokens, None

        return jax.lax.scan(layer, tokens, jnp.arange(3))[0]

    everywhere = P()
    spread = jax.shard_map(run, mesh=expert_mesh(1), in_specs=everywhere, out_specs=everywhere)
    bfloat16 = functools.partial(jnp.zeros, dtype=jnp.bfloat16)
    experts = ExpertWeights(bfloat16((3, 8, 128, 2, 64)), bfloat16((3, 8, 64, 128)))
    program = str(jax.make_jaxpr(spread)(jnp.zeros((128, 8)), experts, bfloat16((16, 128))))
    assert "bf16[3,8,64,128]" in program
    assert "bf16[8,128,2,64]" not in program
    assert "bf16[8,128,128]" not in program
    assert "bf16[8,64,128]" not in program


def test_layers_one_after_the_other_are_one_function_called_by_all():
    config, axis = config_of(4), P("expert")
    tables = Placement.default(num_experts=E, num_slots=12, num_ranks=4, num_layers=3).tables()

    def local(params, tokens):
        mask = jnp.ones(len(tokens), bool)
        for layer in range(3):
            out = moe_forward(params, tables.of_layer(layer), tokens, mask, config=config)
            tokens = out.tokens
        return tokens

    specs = MoEParams(P(), ExpertWeights(axis, axis))
    run = jax.shard_map(local, mesh=expert_mesh(4), in_specs=(specs, axis), out_specs=axis)
    experts = ExpertWeights(jnp.zeros((12, D, 2 * F)), jnp.zeros((12, F, D)))
    params = MoEParams(jnp.zeros((D, E)), experts)
    program = jax.jit(run).lower(params, jnp.zeros((T, D))).as_text()
    assert len(re.findall(r"func\.func private @moe_forward\w*\(", program)) == 1
    assert program.count("call @moe_forward(") == 3


@pytest.mark.slow
def test_the_output_has_the_activations_dtype_and_the_router_stays_float32():
    tokens, router, gate_up, down = drawn(5)
    narrow = [jnp.asarray(x, jnp.bfloat16) for x in (tokens, gate_up, down)]
    out = forward(config_of(4))(narrow[0], jnp.asarray(router), *narrow[1:], jnp.ones(T, bool))
    assert (out.tokens.dtype, out.router_logits.dtype) == (jnp.bfloat16, jnp.float32)
    expected = moe_by_numpy(narrow[0], router, *narrow[1:], K)
    np.testing.assert_allclose(out.tokens.astype(jnp.float32), expected, rtol=0.05, atol=0.2)


@pytest.mark.parametrize(("dtype", "digits"), [(jnp.bfloat16, "e8m7"), (jnp.float16, "e5m10")])
def test_no_program_may_keep_more_digits_of_the_output_than_its_type_has(dtype, digits):
    """Compilers may leave out a rounding that the next operation undoes, but not this one."""
    tokens, router, gate_up, down = (jnp.asarray(x) for x in drawn(7))
    narrow = [x.astype(dtype) for x in (tokens, gate_up, down)]
    program = forward(config_of(4)).lower(narrow[0], router, *narrow[1:], jnp.ones(T, bool))
    assert re.search(rf"reduce_precision .*format = {digits} : tensor<4x5xf32>", program.as_text())


def test_no_tokens_give_no_output_and_gradients_of_zero():
    tokens, *weights = (jnp.asarray(x) for x in drawn(6))
    run, mask = forward(config_of(4)), jnp.ones(0, bool)
    out = run(tokens[:0], *weights, mask)
    assert out.tokens.shape == (0, D)
    assert not np.asarray(out.expert_tokens).any()
    grad = jax.grad(lambda w: run(tokens[:0], weights[0], w, weights[2], mask).tokens.sum())
    assert not np.asarray(grad(weights[1])).any()
