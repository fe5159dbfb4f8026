import json

import numpy as np
import pytest

from jax_eplb import Recording
from jax_eplb.simulate import STATIC, Costs, every, online, recommend
from jax_eplb.simulate.recommend import (
    choose,
    divide_window,
    policies_to_try,
    slots_to_try,
)
from jax_eplb.simulate.simulation import Outcome
from tests.simulation_cases import (
    HISTORY,
    NUM_RANKS,
    NUM_SLOTS,
    changing_counts,
    changing_recording,
    uniform_recording,
)

pytestmark = pytest.mark.light_compile

# One size, whose programs other tests compile, too.
QUICK = {
    "num_ranks": NUM_RANKS,
    "num_slots": [NUM_SLOTS],
    "replica_choices": ["even"],
    "intervals": [1],
    "decays": [0.5],
    "max_moves": [None, 2],
    "history": HISTORY,
}
# Moves for next to nothing, and no reading of weights.
CHEAP = Costs(
    1e6,
    bytes_per_expert=1.0,
    bytes_per_second=1e12,
    memory_bytes_per_second=1e12,
    attention_share=0,
)


def outcome(gain: float, num_slots: int, policy=STATIC, choice: str = "balanced") -> Outcome:
    """Of one window, with nothing but the gain that is asked for."""
    one = np.ones(1)
    return Outcome(
        policy=policy,
        num_slots=num_slots,
        num_ranks=2,
        replica_choice=choice,
        imbalance=np.zeros((1, 1)),
        moves=np.zeros((1, 1)),
        step_seconds=one / (1 + gain),
        move_seconds=0 * one,
        unbalanced_imbalance=np.zeros((1, 1)),
        unbalanced_seconds=one,
        steps_per_window=1,
    )


@pytest.mark.slow
def test_a_load_that_changes_is_to_be_followed():
    advice = recommend(changing_recording(), costs=CHEAP, **QUICK)
    made = advice.recommendation
    assert made.balance
    assert made.replan_every == 1
    assert made.num_slots == NUM_SLOTS
    assert made.replica_choice == "even"
    assert made.expected_gain == advice.chosen.gain > 0.05
    assert made.imbalance_after < made.imbalance_before
    assert "2 redundant experts per 2 ranks (8 slots), re-plan every iteration" in made.reason
    assert f"expected {100 * made.expected_gain:+.1f}% (standard error" in made.reason
    assert "Balancing is not worth it below" in made.reason
    assert json.loads(json.dumps(made.to_json()))["balance"] is True


@pytest.mark.slow
def test_where_only_chance_is_uneven_the_answer_is_no():
    made = recommend(uniform_recording(), costs=CHEAP, **QUICK).recommendation
    assert not made.balance
    assert made.reason.startswith("Don't balance: the best of 3 settings")
    assert "less than 5% is not worth it" in made.reason


@pytest.mark.slow
def test_who_cannot_divide_by_load_is_told_what_remains():
    advice = recommend(
        changing_recording(), costs=CHEAP, **{**QUICK, "replica_choices": ["even", "balanced"]}
    )
    made = advice.recommendation
    assert made.replica_choice == "balanced"
    in_turn = [outcome for outcome in advice.outcomes if outcome.replica_choice == "even"]
    assert made.expected_gain_even == choose(in_turn).gain
    assert 0 < made.expected_gain_even < made.expected_gain
    said = f"replica choice even: expected {100 * made.expected_gain_even:+.1f}%."
    assert made.reason.endswith(said)


def test_a_gain_within_its_error_is_no_gain():
    # One window in which everything is on one rank, and the rest even: chance, for all one knows.
    counts = np.full((12, 2, 6), 100)
    counts[7] = [600, 0, 0, 0, 0, 0]
    recording = Recording(counts, num_experts=6, experts_per_token=2)
    advice = recommend(recording, costs=CHEAP, min_gain=0.0, **{**QUICK, "intervals": []})
    assert advice.chosen.gain <= 2 * advice.chosen.gain_error
    assert not advice.recommendation.balance
    assert "may be chance" in advice.recommendation.reason


def test_one_window_is_divided_and_says_nothing_of_time():
    counts = changing_counts().sum(axis=0, keepdims=True)
    recording = Recording(counts, num_experts=6, experts_per_token=2)
    parts = divide_window(recording, 4).counts
    assert parts.shape == (4, 2, 6)
    np.testing.assert_array_equal(parts.sum(axis=0), counts[0])
    np.testing.assert_allclose(parts, np.broadcast_to(counts / 4, parts.shape), atol=150)
    np.testing.assert_array_equal(parts, divide_window(recording, 4).counts)
    made = recommend(recording, costs=CHEAP, **{**QUICK, "intervals": []}).recommendation
    assert made.replan_every is None
    assert made.reason.endswith(
        "The recording is one window, so it says nothing of change over time."
    )


def test_few_windows_give_no_error_and_say_so():
    recording = changing_recording().keep(range(5))
    made = recommend(recording, costs=CHEAP, **{**QUICK, "intervals": []}).recommendation
    assert made.gain_error is None
    assert "Only 2 of the windows could be scored" in made.reason


def test_the_cheapest_of_those_nearly_as_good_is_taken():
    much, little = outcome(0.50, 12), outcome(0.46, 10)
    assert choose([much, little]) is little
    assert choose([much, outcome(0.44, 10)]) is much
    often, seldom = outcome(0.50, 10, every(1)), outcome(0.47, 10, every(16))
    assert choose([often, seldom]) is seldom
    assert choose([seldom, outcome(0.46, 10)]).policy == STATIC
    in_turn = outcome(0.48, 10, choice="even")
    assert choose([outcome(0.5, 10), in_turn]) is in_turn


def test_nothing_gained_is_still_the_best_of_what_there_is():
    assert choose([outcome(-0.2, 8), outcome(-0.1, 10)]).num_slots == 10


def test_what_is_tried_fits_the_model_and_the_recording():
    assert slots_to_try(8, 8) == [8, 16]
    assert slots_to_try(6, 4) == [8, 12, 16]
    following = [online(decay, moves) for decay in (0.5, 0.8, 0.95) for moves in (4, None)]
    assert policies_to_try(8, scored=3) == [STATIC, *following]
    assert policies_to_try(4, scored=1) == [STATIC]


def test_what_is_given_is_tried_with_the_defaults_of_the_rest():
    slow = policies_to_try(8, scored=3, intervals=[16])
    assert slow == [STATIC, *(online(d, m, 16) for d in (0.5, 0.8, 0.95) for m in (4, None))]
    assert policies_to_try(8, 12, decays=[0.9], max_moves=[3]) == [
        STATIC,
        *(online(0.9, 3, interval) for interval in (1, 4)),
    ]
