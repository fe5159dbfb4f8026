"""Meshes of several axes: the layer of one device, its parts spread."""

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

pytestmark = pytest.mark.light_compile

E, K, D, F, S = 6, 3, 8, 12, 16
ALL_AXES, RICH = "data 2 × expert 2 × tensor 2", "biases and a gated shared expert"
MESHES = {
    "data 2 × expert 4": {"data": 2, "expert": 4},
    "expert 4 × tensor 2": {"expert": 4, "tensor": 2},
    "expert 2 × tensor 4": {"expert": 2, "tensor": 4},
    ALL_AXES: {"data": 2, "expert": 2, "tensor": 2},
    "pod 2 × data 2 × expert 2": {"pod": 2, "data": 2, "expert": 2},
}
VARIANTS = {
    "plain": {},
    RICH: {
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
    return results_and_gradients(make({"expert": 1}, **VARIANTS[variant]))


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


# The richest variant on every mesh, the plain one on the mesh that has all there is.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "variant"), [(ALL_AXES, "plain"), *((name, RICH) for name in MESHES)]
)
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


@pytest.mark.slow
def test_the_hidden_width_and_the_slots_are_divided():
    layer = make({"expert": 4, "tensor": 2}, shared_hidden_dim=8)
    assert shapes_of(layer.gate_up) == {(S // 4, D, 2, F // 2)}
    assert shapes_of(layer.down) == {(S // 4, F // 2, D)}
    assert shapes_of(layer.shared_gate_up) == {(D, 2, 4)}


def shapes_of(bank):
    return {shard.data.shape for shard in bank[...].addressable_shards}


@pytest.mark.slow
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
