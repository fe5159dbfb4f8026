import dataclasses

import numpy as np
import pytest

from jax_eplb import Placement, Recording, plan
from jax_eplb.report import rank_tokens
from jax_eplb.simulate import NONE, STATIC, Costs, bound_of, every, online, simulate, sweep
from tests.simulation_cases import (
    HISTORY,
    NUM_RANKS,
    NUM_SLOTS,
    changing_counts,
    changing_recording,
)

pytestmark = pytest.mark.light_compile

SIZE = {"num_ranks": NUM_RANKS, "num_slots": NUM_SLOTS}
COSTS = Costs(1e6, bytes_per_expert=1e5, bytes_per_second=1e9, attention_share=0.3)


def test_a_static_plan_is_that_of_the_history_scored_on_the_rest():
    outcome = simulate(changing_recording(), STATIC, history=HISTORY, **SIZE)
    planned = plan(changing_counts()[:HISTORY], NUM_SLOTS, NUM_RANKS, effort="fast").placement
    tokens = rank_tokens(changing_recording(), placement=planned)[HISTORY:]
    np.testing.assert_allclose(
        outcome.imbalance, tokens.max(axis=2) / tokens.mean(axis=2) - 1, atol=2e-6
    )
    assert outcome.moves.sum() == 0 == outcome.move_seconds.sum()


def test_none_gains_nothing_but_what_its_spare_slots_give():
    recording = changing_recording()
    fewest = simulate(recording, NONE, num_ranks=NUM_RANKS, history=HISTORY, costs=COSTS)
    assert fewest.gain == pytest.approx(0, abs=1e-6)
    spare = simulate(recording, NONE, history=HISTORY, costs=COSTS, **SIZE)
    layout = Placement.default(num_experts=6, num_ranks=2, num_slots=8, layer_ids=(0, 1))
    tokens = rank_tokens(recording, placement=layout)[HISTORY:]
    expected = (tokens.max(axis=2) / tokens.mean(axis=2) - 1).mean()
    assert spare.mean_imbalance == pytest.approx(expected, abs=1e-6)


def test_the_gain_is_time_without_over_time_with_moves():
    outcome = simulate(changing_recording(), every(1), history=HISTORY, costs=COSTS, **SIZE)
    counts = changing_counts()[HISTORY:]
    mean = counts.sum(axis=2) / NUM_RANKS / COSTS.tokens_per_second

    def seconds(imbalance):
        return (mean * (1 + imbalance + 0.3 / 0.7)).sum()

    ranks = counts.reshape(*counts.shape[:2], NUM_RANKS, -1).sum(axis=3)
    without = seconds(ranks.max(axis=2) / ranks.mean(axis=2) - 1)
    steps = seconds(outcome.imbalance)
    moves = outcome.move_seconds.sum()
    assert moves > 0
    assert outcome.gain == pytest.approx(without / (steps + moves) - 1, rel=1e-5)
    assert outcome.gain_without_moves == pytest.approx(without / steps - 1, rel=1e-5)
    assert outcome.move_share == pytest.approx(moves / (steps + moves), rel=1e-5)
    # A rank's share of a plan's moves, at least half of them here, at 0.1 ms each.
    by_window = outcome.moves.sum(axis=1)
    assert (outcome.move_seconds >= by_window / NUM_RANKS * 1e-4 - 1e-12).all()
    assert (outcome.move_seconds <= by_window * 1e-4 + 1e-12).all()


def test_more_iterations_in_a_window_make_moves_cheaper():
    one, many = (
        simulate(
            changing_recording(),
            every(1),
            history=HISTORY,
            costs=COSTS,
            steps_per_window=steps,
            **SIZE,
        )
        for steps in (1, 10)
    )
    assert many.gain_without_moves == pytest.approx(one.gain_without_moves)
    assert one.gain < many.gain < many.gain_without_moves


def test_tokens_of_an_iteration_scale_time_and_not_imbalance():
    usual = simulate(changing_recording(), STATIC, history=HISTORY, costs=COSTS, **SIZE)
    tokens = changing_counts()[HISTORY:].sum(axis=2).mean() / 2  # top 2
    scaled = simulate(
        changing_recording(),
        STATIC,
        history=HISTORY,
        costs=COSTS,
        tokens_per_step=10 * tokens,
        **SIZE,
    )
    np.testing.assert_allclose(scaled.step_seconds, 10 * usual.step_seconds)
    np.testing.assert_array_equal(scaled.imbalance, usual.imbalance)


def test_the_error_is_that_of_a_jackknife_over_parts():
    outcome = simulate(changing_recording(), STATIC, history=HISTORY, **SIZE)
    with_, without = outcome.seconds, outcome.unbalanced_seconds  # 9 windows: a part each
    left = [np.delete(without, i).sum() / np.delete(with_, i).sum() - 1 for i in range(len(with_))]
    expected = np.sqrt(8 / 9 * ((np.array(left) - np.mean(left)) ** 2).sum())
    assert outcome.gain_error == pytest.approx(expected)
    two = dataclasses.replace(
        outcome,
        step_seconds=outcome.step_seconds[:2],
        move_seconds=outcome.move_seconds[:2],
        unbalanced_seconds=outcome.unbalanced_seconds[:2],
    )
    assert np.isnan(two.gain_error)
    assert two.to_json()["gain_error"] is None


def test_a_sweep_gives_what_each_policy_gives_alone():
    policies = [NONE, STATIC, online(0.5, 2), every(4), online(0.8)]
    together = list(
        sweep(
            changing_recording(),
            policies,
            num_ranks=[NUM_RANKS],
            num_slots=[NUM_SLOTS],
            replica_choices=["even", "balanced"],
            history=HISTORY,
        )
    )
    assert len(together) == 10
    assert {(o.policy, o.replica_choice) for o in together} == {
        (policy, choice) for policy in policies for choice in ("even", "balanced")
    }
    by_name = {(o.policy, o.replica_choice): o for o in together}
    for policy in policies:
        alone = simulate(changing_recording(), policy, history=HISTORY, **SIZE)
        np.testing.assert_array_equal(by_name[policy, "even"].imbalance, alone.imbalance)
        np.testing.assert_array_equal(by_name[policy, "even"].moves, alone.moves)
        balanced = by_name[policy, "balanced"]
        assert balanced.mean_imbalance <= alone.mean_imbalance + 1e-6
        np.testing.assert_array_equal(balanced.moves, alone.moves)


@pytest.mark.parametrize("choice", ["even", "balanced"])
def test_no_policy_is_below_the_bound(choice):
    bound = bound_of(changing_recording(), history=HISTORY, replica_choice=choice, **SIZE)
    oracle = simulate(changing_recording(), every(1), history=HISTORY, **SIZE)
    assert 0 <= bound <= oracle.mean_imbalance
    alone = bound_of(
        changing_recording(), num_ranks=6, num_slots=6, history=HISTORY, replica_choice=choice
    )
    counts = changing_counts()[HISTORY:]
    assert alone == pytest.approx((counts.max(axis=2) / counts.mean(axis=2) - 1).mean(), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"history": 12}, "history is 12 of 12 windows; use 1 to 11"),
        ({"history": 0}, "history is 0 of 12 windows"),
        ({"replica_choice": "local"}, "replica choice 'local' must be 'even' or 'balanced'"),
        ({"num_slots": 9}, "9 slots"),
    ],
)
def test_what_cannot_be_replayed_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        simulate(changing_recording(), STATIC, **{**SIZE, **options})


def test_recordings_with_nothing_to_score_are_refused():
    counts = changing_counts()
    one = Recording(counts[:1], num_experts=6, experts_per_token=2)
    with pytest.raises(ValueError, match="the recording has one window"):
        simulate(one, STATIC, **SIZE)
    counts[HISTORY:] = 0
    idle = Recording(counts, num_experts=6, experts_per_token=2)
    with pytest.raises(ValueError, match="no tokens in the windows from number 3 on"):
        simulate(idle, STATIC, history=HISTORY, **SIZE)
