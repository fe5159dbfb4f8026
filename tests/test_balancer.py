"""The balancer beside a model that serves: what comes into force, when, and what fails how."""

import functools
import itertools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_eplb import Placement, expert_mesh
from jax_eplb.models import parameters
from jax_eplb.moving import RebalanceError, stage_moves, staging
from jax_eplb.online import (
    Balancer,
    BalancerConfig,
    BalancerError,
    DigestMismatch,
    Failure,
    LayerUpdate,
    Look,
    StepSeen,
    flight,
)
from jax_eplb.online import decide as deciding
from jax_eplb.online import worker as working
from jax_eplb.serving import Engine, ServingConfig
from tests.tiny_model import CONFIG, counted_compilations, random_requests, tiny_decoder

pytestmark = [pytest.mark.light_compile, pytest.mark.slow]

# Three prompts' steps and many of one token.
REQUESTS = random_requests([(5, 20), (9, 18), (16, 22), (3, 24)] * 8)
ONE = BalancerConfig(layer_updates_per_iter=1)


def placement():
    return Placement.default(
        num_experts=16, num_slots=24, num_ranks=4, layer_ids=CONFIG.moe_layer_ids
    )


@functools.cache
def bare_engine():
    made = Engine(
        tiny_decoder(),
        mesh=expert_mesh(4),
        placement=placement(),
        serving=ServingConfig(max_batch_size=4, max_length=40),
    )
    made.warm_up(REQUESTS)
    return made


def engine(config=ONE, listeners=(), gather=None):
    """An engine on the default placement, with a balancer that is ready."""
    unbalanced()  # on the same engine, so before it has a balancer
    made = bare_engine()
    made.balancer = None
    made.use_placement(placement())
    made.balancer = Balancer(placement(), config, split="even", listeners=listeners, gather=gather)
    made.balancer.prepare(made._params)
    return made


def outputs(engine, requests=REQUESTS, **keywords):
    return [output.tolist() for output in engine.run(requests, **keywords).outputs]


@functools.cache
def unbalanced():
    return outputs(bare_engine())


def table_of(engine):
    return np.asarray(engine.placement.slot_to_expert)


def weights_fit(engine):
    """Whether every slot holds the weights of the expert that the placement in force says."""
    expected = parameters.on_mesh(
        tiny_decoder().params, table_of(engine), CONFIG, engine.mesh, "expert", jnp.float32
    )
    same = jax.tree.map(lambda a, b: bool((a == b).all()), expected, engine._params)
    return jax.tree.all(same)


def test_placements_change_while_serving_no_token_does_and_nothing_compiles():
    expected = unbalanced()
    events = []
    made = engine(listeners=[events.append])
    with counted_compilations() as compiled:
        assert outputs(made) == expected
        made.balancer.flush()
    assert compiled == []
    updates = [event for event in events if isinstance(event, LayerUpdate)]
    assert {update.layer for update in updates} == {1, 2}
    assert made.balancer.updates == len(updates)
    assert made.balancer.moved_slots == sum(update.moves for update in updates)
    one_expert = 4 * (16 * 2 * 8 + 8 * 16)  # float32: gate and up, and down
    assert made.balancer.moved_bytes == made.balancer.moved_slots * one_expert
    assert (table_of(made) != np.asarray(placement().slot_to_expert)).any()
    assert weights_fit(made)
    assert len(made.balancer.stalls) == made.balancer.iteration


@pytest.mark.parametrize(("layers", "moving"), [(1, 1), (1, 2), (2, 3)])
def test_a_placement_is_in_force_from_the_iteration_that_was_fixed_beforehand(layers, moving):
    events, tables = [], [np.asarray(placement().slot_to_expert)]
    config = BalancerConfig(
        layer_updates_per_iter=layers, planning_iterations=3, moving_iterations=moving
    )
    made = engine(config, listeners=[events.append])
    made.run(REQUESTS, on_progress=lambda _: tables.append(table_of(made)))
    made.balancer.flush()
    # Progress is heard one step late; the last two steps are heard after the loop.
    changes = [i for i in range(1, len(tables)) if (tables[i] != tables[i - 1]).any()]
    updates = [event for event in events if isinstance(event, LayerUpdate)]
    assert changes == sorted({update.step for update in updates})
    # Two layers at a time are all there are: their next update leaves before this one is in force.
    least = 3 + moving if layers == 1 else 4
    assert {update.step - update.decided_at for update in updates} >= {least}
    assert all(least <= u.step - u.decided_at <= 3 + moving for u in updates)
    assert updates[0].decided_at == 1
    assert weights_fit(made)


def test_rows_are_sent_behind_the_step_which_does_not_wait_for_that(monkeypatch):
    made, events = engine(), []

    def told(name, function):
        def run(*args, **keywords):
            events.append(name)
            return function(*args, **keywords)

        return run

    monkeypatch.setattr(made, "_launch", told("launch", made._launch))
    for name in ("between_steps", "after_step"):
        monkeypatch.setattr(made.balancer, name, told(name, getattr(made.balancer, name)))
    monkeypatch.setattr(flight, "stage_moves", told("send", stage_moves))
    made.run(REQUESTS)
    sent = [i for i, name in enumerate(events) if name == "send"]
    assert sent
    before = [[x for x in events[:i] if x != "send"] for i in sent]
    assert all(x[-3:] == ["between_steps", "launch", "after_step"] for x in before)


def test_the_effect_told_is_what_was_measured():
    events = []
    made = engine(BalancerConfig(layer_updates_per_iter=1), listeners=[events.append])
    recorder = made.recorder()
    made.run(REQUESTS, recorder=recorder)
    made.balancer.flush()
    kept = recorder.recording()
    assert kept.placement is None  # there was no single one
    tokens = kept.rank_tokens
    measured = tokens.max(axis=2) / tokens.mean(axis=2) - 1
    seen = np.array([event.imbalance for event in events if isinstance(event, StepSeen)])
    np.testing.assert_allclose(seen, measured)
    for update in (event for event in events if isinstance(event, LayerUpdate)):
        layer = update.layer - 1
        later = [u.step for u in events if isinstance(u, LayerUpdate) and u.layer == update.layer]
        later = [step for step in later if step > update.step] + [len(measured)]
        after = measured[update.step : min(update.step + 10, min(later)), layer]
        assert update.imbalance_after == pytest.approx(after.mean())


def test_two_balancers_that_see_the_same_counts_decide_alike():
    seen = []
    for _ in range(2):
        tables = []
        made = engine()
        made.run(REQUESTS, on_progress=lambda _, made=made, to=tables: to.append(table_of(made)))
        seen.append(tables)
    np.testing.assert_array_equal(seen[0], seen[1])


def test_zero_updates_are_static_and_still_watch():
    events = []
    made = engine(BalancerConfig(), listeners=[events.append])
    assert outputs(made) == unbalanced()
    made.balancer.flush()
    assert not any(isinstance(event, LayerUpdate | Look) for event in events)
    assert sum(isinstance(event, StepSeen) for event in events) == made.balancer.iteration
    assert made.balancer.state.iteration == made.balancer.iteration
    np.testing.assert_array_equal(table_of(made), placement().slot_to_expert)


def test_warming_up_and_the_interval_say_when():
    events = []
    config = BalancerConfig(layer_updates_per_iter=2, warm_up_iterations=9, step_interval=5)
    made = engine(config, listeners=[events.append])
    made.run(REQUESTS)
    made.balancer.flush()
    looks = [event.step + 1 for event in events if isinstance(event, Look)]
    assert looks == list(range(14, made.balancer.iteration + 1, 5))


def fail(*args, **keywords):
    raise RuntimeError("broken on purpose")


def fail_in(monkeypatch, stage):
    where = {
        "planning": (deciding, "plan"),
        "staging": (flight, "stage_moves"),
        "flip": (flight, "apply_moves"),
    }
    monkeypatch.setattr(*where[stage], fail)


STAGES = ("planning", "staging", "flip")


@pytest.mark.parametrize("stage", STAGES)
def test_a_failure_stops_the_run_with_an_error_and_the_old_placement_serves_on(
    monkeypatch, caplog, stage
):
    events = []
    made = engine(listeners=[events.append])
    with monkeypatch.context() as patch:
        fail_in(patch, stage)
        with (
            caplog.at_level(logging.ERROR),
            pytest.raises(BalancerError, match=f"{stage} failed: RuntimeError: broken on purpose"),
        ):
            made.run(REQUESTS)
    first = next(event for event in events if isinstance(event, Failure))
    assert first.stage == stage
    assert "broken on purpose" in first.error
    assert any("broken on purpose" in record.message for record in caplog.records)
    np.testing.assert_array_equal(table_of(made), placement().slot_to_expert)
    assert weights_fit(made)
    # Mended, it goes on, balancing again.
    assert outputs(made) == unbalanced()
    assert made.balancer.updates > 0
    assert weights_fit(made)


@pytest.mark.parametrize("stage", STAGES)
def test_where_failures_do_not_stop_the_run_they_are_told_each_time(monkeypatch, stage):
    events = []
    config = BalancerConfig(layer_updates_per_iter=1, stop_on_failure=False)
    made = engine(config, listeners=[events.append])
    fail_in(monkeypatch, stage)
    assert outputs(made) == unbalanced()
    made.balancer.flush()
    failures = [event for event in events if isinstance(event, Failure)]
    assert len(failures) > 1
    assert {event.stage for event in failures} == {stage}
    assert not any(isinstance(event, LayerUpdate) for event in events)
    np.testing.assert_array_equal(table_of(made), placement().slot_to_expert)
    assert weights_fit(made)


@pytest.mark.parametrize("which", [1, 2])
def test_a_flip_that_fails_half_way_leaves_the_old_weights(monkeypatch, which):
    monkeypatch.setattr(working, "SLOTS_AT_ONCE", 1)  # so that an update takes several programs
    made = engine(BalancerConfig(layer_updates_per_iter=2))
    turn, write = iter(range(1000)), staging.write_rows

    def failing(*args, **keywords):
        if next(turn) == which:
            raise MemoryError("no room")
        return write(*args, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(staging, "write_rows", failing)
        with pytest.raises(BalancerError, match=r"flip failed: .*MemoryError: no room"):
            made.run(REQUESTS)
    assert next(turn) > which + 1  # what had been written was put back
    np.testing.assert_array_equal(table_of(made), placement().slot_to_expert)
    assert weights_fit(made)
    assert outputs(made) == unbalanced()
    assert made.balancer.updates > 0
    assert weights_fit(made)


def test_weights_that_a_flip_used_up_are_said_to_be_lost(monkeypatch):
    events, write = [], staging.write_rows
    made = engine(listeners=[events.append])

    def failing(*args, **keywords):
        write(*args, **keywords)
        raise MemoryError("after the banks were given away")

    monkeypatch.setattr(staging, "write_rows", failing)
    try:
        with pytest.raises(RebalanceError, match=r"given away\. The weights are lost; place them"):
            made.run(REQUESTS)
    finally:
        bare_engine.cache_clear()
    assert [event.stage for event in events if isinstance(event, Failure)] == ["flip"]


@pytest.mark.parametrize("wrong", [np.nan, -1000.0])
def test_counts_that_are_none_stop_the_engine_and_it_can_serve_again(wrong):
    made = engine()
    launch, turn = made._launch, iter(range(1000))

    def failing(plan):
        tokens, expert_tokens, rank_tokens = launch(plan)
        if next(turn) == 7:
            expert_tokens = np.array(expert_tokens, np.float32)
            expert_tokens[0, 0, 5] = wrong
        return tokens, expert_tokens, rank_tokens

    made._launch = failing
    try:
        with pytest.raises(BalancerError, match=r"counts failed: .*iteration 7, layer 1, expert 5"):
            made.run(REQUESTS)
    finally:
        del made._launch
    assert np.isfinite(made.balancer.state.load).all()
    assert weights_fit(made)
    assert outputs(made) == unbalanced()


def test_processes_that_decide_differently_stop_before_anything_moves():
    asked = itertools.count()

    def gather(own):  # they agree on where they begin
        return np.stack([own, own + np.uint32(next(asked) > 0)])

    made = engine(gather=gather)
    with pytest.raises(DigestMismatch, match="another placement than process"):
        made.run(REQUESTS)
    np.testing.assert_array_equal(table_of(made), placement().slot_to_expert)
    assert weights_fit(made)


def test_processes_that_begin_differently_are_told_at_once():
    with pytest.raises(DigestMismatch, match=r"iteration 0: .* than process"):
        engine(gather=lambda own: np.stack([own, own + np.uint32(1)]))


def test_every_look_is_compared_and_its_answer_read_an_iteration_later():
    config = BalancerConfig(layer_updates_per_iter=1, step_interval=4)
    asked, read, made = [], [], None

    class Answer:
        def __init__(self, own):
            self.own = own

        def __array__(self, dtype=None, copy=None):
            read.append(0 if made is None else made.balancer.iteration)
            return self.own[None]

    def gather(own):
        asked.append(0 if made is None else made.balancer.iteration)
        return Answer(own)

    made = engine(config, gather=gather)
    made.run(REQUESTS)
    # Before the first iteration, and then as soon as planning was given its time.
    last, first = made.balancer.iteration, 4 + config.planning_iterations
    assert asked == [0, *range(first, last, 4)]
    assert read == [0, *(n + 1 for n in asked[1:] if n + 1 < last)]
    assert made.balancer.moved_slots > 0
    assert outputs(made) == unbalanced()


def test_a_load_that_is_not_a_number_is_refused_and_the_one_before_kept():
    balancer = Balancer(placement(), ONE, split="even")
    counts, tokens = np.ones((4, 2, 16), np.float32), np.full((4, 2), 12)
    balancer.after_step(counts, tokens)
    before = balancer.state.load
    bad = counts.copy()
    bad[1, 1, 5] = np.nan
    balancer.after_step(bad, tokens)
    np.testing.assert_array_equal(balancer.state.load, before)
    for _ in range(3):
        balancer.after_step(counts, tokens)
    balancer.between_steps({}, None)
    with pytest.raises(BalancerError, match=r"counts failed: .*layer 2, expert 5: a count of nan"):
        balancer.flush()


def test_a_placement_of_another_model_is_refused_and_the_old_one_stays():
    balancer = Balancer(placement(), ONE)
    other = Placement.default(num_experts=12, num_slots=24, num_ranks=4, layer_ids=(1, 2))
    with pytest.raises(ValueError, match="the placement has num_experts 12, the balancer's 16"):
        balancer.reset(other)
    assert balancer.placement.num_experts == 16


def test_a_placement_put_in_force_by_hand_is_what_plans_start_from():
    made = engine()
    made.run(REQUESTS)
    by_hand = np.asarray(placement().slot_to_expert)[:, ::-1]
    made.use_placement(
        Placement.from_slots(by_hand, num_experts=16, num_ranks=4, layer_ids=CONFIG.moe_layer_ids)
    )
    np.testing.assert_array_equal(made.balancer.state.table, by_hand)
    assert outputs(made) == unbalanced()
    assert weights_fit(made)


def test_a_horizon_needs_the_cost_of_a_token_and_takes_it_from_the_settings_first():
    params = bare_engine()._params
    with pytest.raises(ValueError, match="give seconds_per_token"):
        Balancer(placement(), BalancerConfig(layer_updates_per_iter=1, horizon=5)).prepare(params)
    config = BalancerConfig(
        layer_updates_per_iter=1, horizon=5, seconds_per_token=2e-6, bytes_per_second=3e9
    )
    balancer = Balancer(placement(), config, split="even")
    balancer.prepare(params, seconds_per_token=1.0)
    assert balancer.costs == (2e-6, 3e9, 1536)


def test_the_engine_measures_what_a_horizon_needs():
    config = BalancerConfig(layer_updates_per_iter=1, horizon=1)
    made = Engine(
        tiny_decoder(),
        mesh=expert_mesh(4),
        placement=placement(),
        serving=ServingConfig(max_batch_size=4, max_length=40),
        balancer=config,
    )
    costs = made.balancer.costs
    assert costs.seconds_per_token > 0
    assert costs.bytes_per_second > 0
    assert costs.bytes_per_slot == 1536


def test_a_balancer_that_was_not_prepared_says_so():
    unbalanced()  # on the same engine, so before it has a balancer
    made = bare_engine()
    made.balancer = None
    made.use_placement(placement())
    made.balancer = Balancer(placement(), ONE, split="even")
    with pytest.raises(BalancerError, match=r"call prepare\(params\) first"):
        made.run(REQUESTS)
