import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from jax_eplb import expert_mesh
from jax_eplb.models import parameters
from tests.placement_cases import random_table, seeds
from tests.small_decoder import SMALL, drawn_on_host, fresh

pytestmark = pytest.mark.light_compile

EXPERTS, SLOTS = SMALL.num_experts, 16


@pytest.mark.slow
def test_fresh_parameters_do_not_depend_on_the_number_of_devices():
    params = fresh(ranks=4)
    for (name, one), (_, many) in zip(
        parameters.named(fresh(ranks=1)), parameters.named(params), strict=True
    ):
        np.testing.assert_array_equal(one, many, err_msg=name)
    bank = params.sparse.moe.experts.gate_up
    assert {x.data.shape[1] for x in bank.addressable_shards} == {EXPERTS // 4}


@given(seeds)
@settings(max_examples=10)
def test_what_is_placed_on_the_mesh_is_read_back_in_expert_order(seed):
    table = random_table(np.random.default_rng(seed), SMALL.num_moe_layers, EXPERTS, SLOTS, 4)
    placed = parameters.on_mesh(
        drawn_on_host(), table, SMALL, expert_mesh(4), "expert", jnp.float32
    )
    assert placed.sparse.moe.experts.down.shape[1] == SLOTS
    back = parameters.on_host(placed, table, EXPERTS)
    for (name, sent), (_, found) in zip(
        parameters.named(drawn_on_host()), parameters.named(back), strict=True
    ):
        np.testing.assert_array_equal(sent, found, err_msg=name)


def test_on_the_mesh_all_but_the_router_has_the_dtype_asked_for():
    table = np.tile(np.arange(EXPERTS, dtype=np.int32), (SMALL.num_moe_layers, 1))
    placed = parameters.on_mesh(
        drawn_on_host(), table, SMALL, expert_mesh(2), "expert", jnp.bfloat16
    )
    dtypes = {name: array.dtype for name, array in parameters.named(placed)}
    assert dtypes.pop("sparse.moe.router") == jnp.float32
    assert set(dtypes.values()) == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize(
    "config",
    [SMALL, dataclasses.replace(SMALL, num_dense_layers=0, shared_hidden_dim=0)],
    ids=["small", "without dense layers or shared expert"],
)
def test_shapes_specs_and_parameters_agree(config):
    is_leaf = parameters.is_shape
    shapes = dict(parameters.named(parameters.shapes(config)))
    params = jax.eval_shape(
        lambda: parameters.initialize(jax.random.key(0), config, expert_mesh(2), "expert")
    )
    assert shapes == {name: x.shape for name, x in parameters.named(params)}
    structure = jax.tree.structure(parameters.shapes(config), is_leaf=is_leaf)
    assert structure == jax.tree.structure(params)
    assert structure == jax.tree.structure(parameters.specs(config, "expert"))


def test_names_are_paths_in_the_tree():
    names = [name for name, _ in parameters.named(drawn_on_host())]
    assert {"embed", "dense.attention.out", "sparse.moe.experts.gate_up", "unembed"} <= set(names)
    assert len(set(names)) == len(names)


@pytest.mark.slow
def test_fresh_weights_have_the_variance_of_their_inputs():
    params = fresh(ranks=1)
    assert params.embed.std() == pytest.approx(1, rel=0.1)
    assert params.unembed.std() == pytest.approx(SMALL.embed_dim**-0.5, rel=0.1)
    assert (params.sparse.norm == 1).all()
