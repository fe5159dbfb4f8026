"""Meshes of several axes, what a step's program contains, and how much memory it takes."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_eplb import MoE, MoEConfig, Placement
from jax_eplb.routing import RouterConfig

E, K, D, F, S = 6, 3, 8, 12, 16
MESHES = {
    "data 2 × expert 4": {"data": 2, "expert": 4},
    "expert 4 × tensor 2": {"expert": 4, "tensor": 2},
    "expert 2 × tensor 4": {"expert": 2, "tensor": 4},
    "data 2 × expert 2 × tensor 2": {"data": 2, "expert": 2, "tensor": 2},
    "pod 2 × data 2 × expert 2": {"pod": 2, "data": 2, "expert": 2},
}
VARIANTS = {
    "plain": {},
    "biases and a gated shared expert": {
        "expert_biases": True,
        "activation": "clamped_swiglu",
        "shared_hidden_dim": 8,
        "shared_gate": True,
        "router": RouterConfig("softmax_of_top_k", logits_bias=True),
    },
}


def mesh_of(**shape):
    count = math.prod(shape.values())
    auto = (jax.sharding.AxisType.Auto,) * len(shape)
    devices = jax.devices()[:count]
    return jax.make_mesh(tuple(shape.values()), tuple(shape), axis_types=auto, devices=devices)


def make(shape, **keywords):
    sizes = {"embed_dim": D, "hidden_dim": F, "num_experts": E, "experts_per_token": K}
    config = MoEConfig(**sizes | {"num_slots": S, "num_ranks": shape["expert"]} | keywords)
    others = tuple(axis for axis in shape if axis in ("pod", "data"))
    tensor = "tensor" if "tensor" in shape else None
    layer = MoE(
        config, mesh=mesh_of(**shape), rngs=nnx.Rngs(0), data_axes=others, tensor_axis=tensor
    )
    if config.expert_biases:  # replicas alike, experts not
        experts = np.asarray(layer.slot_to_expert[...])
        for bias in (layer.gate_up_bias, layer.down_bias):
            values = np.random.default_rng(1).normal(size=(E, *bias[...].shape[1:]))
            bias[...] = jax.device_put(np.float32(values)[experts], bias[...].sharding)
    return layer


def tokens_of(seed=0, count=48):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(count, D)).astype(np.float32))


@functools.cache
def on_one_device(variant):
    layer = make({"expert": 1}, **VARIANTS[variant])
    return results_and_gradients(layer)


def results_and_gradients(layer):
    tokens, cotangent = tokens_of(), tokens_of(1)

    def loss(layer):
        output = layer.forward(tokens)
        return (output.tokens * cotangent).sum(), output

    # Jitted: outside of `jit`, JAX 0.10 takes the sharding of a residual for one of another mesh
    # of the same devices, if there is one.
    grads, output = nnx.jit(nnx.grad(loss, has_aux=True))(layer)
    by_name = {path[0]: np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(grads)}
    # Banks in expert order: the layers have the same slots, but not the same placement.
    table = np.asarray(layer.slot_to_expert[...])
    first = [int(np.flatnonzero(table == expert)[0]) for expert in range(E)]
    for name in ("gate_up", "down", "gate_up_bias", "down_bias"):
        if name in by_name:
            by_name[name] = by_name[name][first]
    return output, by_name


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", MESHES)
def test_every_mesh_gives_the_layer_of_one_device_and_its_gradients(name, variant):
    layer = make(MESHES[name], **VARIANTS[variant])
    output, grads = results_and_gradients(layer)
    expected, expected_grads = on_one_device(variant)
    np.testing.assert_allclose(output.tokens, expected.tokens, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(output.expert_tokens, expected.expert_tokens)
    assert output.rank_tokens.shape == (MESHES[name]["expert"],)
    assert int(output.rank_tokens.sum()) == int(expected.rank_tokens.sum()) == 48 * K
    assert grads.keys() == expected_grads.keys()
    for key, grad in grads.items():
        np.testing.assert_allclose(grad, expected_grads[key], rtol=1e-4, atol=1e-4, err_msg=key)


def test_the_hidden_width_and_the_slots_are_divided():
    layer = make({"expert": 4, "tensor": 2}, shared_hidden_dim=8)
    assert shapes_of(layer.gate_up) == {(S // 4, D, 2, F // 2)}
    assert shapes_of(layer.down) == {(S // 4, F // 2, D)}
    assert shapes_of(layer.shared_gate_up) == {(D, 2, 4)}


def shapes_of(bank):
    return {shard.data.shape for shard in bank[...].addressable_shards}


def test_a_placement_moves_the_parts_of_every_expert():
    layer = make({"expert": 4, "tensor": 2})
    before = layer(tokens_of())
    table = np.roll(np.asarray(layer.slot_to_expert[...]), 5)
    layer.use_placement(Placement.from_slots(table[None], num_experts=E, num_ranks=4))
    np.testing.assert_array_equal(layer(tokens_of()), before)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make({"expert": 4, "tensor": 2}, hidden_dim=7),
         "hidden_dim is 7; it cannot be divided among the 2 devices of 'tensor'"),
        (lambda: make({"expert": 4, "tensor": 2}, shared_hidden_dim=3),
         "shared_hidden_dim is 3; it cannot be divided among the 2 devices of 'tensor'"),
        (lambda: MoE(make({"expert": 4}).config, mesh=mesh_of(expert=4), rngs=nnx.Rngs(0),
                     data_axes=("data",)),
         "the layer uses the mesh axes ['expert', 'data']; each must be one of the mesh"),
    ],
)  # fmt: skip
def test_a_mesh_that_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def compiled(layer, tokens):
    graph, state = nnx.split(layer)
    run = jax.jit(lambda state, tokens: nnx.merge(graph, state, copy=True)(tokens))
    return run.lower(state, tokens).compile()


@pytest.mark.parametrize("exchange", ["waves", "all_gather"])
def test_a_steps_program_gathers_no_expert_weights(exchange):
    layer = make({"expert": 8}, exchange=exchange, num_slots=16, embed_dim=64, hidden_dim=32)
    tokens = jnp.ones((64, 64))
    text = compiled(layer, tokens).as_text()
    gathered = re.findall(r"(\w+)\[([\d,]*)\][^\n]*? all-gather(?:-start)?\(", text)
    sizes = [math.prod(map(int, dims.split(","))) for _, dims in gathered if dims]
    one_expert = 32 * 64  # the smaller matrix
    # What may be gathered: counts, and the tokens of `all_gather`, 64 of 64 values.
    allowed = 64 * 64 if exchange == "all_gather" else one_expert - 1
    assert all(size <= allowed for size in sizes), gathered
    assert len(sizes) > 0 or exchange == "waves"
    # No array of the whole bank exists on a device in any form.
    assert "[16,64,2,32]" not in text
    assert "[16,64,64]" not in text
    assert "[16,32,64]" not in text


def peak_bytes(layer, tokens):
    return compiled(layer, tokens).memory_analysis().temp_size_in_bytes


def test_a_cap_bounds_the_memory_when_all_tokens_go_to_one_rank_and_drops_none():
    # Every token chooses experts 0 to 3, whose only slots are on rank 0.
    sizes = {"embed_dim": 32, "hidden_dim": 16, "num_experts": 32, "experts_per_token": 4}
    sizes |= {"num_slots": 32, "num_ranks": 8}

    def layer_of(**keywords):
        layer = MoE(MoEConfig(**sizes | keywords), mesh=mesh_of(expert=8), rngs=nnx.Rngs(0))
        router = np.zeros((32, 32), np.float32)
        router[:, :4] = [[4.0, 3.0, 2.0, 1.0]]
        layer.router[...] = jax.device_put(router, layer.router[...].sharding)
        return layer

    tokens = jnp.abs(jnp.asarray(np.random.default_rng(0).normal(size=(1024, 32)), jnp.float32))
    whole, capped = layer_of(), layer_of(moe_max_num_tokens=64)
    np.testing.assert_array_equal(capped(tokens), whole(tokens))
    for layer in (whole, capped):
        assert layer.rank_tokens[...].tolist() == [1024 * 4, 0, 0, 0, 0, 0, 0, 0]
    one_row = 32 * 4  # bytes
    own_results = 128 * 4 * one_row  # a rank's own choices, which wait for the sum
    # All devices are simulated in one process, yet XLA tells the memory of one of them.
    assert peak_bytes(whole, tokens) > 1024 * 4 * one_row
    assert peak_bytes(capped, tokens) < 2 * own_results + 10 * 64 * one_row
