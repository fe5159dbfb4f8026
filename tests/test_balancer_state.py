"""What the balancer knows: the fading load, windows, turns, triggers, and what it refuses."""

import numpy as np
import pytest

from jax_eplb import Placement
from jax_eplb.online import BalancerConfig
from jax_eplb.online.state import (
    choose_layers,
    initial_state,
    is_balanced_enough,
    looks_after,
    must_change,
    note_looks,
    observe,
    pass_over_quiet,
    recent_imbalance,
    with_capacity,
)

E, P = 4, 2


def placement(num_layers):
    return Placement.default(num_experts=E, num_ranks=P, num_slots=6, num_layers=num_layers)


def observed(config, counts, rank_tokens=None):
    """The state after iterations of counts [W, L, E] and tokens [W, L, P]."""
    counts = np.asarray(counts)
    state = initial_state(placement(counts.shape[1]), config)
    for index, each in enumerate(counts):
        even = each.reshape(len(each), P, -1).sum(axis=2)
        tokens = even if rank_tokens is None else np.asarray(rank_tokens[index])
        state = observe(state, each, tokens, config, tuple(range(counts.shape[1])))
    return state


def random_counts(iterations, layers=3, seed=0):
    return np.random.default_rng(seed).integers(0, 50, (iterations, layers, E))


def test_the_load_fades_as_tensorrt_llms_does():
    counts = random_counts(30)
    state = observed(BalancerConfig(), counts)
    ages = np.arange(30)[::-1, None, None]
    np.testing.assert_allclose(state.load, (0.95**ages * counts).sum(axis=0), rtol=1e-5)
    assert state.iteration == 30
    assert state.weight == pytest.approx((0.95 ** np.arange(30)).sum())


def test_a_window_holds_the_last_iterations_the_newest_last():
    counts = random_counts(7)
    state = observed(BalancerConfig(window_size=5), counts)
    np.testing.assert_array_equal(state.window, counts[2:])
    state = observed(BalancerConfig(window_size=9), counts)
    np.testing.assert_array_equal(state.window[2:], counts)
    assert not state.window[:2].any()


def test_the_state_before_is_left_as_it_was():
    config = BalancerConfig(window_size=3)
    state = observed(config, random_counts(4))
    before = [np.copy(leaf) for leaf in state]
    observe(state, random_counts(1)[0], np.ones((3, P), int), config, (0, 1, 2))
    for leaf, kept in zip(state, before, strict=True):
        np.testing.assert_array_equal(leaf, kept)


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
def test_counts_that_are_none_are_refused_with_iteration_layer_and_expert(value):
    state = observed(BalancerConfig(), random_counts(3))
    counts = np.ones((3, E))
    counts[1, 2] = value
    with pytest.raises(ValueError, match=r"iteration 3, layer 7, expert 2: a count of"):
        observe(state, counts, np.ones((3, P)), BalancerConfig(), (3, 7, 9))


def test_counts_of_another_model_are_refused():
    state = observed(BalancerConfig(), random_counts(1))
    with pytest.raises(ValueError, match=r"counts of shapes \(3, 5\).* of another model"):
        observe(state, np.ones((3, 5)), np.ones((3, P)), BalancerConfig(), (0, 1, 2))


@pytest.mark.parametrize(("num_layers", "updates"), [(6, 2), (7, 3), (5, 1), (3, 9), (58, 2)])
def test_layers_take_turns_in_as_few_groups_as_there_must_be(num_layers, updates):
    config = BalancerConfig(layer_updates_per_iter=updates)
    state = initial_state(placement(num_layers), config)
    groups = -(-num_layers // updates)
    seen = []
    for _ in range(2 * groups):
        layers, state = choose_layers(state, config)
        assert 1 <= len(layers) <= updates
        seen.append(layers)
    assert sorted(sum(seen[:groups], ())) == list(range(num_layers))
    assert seen[groups:] == seen[:groups]


def test_with_a_horizon_each_round_begins_where_the_fullest_ranks_are_fullest():
    config = BalancerConfig(layer_updates_per_iter=2, horizon=100)
    tokens = np.array([[[5, 5], [9, 1], [6, 4], [8, 2], [7, 3]]])
    state = observed(config, random_counts(1, layers=5), tokens)
    seen = []
    for _ in range(4):
        layers, state = choose_layers(state, config)
        seen.append(layers)
    assert seen == [(1, 3), (2, 4), (0,), (1, 3)]


def with_dead(layers_on_it, config, num_layers=5):
    """A state in which the last rank has no speed, and these layers still have experts on it."""
    state = initial_state(placement(num_layers), config)
    table = state.table.copy()
    left = [layer for layer in range(num_layers) if layer not in layers_on_it]
    table[left, 3:] = E
    return with_capacity(state._replace(table=table), np.array([1.0, 0.0]))


def test_layers_with_experts_on_ranks_without_speed_come_first_and_take_nobodys_turn():
    config = BalancerConfig(layer_updates_per_iter=2, min_balancedness=0.1)
    state = with_dead([1, 3, 4], config)
    assert must_change(state).tolist() == [False, True, False, True, True]
    assert not is_balanced_enough(state, config)
    assert choose_layers(state, config) == ((1, 3), state)
    # They are looked at, whatever was found lately.
    quiet = state._replace(fruitless=np.full(5, 9, np.int32))
    assert pass_over_quiet(quiet, (0, 1), config)[0] == (1,)
    state = with_dead([], config)
    layers, after = choose_layers(state, config)
    assert (layers, after.group) == ((0, 3), 1)
    assert is_balanced_enough(state, config)


def test_what_ranks_of_unequal_speed_have_above_the_mean_is_time():
    config = BalancerConfig(layer_updates_per_iter=1, capacity=(3.0, 1.0))
    state = observed(config, np.full((1, 1, E), 10), [[[20, 20]]])
    # 40 tokens for 4 ranks' worth; one of speed 1 has 20.
    np.testing.assert_allclose(state.excess, [10])
    np.testing.assert_allclose(recent_imbalance(state), [1.0])
    assert state.balancedness == pytest.approx(0.5)
    state = with_capacity(state, np.array([1.0, 0.0]))
    state = observe(state, np.full((1, E), 10), np.array([[20, 20]]), config, (0,))
    np.testing.assert_allclose(state.excess, [9.5])  # what the other has does not count


def test_other_speeds_forget_what_was_found_and_what_was_usual():
    config = BalancerConfig(layer_updates_per_iter=1, window_size=8, change_factor=2.0)
    state = observed(config, random_counts(6, layers=1), [[[5, 5]]] * 6)
    state = state._replace(fruitless=np.array([4], np.int32), passed=np.array([2], np.int32))
    state = with_capacity(state, np.array([1.0, 0.25]))
    assert (state.fruitless.tolist(), state.passed.tolist()) == ([0], [0])
    for _ in range(4):
        state = observe(state, np.full((1, E), 5), np.array([[5, 5]]), config, (0,))
    assert state.window.any(axis=(1, 2)).all()  # no change of text


def test_static_is_never_time_and_warming_up_is_not_yet():
    assert not any(looks_after(n, BalancerConfig()) for n in range(50))
    config = BalancerConfig(layer_updates_per_iter=1, warm_up_iterations=10)
    assert [n for n in range(14) if looks_after(n, config)] == [11, 12, 13]


def test_balancedness_since_the_last_look_holds_the_balancer_back():
    config = BalancerConfig(layer_updates_per_iter=1, min_balancedness=0.75)
    counts = random_counts(2, layers=1)
    # mean / max: 0.5 and 1, then 0.5 and 0.5.
    assert is_balanced_enough(observed(config, counts, [[[4, 0]], [[2, 2]]]), config)
    assert not is_balanced_enough(observed(config, counts, [[[4, 0]], [[4, 0]]]), config)
    assert not is_balanced_enough(observed(config, counts), BalancerConfig())
    nothing = np.zeros((2, 1, E), int)
    assert is_balanced_enough(observed(config, nothing), config)


def test_the_recent_imbalance_is_weighted_by_tokens():
    counts = np.array([[[30, 0, 10, 0]], [[2, 2, 0, 0]]])
    state = observed(BalancerConfig(), counts, [[[30, 10]], [[4, 0]]])
    excess, mean = 0.95 * 10 + 2, 0.95 * 20 + 2
    np.testing.assert_allclose(recent_imbalance(state), [excess / mean], rtol=1e-6)


def looks(config, state, changed, turns):
    """Which of so many turns of the only layer led to a look."""
    seen = []
    for _ in range(turns):
        layers, state = pass_over_quiet(state, (0,), config)
        seen.append(bool(layers))
        if layers:
            state = note_looks(state, layers, np.array(changed, int))
    return seen, state


def test_looks_that_find_nothing_become_rarer_and_those_that_do_stay():
    config = BalancerConfig(layer_updates_per_iter=1)
    state = observed(config, random_counts(5, layers=1))
    assert looks(config, state, [0], 5)[0] == [True] * 5
    seen, _ = looks(config, state, [], 16)
    assert np.flatnonzero(seen).tolist() == [0, 2, 5, 10]
    # A load that remembers little may change soon.
    config = BalancerConfig(layer_updates_per_iter=1, window_size=2)
    assert np.flatnonzero(looks(config, state, [], 6)[0]).tolist() == [0, 2, 4]


def test_a_layer_that_becomes_worse_is_looked_at_at_once():
    config = BalancerConfig(layer_updates_per_iter=1)
    even, skewed = np.array([[5, 5]]), np.array([[10, 0]])
    state = observed(config, random_counts(1, layers=1), [even])
    _, state = looks(config, state, [], 7)
    state = observe(state, np.full((1, E), 5), skewed, config, (0,))
    assert looks(config, state, [], 1)[0] == [True]


def test_what_was_before_a_sudden_change_is_forgotten():
    config = BalancerConfig(layer_updates_per_iter=1, window_size=20, change_factor=2.0)
    counts = random_counts(16, layers=1) + 1
    tokens = np.array([[[55, 45]]] * 12 + [[[90, 10]]] * 4)
    for seen, left in ((12, 12), (14, 14), (15, 3), (16, 4)):
        window = observed(config, counts[:seen], tokens[:seen]).window
        assert window.any(axis=(1, 2)).sum() == left
    window = observed(BalancerConfig(window_size=20), counts, tokens).window
    assert window.any(axis=(1, 2)).sum() == 16


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layer_updates_per_iter": -1}, "layer_updates_per_iter is -1; use an integer of 0"),
        ({"layer_updates_per_iter": 1.5}, "layer_updates_per_iter is 1.5; use an integer"),
        ({"step_interval": 0}, "step_interval is 0; use an integer of 1 or more"),
        ({"window_size": 0}, "window_size is 0; use an integer of 1"),
        ({"horizon": -3}, "horizon is -3; use an integer of 1"),
        ({"max_moves": True}, "max_moves is True; use an integer"),
        ({"decay": 1.0}, "decay is 1.0; use a number between 0 and 1"),
        ({"min_balancedness": 1.2}, "min_balancedness is 1.2; it is mean / max"),
        ({"effort": "most"}, "effort 'most' must be one of"),
        ({"seconds_per_token": 0.0}, "seconds_per_token is 0.0; use a number above 0"),
        ({"bytes_per_second": float("nan")}, "bytes_per_second is nan"),
        ({"change_factor": 2.0}, "give window_size, too"),
        ({"capacity": (1.0, -2.0)}, "capacity of rank 1 is -2.0; use a number of 0 or more"),
        ({"change_factor": 1.0, "window_size": 8}, "change_factor is 1.0; use a number above 1"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        BalancerConfig(**settings)
