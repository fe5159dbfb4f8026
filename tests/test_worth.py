"""Gain against cost: seconds saved on the fullest rank, seconds of moving."""

import numpy as np
import pytest

from jax_eplb.online.worth import Costs, seconds_saved, seconds_to_move, worth_moving

COSTS = Costs(seconds_per_token=2e-6, bytes_per_second=5e8, bytes_per_slot=1_000_000)


def test_what_is_saved_is_the_fullest_ranks_tokens_times_their_cost():
    rank_tokens = {"before": np.array([30, 10, 8, 12]), "after": np.array([17, 15, 13, 15])}
    mean = 15.0
    before, after = (tokens.max() / mean - 1 for tokens in rank_tokens.values())
    saved = seconds_saved(np.array([before]), np.array([after]), np.array([mean]), COSTS)
    np.testing.assert_allclose(saved, [(30 - 17) * 2e-6])


def test_moves_cost_their_bytes_over_the_bandwidth():
    np.testing.assert_allclose(seconds_to_move(np.array([0, 1, 7]), COSTS), [0, 2e-3, 14e-3])


@pytest.mark.parametrize(("horizon", "worth"), [(1, False), (99, False), (101, True)])
def test_moves_are_worth_it_from_the_iteration_on_in_which_they_have_paid(horizon, worth):
    saved, cost = np.array([2e-5]), np.array([2e-3])  # paid back after 100 iterations
    assert worth_moving(saved, cost, horizon).tolist() == [worth]


def test_without_a_horizon_every_gain_counts_and_no_loss_does():
    saved = np.array([1e-12, 0.0, -1.0])
    assert worth_moving(saved, np.full(3, 1e9), None).tolist() == [True, False, False]
