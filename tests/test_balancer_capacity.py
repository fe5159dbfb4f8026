"""Slow, lost and returning ranks: emptied and filled while the layers serve, with the same bits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jax_eplb import HostCopy, MoEConfig, Placement, expert_mesh
from jax_eplb.moe import MoEParams, moe_forward
from jax_eplb.moe.feed_forward import ExpertWeights
from jax_eplb.online import Balancer, BalancerConfig, CapacitySet, LayerUpdate, StepSeen
from tests.tiny_model import counted_compilations

pytestmark = [pytest.mark.light_compile, pytest.mark.slow]

L, E, S, RANKS = 2, 12, 24, 8
N, K, T, D, F = S // RANKS, 2, 16, 6, 4
ALL = [1.0] * RANKS
WITHOUT_3 = [1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0]
CONFIG = BalancerConfig(layer_updates_per_iter=1)


def placement(table=None):
    default = Placement.default(num_experts=E, num_slots=S, num_ranks=RANKS, layer_ids=(3, 5))
    if table is None:
        return default
    return Placement(jnp.asarray(table, jnp.int32), E, RANKS, default.layer_ids)


@functools.cache
def by_expert():
    """Router [L, D, E], and the experts' weights, [L, E, …]."""
    generator = np.random.default_rng(0)
    shapes = (L, D, E), (L, E, D, 2 * F), (L, E, F, D)
    router, *experts = (generator.normal(size=shape).astype(np.float32) for shape in shapes)
    router[..., :3] *= 2  # some experts are hot
    return router, ExpertWeights(*experts)


def on_mesh(array, *spec):
    return jax.device_put(array, NamedSharding(expert_mesh(RANKS), P(*spec)))


def params_for(table):
    router, experts = by_expert()
    held = np.arange(L)[:, None], np.minimum(table, E - 1)
    return MoEParams(
        on_mesh(router), jax.tree.map(lambda bank: on_mesh(bank[held], None, "expert"), experts)
    )


def tables_of(placement, choice):
    return jax.tree.map(on_mesh, placement.tables(with_leveling=choice == "balanced"))


@functools.cache
def step(choice):
    """Two layers, one after the other: what comes out, and both counts."""
    config = MoEConfig(
        embed_dim=D,
        hidden_dim=F,
        num_experts=E,
        experts_per_token=K,
        num_slots=S,
        num_ranks=RANKS,
        replica_choice=choice,
    )

    def layer(tokens, of_layer):
        params, tables = of_layer
        out = moe_forward(params, tables, tokens, jnp.ones(len(tokens), bool), config=config)
        return tokens + out.tokens, (out.expert_tokens, out.rank_tokens)

    def local(params, tables, tokens):
        tokens, counts = jax.lax.scan(layer, tokens, (params, tables))
        return tokens, *(count[None] for count in counts)

    bank, axis = P(None, "expert"), P("expert")
    specs = MoEParams(P(), ExpertWeights(bank, bank)), P(), axis
    return jax.jit(jax.shard_map(local, mesh=expert_mesh(RANKS), in_specs=specs, out_specs=axis))


def tokens_of(iteration):
    drawn = np.random.default_rng(iteration).normal(size=(RANKS * T, D)).astype(np.float32)
    return on_mesh(drawn, "expert")


@functools.cache
def expected(iteration):
    """Of the default placement, where all ranks serve."""
    params, tables = params_for(np.asarray(placement().slot_to_expert)), tables_of(placement(), "")
    return np.asarray(step("even")(params, tables, tokens_of(iteration))[0])


@pytest.mark.parametrize("choice", ["even", "local", "balanced"])
def test_layers_with_an_empty_rank_give_the_same_bits_and_leave_it_alone(choice):
    # The last expert alone in layer 0, and replicated in layer 1.
    table = np.array([np.arange(S) % (E - 1), np.arange(S)[::-1] % E])
    table[0, 0] = E - 1
    table.reshape(L, RANKS, N)[:, 3] = E
    out, counts, by_rank = step(choice)(
        params_for(table), tables_of(placement(table), choice), tokens_of(0)
    )
    np.testing.assert_array_equal(out, expected(0))
    by_rank = np.asarray(by_rank)
    assert not by_rank[3].any()
    assert by_rank.sum() == np.asarray(counts).sum() == RANKS * T * K * L


class Run:
    """Two layers that serve with a balancer around them."""

    def __init__(self, config=CONFIG, split="even", table=None):
        self.events = []
        start = placement(table)
        self.choice = "balanced" if split == "balanced" else "even"
        self.params = params_for(np.asarray(start.slot_to_expert))
        self.tables = tables_of(start, self.choice)
        self.balancer = Balancer(start, config, split=split, listeners=[self.events.append])
        self.balancer.prepare(self.params)
        self.outputs, self.rank_tokens = [], []

    def serve(self, until):
        while self.balancer.iteration < until:
            between = self.balancer.between_steps(self.params, self.tables)
            self.params, self.tables = between
            tokens = tokens_of(self.balancer.iteration)
            out, *counts = step(self.choice)(self.params, self.tables, tokens)
            self.balancer.after_step(*counts)
            self.outputs.append(np.asarray(out))
            self.rank_tokens.append(np.asarray(counts[1]))

    @property
    def table(self):
        return np.asarray(self.balancer.placement.slot_to_expert)

    def assert_weights_fit(self):
        filled = self.table < E
        for bank, whole in zip(self.params.experts[:2], by_expert()[1][:2], strict=True):
            wanted = whole[np.arange(L)[:, None], np.minimum(self.table, E - 1)]
            np.testing.assert_array_equal(np.asarray(bank)[filled], wanted[filled])

    def events_of(self, kind):
        return [event for event in self.events if isinstance(event, kind)]


@pytest.mark.parametrize("split", ["even", "balanced"])
def test_a_rank_is_emptied_and_filled_again_while_serving_and_no_bit_changes(split):
    for iteration in range(30):
        expected(iteration)
    run = Run(split=split)
    run.serve(2)
    with counted_compilations() as compiled:
        run.serve(8)
        run.balancer.set_capacity(WITHOUT_3)
        run.serve(20)
        assert (run.table.reshape(L, RANKS, N)[:, 3] == E).all()
        run.assert_weights_fit()
        run.balancer.set_capacity(ALL)
        run.serve(30)
        run.balancer.flush()
    assert compiled == []
    for iteration, output in enumerate(run.outputs):
        np.testing.assert_array_equal(output, expected(iteration))
    # Planned for with the counts of iterations 8 and 9, a layer each, and in force 5 later.
    computed = np.array(run.rank_tokens)[:, 3]
    assert computed[:13].all()
    assert not computed[14:20].any()
    assert computed[28:].all()
    assert (run.table < E).all()
    run.assert_weights_fit()
    told = run.events_of(CapacitySet)
    assert [event.step for event in told] == [8, 20]
    assert told[0].capacity == tuple(WITHOUT_3)
    # Of the 2 layers, both changed, at the iterations that were fixed.
    first = [e for e in run.events_of(LayerUpdate) if e.decided_at in (9, 10)]
    assert {(event.layer, event.step) for event in first} == {(3, 13), (5, 14)}


def alone_on_3():
    """A placement in which one rank alone has three experts."""
    table = np.array([np.arange(S) % 9] * L)
    table.reshape(L, RANKS, N)[:, 3] = [9, 10, 11]
    return table


def test_a_lost_ranks_experts_come_from_the_host_copy():
    run = Run(table=alone_on_3())
    router, experts = by_expert()
    host = HostCopy.from_experts(MoEParams(router, experts), run.params, placement())
    run.serve(4)
    damaged = []
    for bank in run.params.experts[:2]:
        whole = np.array(bank)
        whole[:, 3 * N : 4 * N] = np.nan
        damaged.append(on_mesh(whole, None, "expert"))
    run.params = run.params._replace(experts=ExpertWeights(*damaged))
    with counted_compilations() as compiled:
        run.balancer.set_capacity(WITHOUT_3, lost_ranks=[3], host=host)
        with pytest.raises(ValueError, match=r"ranks \[3\] are lost and still have .* \[3, 5\]"):
            run.balancer.set_capacity(ALL)
        run.serve(12)
        run.assert_weights_fit()
        assert (run.table.reshape(L, RANKS, N)[:, 3] == E).all()
        run.balancer.set_capacity(ALL)  # whole again
        run.serve(20)
        run.balancer.flush()
    assert compiled == []
    assert (run.table < E).all()
    run.assert_weights_fit()
    for iteration in [*range(4), *range(10, 20)]:
        np.testing.assert_array_equal(run.outputs[iteration], expected(iteration))


def test_what_would_lose_experts_is_refused_and_all_stays_as_it_was():
    run = Run(table=alone_on_3())
    run.serve(4)
    refused = [
        (
            WITHOUT_3,
            {"lost_ranks": [3]},
            r"layer 3: no slot holds experts \[9, 10, 11\] once .* `host`",
        ),
        (ALL, {"lost_ranks": [3]}, r"rank 3 is lost but has a capacity of 1.0; give it 0"),
        (WITHOUT_3, {"lost_ranks": [8]}, r"rank 8 cannot be lost; there are 0 to 7"),
        ([1, 0, 0, 0, 0, 0, 1, 1], {}, "above 0 have 9 slots for 12 experts; use more slots"),
        ([1.0] * 7, {}, r"capacity has shape \(7,\); expected \(8,\)"),
        ([1.0] * 7 + [np.nan], {}, "capacity of rank 7 is nan"),
    ]
    for capacity, keywords, message in refused:
        with pytest.raises(ValueError, match=message):
            run.balancer.set_capacity(capacity, **keywords)
    np.testing.assert_array_equal(run.balancer.state.capacity, ALL)
    assert run.events_of(CapacitySet) == []
    run.serve(8)
    run.balancer.flush()
    for iteration, output in enumerate(run.outputs):
        np.testing.assert_array_equal(output, expected(iteration))


def test_a_static_balancer_empties_no_rank_and_says_so():
    balancer = Balancer(placement(), BalancerConfig())
    with pytest.raises(ValueError, match="layer_updates_per_iter is 0, so no expert would move"):
        balancer.set_capacity(WITHOUT_3)
    with pytest.raises(ValueError, match="above 0 have 3 slots for 12 experts"):
        Balancer(placement(), BalancerConfig(capacity=(1.0,) + 7 * (0.0,)))


@pytest.mark.parametrize("split", ["even", "balanced"])
def test_a_slow_rank_gets_less_and_what_is_measured_are_times(split):
    slow = [1.0] * 7 + [0.5]
    config = BalancerConfig(layer_updates_per_iter=1, capacity=tuple(slow))
    run = Run(config, split)
    run.serve(30)
    run.balancer.flush()
    tokens = np.array(run.rank_tokens)  # [iterations, P, L]
    total, share = tokens.sum(axis=(0, 1)), tokens[15:].sum(axis=0) / tokens[15:].sum(axis=(0, 1))
    assert (total > 0).all()
    assert (share[7] < 0.09).all()  # of 7.5 ranks' worth a fifteenth
    times = tokens / np.array(slow)[:, None]
    measured = times.max(axis=1) / (tokens.sum(axis=1) / 7.5) - 1
    seen = np.array([event.imbalance for event in run.events_of(StepSeen)])
    np.testing.assert_allclose(seen, measured)


def test_the_balanced_choice_heeds_speeds_from_the_next_iteration_on_without_a_move():
    run = Run(BalancerConfig(layer_updates_per_iter=1, warm_up_iterations=100), "balanced")
    run.serve(6)
    with counted_compilations() as compiled:
        run.balancer.set_capacity([1.0] * 7 + [0.25])
        run.serve(12)
    assert compiled == []
    assert run.balancer.moved_slots == 0
    tokens = np.array(run.rank_tokens)[:, 7]
    assert tokens[6:].mean() < 0.6 * tokens[:6].mean()
    for iteration, output in enumerate(run.outputs):
        np.testing.assert_array_equal(output, expected(iteration))
