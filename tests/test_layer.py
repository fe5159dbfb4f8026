import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from jax.sharding import PartitionSpec as P

from jax_eplb import MoE, MoEConfig, Placement, expert_mesh
from jax_eplb.moe.layer import LoadCount, SlotTable
from jax_eplb.routing import RouterConfig, load_balancing_loss
from jax_eplb.tables import PlacementTables
from tests.light_compile import light_compile
from tests.moe_reference import moe_by_numpy
from tests.placement_cases import random_table, seeds

E, K, D, F, S = 6, 2, 5, 7, 16
TOKENS = (2, 12)  # 24, divisible among 1, 2, 4 and 8 ranks


def config_of(ranks=4, **keywords):
    sizes = {"embed_dim": D, "hidden_dim": F, "num_experts": E, "experts_per_token": K}
    sizes |= {"num_slots": S, "num_ranks": ranks, "shared_hidden_dim": 3}
    return MoEConfig(**sizes | keywords)


@pytest.fixture
def light():
    """For a test that compares values, by programs that no test of bits takes."""
    with light_compile():
        yield


def make(ranks=4, placement=None, axis="expert", **keywords):
    config, mesh = config_of(ranks, **keywords), expert_mesh(ranks, axis)
    with light_compile():  # of the weights alone
        return MoE(config, mesh=mesh, rngs=nnx.Rngs(0), placement=placement, axis_name=axis)


def placement_of(seed, ranks=4, slots=S):
    table = random_table(np.random.default_rng(seed), 1, E, slots, ranks)
    return Placement.from_slots(table, num_experts=E, num_ranks=ranks)


def drawn(seed=0, shape=TOKENS):
    return np.random.default_rng(seed).normal(size=(*shape, D)).astype(np.float32)


def in_expert_order(layer):
    """Gate-up and down weights [E, …], from each expert's first slot."""
    slots = np.asarray(layer.slot_to_expert[...])
    first = [int(np.flatnonzero(slots == expert)[0]) for expert in range(E)]
    gate_up = np.asarray(layer.gate_up[...])[first]
    return gate_up.reshape(E, D, 2 * F), np.asarray(layer.down[...])[first]


def expected_of(layer, tokens, mask=None):
    shared = (layer.shared_gate_up[...].reshape(D, -1), layer.shared_down[...])
    mask = None if mask is None else mask.reshape(-1)
    flat = tokens.reshape(-1, D)
    weights = in_expert_order(layer)
    out = moe_by_numpy(flat, layer.router[...], *weights, K, shared=shared, mask=mask)
    return out.reshape(tokens.shape)


def compiled(layer):
    """The layer as one jitted function of its state, which tells how often it was compiled."""
    return compiled_graph(nnx.split(layer)[0])


@functools.cache
def compiled_graph(graph):
    @jax.jit
    def run(state, tokens):
        copy = nnx.merge(graph, state)
        return copy(tokens), copy.expert_tokens[...], copy.rank_tokens[...]

    return run


def test_the_layer_is_numpys():
    layer, tokens = make(), drawn()
    np.testing.assert_allclose(layer(tokens), expected_of(layer, tokens), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("light")
def test_it_is_numpys_without_a_shared_expert_and_with_one_expert_a_token():
    layer, tokens = make(shared_hidden_dim=0, experts_per_token=1), drawn(1)
    expected = moe_by_numpy(tokens.reshape(-1, D), layer.router[...], *in_expert_order(layer), 1)
    np.testing.assert_allclose(layer(tokens).reshape(-1, D), expected, rtol=1e-5, atol=1e-5)
    assert layer.shared_gate_up is None


@functools.cache
def on_one_rank():
    return np.asarray(make(1)(drawn()))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "slots", "axis"), [(4, 16, "expert"), (8, 24, "expert"), (2, 8, "ep")]
)
def test_neither_ranks_nor_slots_nor_the_axis_name_change_the_bytes(ranks, slots, axis):
    layer = make(ranks, num_slots=slots, axis=axis)
    assert np.asarray(layer(drawn())).tobytes() == on_one_rank().tobytes()


@pytest.mark.slow
def test_small_waves_do_not_change_the_bytes():
    layer = make(4, moe_max_num_tokens=4)
    assert np.asarray(layer(drawn())).tobytes() == on_one_rank().tobytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("choice", "ranks_per_node"),
    [
        ("balanced", 2),
        pytest.param("balanced", None, marks=pytest.mark.slow),
        pytest.param("local", 2, marks=pytest.mark.slow),
        pytest.param("local", None, marks=pytest.mark.slow),
        pytest.param("fewest", None, marks=pytest.mark.slow),
        pytest.param("auto", None, marks=pytest.mark.slow),
    ],
)
def test_the_choice_of_replicas_does_not_change_the_bytes(choice, ranks_per_node):
    layer = make(4, replica_choice=choice, ranks_per_node=ranks_per_node)
    layer.use_placement(placement_of(8))
    assert np.asarray(layer(drawn())).tobytes() == on_one_rank().tobytes()


@pytest.mark.slow
def test_balanced_choice_levels_the_ranks():
    fullest = {}
    for choice in ("even", "balanced"):
        layer = make(4, replica_choice=choice, placement=placement_of(4))
        layer(drawn(3))
        fullest[choice] = int(layer.rank_tokens[...].max())
    assert fullest["balanced"] <= 24 * K // 4 + 1 < fullest["even"]


@pytest.mark.slow
@pytest.mark.parametrize("cap", [None, 16])
def test_gathering_all_tokens_instead_of_sending_them_does_not_change_the_bytes(cap):
    layer = make(4, exchange="all_gather", moe_max_num_tokens=cap)
    assert np.asarray(layer(drawn())).tobytes() == on_one_rank().tobytes()


@pytest.mark.slow
@pytest.mark.usefixtures("light")
def test_more_choices_than_slots_and_than_ranks():
    layer = make(8, num_slots=8, experts_per_token=5)  # one slot a rank, five choices
    expected = moe_by_numpy(
        drawn().reshape(-1, D),
        layer.router[...],
        *in_expert_order(layer),
        5,
        shared=(layer.shared_gate_up[...].reshape(D, -1), layer.shared_down[...]),
    )
    np.testing.assert_allclose(layer(drawn()).reshape(-1, D), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("light")
def test_training_gets_logits_and_the_load_of_the_call_and_moves_the_bias():
    router = RouterConfig("sigmoid", selection_bias=True)
    layer, tokens = make(4, router=router), drawn()
    output = layer.forward(tokens)
    logits = tokens.reshape(-1, D) @ np.asarray(layer.router[...])
    np.testing.assert_allclose(output.router_logits.reshape(-1, E), logits, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(output.expert_tokens, layer.expert_tokens[...])
    assert float(load_balancing_loss(output.router_logits.reshape(-1, E), K)) >= K
    layer.update_selection_bias(0.25)
    counts = np.asarray(output.expert_tokens)
    np.testing.assert_allclose(layer.selection_bias[...], 0.25 * np.sign(counts.mean() - counts))
    # The bias chooses: one that outweighs every score sends all tokens to two experts.
    layer.selection_bias[...] = jnp.array([9.0, 9.0] + [0.0] * (E - 2))
    chosen = layer.forward(tokens).expert_tokens
    assert chosen.tolist() == [24, 24, 0, 0, 0, 0]
    with pytest.raises(ValueError, match="this router has no selection bias"):
        make(4).update_selection_bias(0.1)


@functools.cache
def moving_layer():
    layer = make()
    return layer, compiled(layer)


@pytest.mark.slow
@given(seeds)
@settings(max_examples=25)
def test_any_placement_gives_the_same_bytes_and_compiles_nothing(seed):
    layer, run = moving_layer()
    layer.use_placement(placement_of(seed))
    out, expert_tokens, rank_tokens = run(nnx.state(layer), drawn())
    assert np.asarray(out).tobytes() == on_one_rank().tobytes()
    assert expert_tokens.sum() == rank_tokens.sum() == drawn()[..., 0].size * K
    assert run._cache_size() == 1


@pytest.mark.slow
def test_a_rank_that_holds_nothing_computes_nothing_and_no_byte_changes():
    layer, run = moving_layer()
    table = np.arange(S)[None] % E
    table.reshape(4, -1)[2] = E
    layer.use_placement(Placement(jnp.asarray(table, jnp.int32), E, 4, (0,)))
    out, expert_tokens, rank_tokens = run(nnx.state(layer), drawn())
    assert np.asarray(out).tobytes() == on_one_rank().tobytes()
    assert expert_tokens.sum() == rank_tokens.sum()
    assert [bool(tokens) for tokens in rank_tokens] == [True, True, False, True]
    assert run._cache_size() == 1


def test_a_layer_made_under_a_placement_is_the_layer_moved_to_it():
    layer = make(placement=placement_of(3))
    moved = make()
    moved.use_placement(placement_of(3))
    for ours, theirs in zip(
        jax.tree.leaves(nnx.state(layer)), jax.tree.leaves(nnx.state(moved)), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)
        assert ours.sharding.is_equivalent_to(theirs.sharding, ours.ndim)


@pytest.mark.parametrize("seed", range(3))
def test_use_placement_delivers_every_expert(seed):
    layer = make()
    tagged = np.arange(E * D * 2 * F, dtype=np.float32).reshape(E, D, 2, F)  # all different
    slots = np.asarray(layer.slot_to_expert[...])
    layer.gate_up[...] = jax.device_put(tagged[slots], layer.gate_up[...].sharding)
    for new in (placement_of(seed), placement_of(seed + 10)):
        layer.use_placement(new)
        table = np.asarray(new.slot_to_expert)[0]
        np.testing.assert_array_equal(layer.gate_up[...], tagged[table])
        np.testing.assert_array_equal(layer.slot_to_expert[...], table)
        np.testing.assert_array_equal(layer.replica_count[...], np.bincount(table, minlength=E))


def test_one_device_takes_any_placement_also_after_a_jitted_step():
    layer, tokens = make(ranks=1), drawn()
    expected = layer(tokens)
    doubled = jax.jit(lambda router, *banks: tuple(2 * bank + 0 * router[0, 0] for bank in banks))
    for seed in (1, 2, 3):
        layer.use_placement(placement_of(seed, ranks=1))
        np.testing.assert_array_equal(layer(tokens), expected)
        # Whose results have the sharding of its first argument, which names no axis.
        gate_up, down = doubled(layer.router[...], layer.gate_up[...], layer.down[...])
        assert gate_up.sharding.spec == P()
        layer.gate_up[...], layer.down[...] = gate_up, down
        expected = layer(tokens)


def test_a_placement_that_does_not_fit_leaves_all_as_it_was():
    layer = make()
    before = [np.asarray(x) for x in jax.tree.leaves(nnx.state(layer))]
    without_expert_5 = Placement(jnp.zeros((1, S), jnp.int32), E, 4, (0,))
    with pytest.raises(ValueError, match="layer 0: expert 1 has no slot"):
        layer.use_placement(without_expert_5)
    with pytest.raises(ValueError, match="this layer needs"):
        layer.use_placement(placement_of(0, slots=12))
    for old, new in zip(before, jax.tree.leaves(nnx.state(layer)), strict=True):
        np.testing.assert_array_equal(old, new)


def test_the_counts_are_of_experts_and_of_ranks_and_grow_until_reset():
    layer, tokens = make(), drawn()
    logits = tokens.reshape(-1, D).astype(np.float64) @ np.asarray(layer.router[...])
    chosen = np.argsort(-logits, axis=1)[:, :K]
    for calls in (1, 2):
        layer(tokens)
        np.testing.assert_array_equal(
            layer.expert_tokens[...], calls * np.bincount(chosen.ravel(), minlength=E)
        )
        assert layer.rank_tokens[...].sum() == calls * chosen.size
    layer.reset_counts()
    assert not np.asarray(layer.expert_tokens[...]).any()
    assert not np.asarray(layer.rank_tokens[...]).any()


def test_counting_does_not_depend_on_the_placement():
    counts = []
    for placement in (None, placement_of(1)):
        layer = make(placement=placement)
        layer(drawn(4))
        counts.append(np.asarray(layer.expert_tokens[...]))
    np.testing.assert_array_equal(*counts)


def test_padding_is_neither_computed_nor_counted():
    layer, tokens = make(), drawn(2)
    mask = np.random.default_rng(2).random(TOKENS) < 0.6
    out = layer(tokens, mask)
    np.testing.assert_allclose(out, expected_of(layer, tokens, mask), rtol=1e-5, atol=1e-5)
    assert layer.expert_tokens[...].sum() == layer.rank_tokens[...].sum() == mask.sum() * K
    tokens[~mask] = 1e3  # what the padding holds changes nothing
    np.testing.assert_array_equal(np.asarray(layer(tokens, mask))[mask], np.asarray(out)[mask])


@pytest.mark.slow
def test_a_batch_of_padding_alone_is_computed_by_nobody():
    layer = make(shared_hidden_dim=0, experts_per_token=1)
    assert not np.asarray(layer(drawn(), np.zeros(TOKENS, bool))).any()
    assert not np.asarray(layer.rank_tokens[...]).any()


@pytest.mark.slow
@pytest.mark.usefixtures("light")
def test_the_module_works_under_nnx_jit_and_compiles_once_with_its_counts():
    layer, tokens = make(), drawn()
    traced = []

    @nnx.jit
    def run(layer, tokens):
        traced.append(tokens)
        return layer(tokens)

    for calls in range(1, 4):
        out = run(layer, tokens)
        layer.use_placement(placement_of(calls))
        assert layer.expert_tokens[...].sum() == calls * tokens[..., 0].size * K
    layer.reset_counts()
    run(layer, tokens)
    np.testing.assert_allclose(out, expected_of(layer, tokens), rtol=1e-5, atol=1e-5)
    assert len(traced) == 1


@pytest.mark.slow
def test_calls_keep_the_shardings_so_that_the_next_call_compiles_nothing():
    layer = make()
    run = compiled(layer)
    before = jax.tree.map(lambda x: x.sharding, nnx.state(layer))
    layer(drawn())
    layer.reset_counts()
    layer(drawn())
    run(nnx.state(layer), drawn())
    layer.use_placement(placement_of(0))
    run(nnx.state(layer), drawn())
    assert jax.tree.map(lambda x: x.sharding, nnx.state(layer)) == before
    assert run._cache_size() == 1


def test_the_tables_and_counts_can_be_split_from_what_is_trained():
    layer = make()
    graph, params, tables, counts = nnx.split(layer, nnx.Param, SlotTable, LoadCount)
    assert set(params) == {"router", "gate_up", "down", "shared_gate_up", "shared_down"}
    assert set(tables) == set(PlacementTables._fields)
    assert set(counts) == {"expert_tokens", "rank_tokens"}
    again = nnx.merge(graph, params, tables, counts)
    np.testing.assert_array_equal(again(drawn()), layer(drawn()))


@pytest.mark.slow
@pytest.mark.usefixtures("light")
def test_nnx_grad_reaches_every_parameter():
    layer, tokens = make(), drawn()
    grads = nnx.grad(lambda layer: jnp.square(layer(tokens)).sum())(layer)
    for path, grad in nnx.to_flat_state(grads):
        assert np.abs(np.asarray(grad[...])).sum() > 0, path


def test_one_slot_a_rank_holds_the_weights_of_its_slots_alone():
    layer = make(8)
    shapes = {shard.data.shape for shard in layer.gate_up[...].addressable_shards}
    assert shapes == {(S // 8, D, 2, F)}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MoE(config_of(2), mesh=expert_mesh(4), rngs=nnx.Rngs(0)),
         "the mesh {'expert': 4} must have an axis 'expert' of 2 devices"),
        (lambda: MoE(config_of(), mesh=expert_mesh(4, "data"), rngs=nnx.Rngs(0)),
         "the mesh {'data': 4} must have an axis 'expert' of 4 devices"),
        (lambda: make()(drawn(shape=(3, 5))), "15 tokens (of (3, 5, 5)) cannot be divided among 4"),
        (lambda: make()(np.ones((4, D + 1), np.float32)),
         "the tokens have shape (4, 6); expected (..., 5)"),
        (lambda: make()(drawn(), np.ones((2, 11), bool)),
         "the mask has shape (2, 11); expected (2, 12)"),
        (lambda: make(placement=placement_of(0, slots=12)),
         "the placement has (layers, experts, slots, ranks) (1, 6, 12, 4); this layer needs "
         "(1, 6, 16, 4)"),
        (lambda: make(kernel="fast")(drawn()), "unknown grouped_matmul implementation 'fast'"),
    ],
)  # fmt: skip
def test_a_fault_is_refused_with_its_own_message(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
