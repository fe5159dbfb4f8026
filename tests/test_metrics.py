import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from jax_eplb import metrics

pytestmark = pytest.mark.light_compile

FUNCTIONS = (
    metrics.imbalance,
    metrics.spread,
    metrics.balancedness_mean_of_ratios,
    metrics.balancedness_ratio_of_sums,
)
jitted = functools.cache(jax.jit)
tokens = arrays(
    np.int64,
    array_shapes(min_dims=3, max_dims=3, max_side=4),
    elements=st.integers(0, 10**6),
)


def test_imbalance_is_how_far_the_fullest_rank_is_above_the_mean():
    assert metrics.imbalance(np.array([[4, 2, 2, 0], [1, 1, 1, 1]])).tolist() == [1.0, 0.0]


def test_everything_on_one_rank_is_ranks_less_one():
    assert metrics.imbalance(np.eye(8)[3] * 1000) == 7


def test_imbalance_is_zero_without_tokens():
    assert metrics.imbalance(np.zeros((2, 3))).tolist() == [0, 0]


def test_with_speeds_the_ranks_times_are_compared():
    tokens, capacity = np.array([[60, 20, 20], [40, 40, 9]]), np.array([2.0, 1.0, 0.0])
    # Without what the last one has: 80 tokens for 3 ranks of speed 1, of which one takes 30.
    expected = [30 / (80 / 3) - 1, 40 / (80 / 3) - 1]
    for function in (np.asarray, jnp.asarray):
        found = metrics.imbalance(function(tokens), function(capacity))
        np.testing.assert_allclose(found, expected, rtol=1e-6)
        even = metrics.balancedness_mean_of_ratios(function(tokens), function(capacity))
        assert float(even) == pytest.approx((80 / 90 + 80 / 120) / 2)
    for function in (metrics.imbalance, metrics.balancedness_mean_of_ratios):
        np.testing.assert_allclose(function(tokens, np.ones(3)), function(tokens))


def test_spread_is_the_sample_deviation():
    assert metrics.spread(np.array([1, 2, 3, 4])) == pytest.approx(np.sqrt(5 / 3))


def test_a_single_rank_has_no_spread():
    assert metrics.spread(np.array([[5], [7]])).tolist() == [0, 0]
    assert metrics.spread(jnp.array([[5], [7]])).tolist() == [0, 0]


def test_the_two_balancednesses_differ_where_layers_differ_in_load():
    layers = np.array([[3, 1], [40, 40]])
    assert metrics.balancedness_mean_of_ratios(layers) == pytest.approx((2 / 3 + 1) / 2)
    assert metrics.balancedness_ratio_of_sums(layers) == pytest.approx(42 / 43)


@pytest.mark.parametrize("function", FUNCTIONS[2:])
def test_balancedness_is_one_without_tokens(function):
    assert function(np.zeros((2, 3, 4))).tolist() == [1, 1]


def test_a_layer_without_tokens_counts_as_balanced_in_the_mean_of_ratios():
    assert metrics.balancedness_mean_of_ratios(np.array([[2, 0], [0, 0]])) == 0.75


# Of few shapes, as each compiles anew: one rank, one of everything, and more.
@given(
    st.sampled_from([(1, 1, 1), (3, 2, 1), (2, 3, 4)]).flatmap(
        lambda shape: arrays(np.int64, shape, elements=st.integers(0, 10**6))
    )
)
def test_jax_and_numpy_agree(counts):
    for function in FUNCTIONS:
        expected = function(counts)
        assert expected.dtype == np.float64
        on_device = jitted(function)(jnp.asarray(counts))
        assert on_device.dtype == jnp.float32
        np.testing.assert_allclose(on_device, expected, rtol=1e-5, atol=1e-5 * counts.max())


@given(tokens)
def test_values_lie_in_their_ranges(counts):
    ranks = counts.shape[-1]
    assert (metrics.imbalance(counts) >= -1e-12).all()
    assert (metrics.imbalance(counts) <= ranks - 1 + 1e-12).all()
    for function in FUNCTIONS[2:]:
        assert (function(counts) >= 1 / ranks - 1e-12).all()
        assert (function(counts) <= 1 + 1e-12).all()


@given(tokens)
def test_summary_agrees_with_loops(counts):
    summary = metrics.summarize(counts)
    rows = []
    for layer in range(counts.shape[1]):
        seen = [row for row in counts[:, layer].astype(float) if row.sum()]
        means = [row.mean() for row in seen]
        deviations = [row.std(ddof=1) if row.size > 1 else 0.0 for row in seen]
        ratios = [(row.max() - row.mean()) / row.mean() for row in seen]
        row = np.array([np.mean(x) if seen else 0.0 for x in (means, deviations, ratios)])
        figures = (summary.mean[layer], summary.std[layer], summary.imbalance[layer])
        np.testing.assert_allclose(figures, row, rtol=1e-9, atol=1e-12)
        if seen:
            rows.append(row)
    average = np.mean(rows, axis=0) if rows else np.zeros(3)
    np.testing.assert_allclose(summary.average, average, rtol=1e-9, atol=1e-12)


def test_a_silent_iteration_does_not_dilute_the_summary():
    busy = np.array([[[3, 1], [5, 5]]])
    silent = np.array([[[0, 0], [6, 4]]])
    summary = metrics.summarize(np.concatenate([busy, silent]))
    assert summary.imbalance.tolist() == pytest.approx([0.5, 0.1])
    assert summary.mean.tolist() == [2, 5]


def test_summary_refuses_another_number_of_axes():
    with pytest.raises(ValueError, match=r"shape \(2, 3\); expected \[windows, layers, ranks\]"):
        metrics.summarize(np.zeros((2, 3)))


def test_chance_agrees_with_the_normal_approximation_for_two_ranks():
    # E|2X - n| / n of a fair binomial X tends to sqrt(2 / (pi n)).
    figure = metrics.chance_imbalance(10_000, 2, samples=20_000)
    assert float(figure) == pytest.approx(np.sqrt(2 / (np.pi * 10_000)), rel=0.03)


def test_chance_falls_with_tokens_and_rises_with_ranks():
    by_tokens = metrics.chance_imbalance(np.array([[10, 100], [1_000, 10_000]]), 8)
    assert by_tokens.shape == (2, 2)
    assert (np.diff(by_tokens.reshape(-1)) < 0).all()
    assert metrics.chance_imbalance(1_000, 32) > metrics.chance_imbalance(1_000, 8)


def test_chance_is_zero_on_one_rank_and_without_tokens():
    assert metrics.chance_imbalance(1_000, 1) == 0
    assert metrics.chance_imbalance(0, 8) == 0


def test_chance_depends_on_its_own_value_and_the_seed_alone():
    alone = metrics.chance_imbalance(np.array([500]), 8)[0]
    assert metrics.chance_imbalance(np.array([20, 500, 500]), 8).tolist()[1:] == [alone, alone]
    assert metrics.chance_imbalance(500, 8, seed=1) != alone
