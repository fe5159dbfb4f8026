import numpy as np
import pytest

from benchmarks.recordings import (
    PROTOCOLS,
    condense,
    fetched_experts,
    held_out_imbalance,
    splits,
    window_imbalance,
)


def numbered(count):
    """Windows [W, 1, 1] that hold their own numbers."""
    return np.arange(count)[:, None, None]


def numbers(windows):
    return windows.ravel().tolist()


def imbalance_reference(table, windows, num_ranks):
    """(max - mean) / mean for each window and layer, in plain loops."""
    slots_per_rank = len(table[0]) // num_ranks
    result = []
    for window in windows.tolist():
        row = []
        for slots, tokens in zip(table.tolist(), window, strict=True):
            ranks = [0.0] * num_ranks
            for slot, expert in enumerate(slots):
                ranks[slot // slots_per_rank] += tokens[expert] / slots.count(expert)
            mean = sum(ranks) / num_ranks
            row.append((max(ranks) - mean) / mean if mean else 0)
        result.append(row)
    return result


def draw_problem(seed, num_windows=7):
    """A table int64[L, S] with two slots for some experts and none for others, and windows."""
    generator = np.random.default_rng(seed)
    windows = generator.integers(0, 50, (num_windows, 3, 6))
    windows[2] = 0
    return generator.integers(0, 6, (3, 8)), windows


def test_half_plans_on_the_first_half():
    [(plan, score)] = splits(numbered(7), "half")
    assert numbers(plan) == [0, 1, 2]
    assert numbers(score) == [3, 4, 5, 6]


def test_interleaved_plans_on_even_windows():
    [(plan, score)] = splits(numbered(7), "interleaved")
    assert numbers(plan) == [0, 2, 4, 6]
    assert numbers(score) == [1, 3, 5]


def test_online_plans_on_a_chunk_and_scores_the_next():
    pairs = splits(numbered(29), "online")
    assert [numbers(plan) for plan, _ in pairs] == [[2 * i, 2 * i + 1] for i in range(9)]
    assert [numbers(score) for _, score in pairs] == [[2 * i, 2 * i + 1] for i in range(1, 10)]


def test_online_needs_a_window_for_each_chunk():
    assert len(splits(numbered(10), "online")) == 9
    with pytest.raises(ValueError, match="9 windows: online needs at least 10"):
        splits(numbered(9), "online")


def test_an_unknown_protocol_is_refused():
    with pytest.raises(ValueError, match=f"'offline' must be one of: {', '.join(PROTOCOLS)}"):
        splits(numbered(20), "offline")


@pytest.mark.parametrize(
    ("count", "lengths"),
    [(1, [1]), (64, [1] * 64), (65, [2] * 32 + [1]), (128, [2] * 64), (129, [3] * 43)],
)
def test_condense_sums_neighbours_and_loses_no_window(count, lengths):
    windows = np.random.default_rng(count).integers(0, 9, (count, 2, 3))
    ends = np.cumsum(lengths)
    expected = [windows[end - size : end].sum(0) for size, end in zip(lengths, ends, strict=True)]
    assert condense(windows).tolist() == np.array(expected).tolist()


@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8])
def test_window_imbalance_is_that_of_plain_loops(num_ranks):
    # Experts without a slot drop their tokens in both.
    table, windows = draw_problem(num_ranks)
    expected = imbalance_reference(table, windows, num_ranks)
    np.testing.assert_allclose(window_imbalance(table, windows, num_ranks), expected, atol=1e-14)


def test_windows_of_small_unsigned_counts_do_not_overflow():
    windows = np.array([[[65535, 65535]]], np.uint16)
    assert window_imbalance(np.array([[0, 0, 1, 1]]), windows, 1).tolist() == [[0]]
    assert window_imbalance(np.array([[0, 1]]), windows, 2).tolist() == [[0]]


def test_held_out_imbalance_weighs_every_window_alike():
    first, long = draw_problem(0, num_windows=9)
    second, short = draw_problem(1, num_windows=4)
    both = imbalance_reference(first, long, 4) + imbalance_reference(second, short, 4)
    held_out = held_out_imbalance([first, second], [long, short], 4)
    assert held_out == pytest.approx(np.mean(both), rel=1e-12)


def test_held_out_imbalance_needs_a_table_for_each_test():
    table, windows = draw_problem(0)
    with pytest.raises(ValueError, match="argument 2 is longer"):
        held_out_imbalance([table], [windows, windows], 4)


@pytest.mark.parametrize(
    ("old", "new", "fetched"),
    [
        ([[0, 1, 2, 3]], [[0, 1, 2, 3]], 0),
        ([[0, 1, 2, 3]], [[1, 0, 3, 2]], 0),  # other slots of the same ranks
        ([[0, 1, 2, 3]], [[2, 3, 0, 1]], 4),
        ([[0, 1, 2, 0]], [[0, 1, 2, 1]], 1),
        ([[0, 1, 2, 3]], [[2, 2, 3, 3]], 1),  # one load serves both slots
        ([[0, 1, 2, 3], [0, 1, 2, 3]], [[0, 1, 2, 3], [0, 2, 1, 3]], 1),  # mean of the layers
    ],
)
def test_fetched_experts_are_those_that_a_rank_did_not_hold(old, new, fetched):
    assert fetched_experts(np.array(old), np.array(new), 4, 2) == fetched
