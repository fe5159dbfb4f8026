"""Scenarios: shares of what was seen, the same on every process."""

import jax.numpy as jnp
import numpy as np
import pytest

from jax_eplb.planner.scenarios import draw_scenarios, enough_scenarios, power_mean

pytestmark = pytest.mark.light_compile

W, L, E = 3, 2, 5
NUM = 7


def windows():
    return np.random.default_rng(0).lognormal(0, 1, (W, L, E)).astype(np.float32)


def draw(windows, noise=0.2):
    return np.asarray(draw_scenarios(windows, num_scenarios=NUM, noise=noise))


def test_scenarios_are_shares_near_their_window():
    drawn = draw(windows())
    assert drawn.shape == (NUM, L, E)
    np.testing.assert_allclose(drawn.sum(axis=2), 1, rtol=1e-6)
    share = windows() / windows().sum(axis=2, keepdims=True)
    # In turn, each multiplied by lognormal(0, 0.2): by e at most, five times the deviation.
    ratio = drawn / share[np.arange(NUM) % W]
    assert (np.abs(np.log(ratio)) < 1).all()
    # Repetitions of a window are blurred anew.
    assert np.abs(drawn[0] - drawn[W]).max() > 1e-3


def test_the_same_windows_give_the_same_scenarios_whatever_their_scale():
    np.testing.assert_array_equal(draw(windows()), draw(windows()))
    np.testing.assert_allclose(draw(1024 * windows()), draw(windows()), rtol=1e-6)


def test_without_noise_they_are_the_windows_in_turn():
    share = windows() / windows().sum(axis=2, keepdims=True)
    np.testing.assert_allclose(draw(windows(), noise=0.0), share[np.arange(NUM) % W], rtol=1e-6)


def test_many_windows_are_taken_evenly_from_first_to_last():
    # The share of expert 0 tells the window.
    at = np.arange(13.0)
    many = np.stack([at, 12 - at], axis=1)[:, None].astype(np.float32)
    drawn = draw(many, noise=0.0)[:, 0, 0] * 12
    np.testing.assert_allclose(drawn, [0, 2, 4, 6, 8, 10, 12], atol=1e-5)


def test_a_window_without_tokens_is_the_mean_of_the_others():
    some = windows()
    some[1, 0] = 0
    some[:, 1] = 0
    drawn = draw(some, noise=0.0)
    share = some[[0, 2], 0] / some[[0, 2], 0].sum(axis=1, keepdims=True)
    np.testing.assert_allclose(drawn[1, 0], share.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(drawn[:, 1], 1 / E, rtol=1e-6)


@pytest.mark.parametrize(("number", "enough"), [(1, 64), (64, 64), (65, 65), (129, 128)])
def test_there_are_64_to_128(number, enough):
    assert enough_scenarios(number) == enough


@pytest.mark.parametrize("power", [1.0, 2.0, 6.0])
def test_the_power_mean_is_numpys(power):
    share = windows().astype(np.float64)
    expected = (share**power).mean(axis=0) ** (1 / power)
    found = power_mean(jnp.array(share, jnp.float32), jnp.float32(power))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_high_power_is_the_peak_and_small_shares_survive_it():
    share = jnp.array([[[1e-12, 0.5]], [[2e-12, 0.25]]])
    found = power_mean(share, jnp.float32(200))
    np.testing.assert_allclose(found[0], [2e-12, 0.5], rtol=1e-2)
    assert power_mean(jnp.zeros((2, 1, 1)), jnp.float32(3)).tolist() == [[0.0]]
