"""The layer under JAX's and Flax's transformations, with the gradients of a dense reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from jax_eplb import MoE, MoEConfig, Placement, expert_mesh
from jax_eplb.moe import moe_forward
from tests.moe_reference import moe_dense
from tests.placement_cases import random_table

pytestmark = pytest.mark.light_compile

E, K, D, F, S, RANKS = 6, 2, 5, 7, 16, 4


def make(seed=0, placement=None, **keywords):
    sizes = {"embed_dim": D, "hidden_dim": F, "num_experts": E, "experts_per_token": K}
    config = MoEConfig(**sizes | {"num_slots": S, "num_ranks": RANKS} | keywords)
    return MoE(config, mesh=expert_mesh(RANKS), rngs=nnx.Rngs(seed), placement=placement)


def placement_of(seed):
    table = random_table(np.random.default_rng(seed), 1, E, S, RANKS)
    return Placement.from_slots(table, num_experts=E, num_ranks=RANKS)


def drawn(seed=0, shape=(24,)):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(*shape, D)).astype(np.float32))


def first_slots(layer):
    slots = np.asarray(layer.slot_to_expert[...])
    return np.array([int(np.flatnonzero(slots == expert)[0]) for expert in range(E)])


def dense_of(layer):
    """The dense reference's parameters: router, gate-up and down in expert order."""
    first = first_slots(layer)
    gate_up = layer.gate_up[...][first].reshape(E, D, 2 * F)
    return layer.router[...], gate_up, layer.down[...][first]


@nnx.jit
def gradients(layer):
    return nnx.grad(lambda layer: (layer(drawn()) * drawn(1)).sum())(layer)


@jax.jit
def dense_gradients(params):
    return jax.grad(lambda params: (moe_dense(drawn(), *params, K) * drawn(1)).sum())(params)


@pytest.mark.slow
@pytest.mark.parametrize("placement", [None, placement_of(1)], ids=["default", "random"])
@pytest.mark.parametrize("cap", [8, None], ids=["waves", "one wave"])
def test_every_slot_gets_its_experts_gradient_of_the_dense_layer(placement, cap):
    layer = make(placement=placement, moe_max_num_tokens=cap)
    grads, dense = gradients(layer), dense_gradients(dense_of(layer))
    experts = np.asarray(layer.slot_to_expert[...])
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    close(grads.router[...], dense[0])
    close(grads.gate_up[...].reshape(S, D, 2 * F), np.asarray(dense[1])[experts])
    close(grads.down[...], np.asarray(dense[2])[experts])


@pytest.mark.slow
def test_replicas_stay_equal_bit_for_bit_under_an_optimizer():
    layer, tokens = make(placement=placement_of(2)), drawn(2)
    optimizer = nnx.Optimizer(layer, optax.sgd(1e-2, momentum=0.9), wrt=nnx.Param)

    @nnx.jit
    def step(layer, optimizer):
        grads = nnx.grad(lambda layer: jnp.square(layer(tokens)).sum())(layer)
        optimizer.update(layer, grads)

    before = np.asarray(layer.gate_up[...])
    for _ in range(3):
        step(layer, optimizer)
    first = first_slots(layer)[np.asarray(layer.slot_to_expert[...])]
    for bank in (layer.gate_up, layer.down):
        weights = np.asarray(bank[...])
        np.testing.assert_array_equal(weights, weights[first])
    assert np.abs(np.asarray(layer.gate_up[...]) - before).min() > 0


@pytest.mark.slow
def test_layers_in_a_scan_are_those_one_after_another():
    config = make().config

    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def stack(rngs):
        return MoE(config, mesh=expert_mesh(RANKS), rngs=rngs)

    layers = stack(nnx.Rngs(0))
    assert layers.gate_up[...].shape == (3, S, D, 2, F)
    tokens = drawn()

    @nnx.jit
    def through(layers, x):
        return nnx.scan(lambda x, layer: (x + layer(x), None), in_axes=(nnx.Carry, 0))(x, layers)[0]

    out = through(layers, tokens)
    graph, state = nnx.split(layers)
    expected = tokens
    for i in range(3):
        one = nnx.merge(graph, jax.tree.map(lambda x, i=i: x[i], state))
        expected = expected + one(expected)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
    assert layers.expert_tokens[...].sum(axis=1).tolist() == [2 * len(tokens) * K] * 3 or (
        layers.expert_tokens[...].sum(axis=1).tolist() == [len(tokens) * K] * 3
    )


@pytest.mark.slow
@pytest.mark.parametrize("cap", [None, 8], ids=["one wave", "waves"])
def test_remat_changes_no_gradient(cap):
    layer, tokens = make(moe_max_num_tokens=cap), drawn()
    graph, state = nnx.split(layer)

    def loss(state, tokens):
        return jnp.square(nnx.merge(graph, state, copy=True)(tokens)).sum()

    plain = jax.jit(jax.grad(loss, argnums=1))(state, tokens)
    again = jax.jit(jax.grad(jax.remat(loss), argnums=1))(state, tokens)
    np.testing.assert_allclose(again, plain, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_it_serves_in_a_shard_map_of_the_users():
    layer, tokens = make(placement=placement_of(3), shared_hidden_dim=4), drawn()

    def block(params, tables, tokens):
        mask = jnp.ones(len(tokens), bool)
        out = moe_forward(params, tables, jnp.tanh(tokens), mask, config=layer.config)
        return tokens + out.tokens

    spread = P("expert")
    run = jax.jit(
        jax.shard_map(
            block, mesh=layer.mesh, in_specs=(layer.specs(), P(), spread), out_specs=spread
        )
    )
    out = run(layer.params(), layer.tables(), tokens)
    np.testing.assert_allclose(out, tokens + layer(jnp.tanh(tokens)), rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_it_is_a_linen_module_through_the_bridge():
    config, tokens = make().config, drawn()
    linen = nnx.bridge.to_linen(MoE, config, mesh=expert_mesh(RANKS))
    variables = linen.init(jax.random.key(0), tokens)
    out, changed = jax.jit(linen.apply, static_argnames="mutable")(
        variables, tokens, mutable=("LoadCount",)
    )
    layer = make()
    params = variables["params"]
    for name in ("router", "gate_up", "down"):
        getattr(layer, name)[...] = params[name]
    np.testing.assert_allclose(out, layer(tokens), rtol=1e-6, atol=1e-6)
    assert changed["LoadCount"]["expert_tokens"].sum() >= len(tokens) * K
    grads = jax.jit(
        jax.grad(
            lambda params: jnp.square(linen.apply({**variables, "params": params}, tokens)).sum()
        )
    )(params)
    assert all(np.abs(np.asarray(g)).sum() > 0 for g in jax.tree.leaves(grads))
