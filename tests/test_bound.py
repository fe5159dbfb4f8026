"""The bound: never above what brute force over all placements reaches."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linprog

from jax_eplb.planner.bound import lower_bound

pytestmark = pytest.mark.light_compile

# Few shapes, each with many loads: experts, slots, ranks.
SIZES = [(4, 6, 3), (5, 6, 3), (6, 6, 3), (6, 6, 2), (5, 9, 3)]
LAYERS = 48  # of every call, so that a shape compiles once


def bound(loads, num_slots, num_ranks, split="even", capacity=None) -> np.ndarray:
    loads = np.array(loads, np.float32)
    layers = np.arange(LAYERS) % loads.shape[-2]
    table = jnp.array(loads[..., layers, :])
    capacity = None if capacity is None else jnp.array(capacity, jnp.float32)
    sizes = {"num_slots": num_slots, "num_ranks": num_ranks}
    found = lower_bound(table, **sizes, split=split, capacity=capacity)
    return np.asarray(found)[: loads.shape[-2]]


def draw_loads(num_experts: int, *shape: int, seed: int = 0) -> np.ndarray:
    """Whole loads, int64[*shape, E]: few tokens with zeros, a hot expert, skewed, and even ones."""
    generator = np.random.default_rng([seed, num_experts])
    loads = generator.integers(0, 10, (*shape, num_experts))
    loads[..., 1::4, 0] *= 10
    skewed = generator.lognormal(0, 1, loads[..., 2::4, :].shape)
    loads[..., 2::4, :] = np.rint(1000 * skewed)
    loads[..., 3::4, :] = generator.integers(20, 40, skewed.shape)
    return loads


@functools.cache
def complete_tables(num_experts: int, num_slots: int, num_ranks: int) -> np.ndarray:
    """Every way to fill the ranks that leaves no expert out: replicas, int64[N, P, E]."""
    rows = itertools.combinations_with_replacement(range(num_experts), num_slots // num_ranks)
    counts = np.array([np.bincount(row, minlength=num_experts) for row in rows])
    chosen = np.array(list(itertools.product(range(len(counts)), repeat=num_ranks)))
    tables = counts[chosen]
    return tables[(tables.sum(1) > 0).all(1)]


def fullest(tables, load, capacity, split) -> np.ndarray:
    """Load per capacity of the fullest rank of each table, float64[N]."""
    if split == "even":
        shares = load / tables.sum(1)  # [N, E]
        return ((tables * shares[:, None]).sum(2) / capacity).max(1)
    # Of experts that divide freely: some set of them fills all the ranks that hold any of it
    # (the largest flow is the least cut).
    heights = []
    for chosen in itertools.product([False, True], repeat=len(load)):
        holders = (tables[:, :, np.array(chosen)] > 0).any(2) @ capacity
        heights.append(load[np.array(chosen)].sum() / np.maximum(holders, 1e-9))
    return np.max(heights, axis=0)


def optimum(windows, num_slots, num_ranks, capacity=None, split="even") -> float:
    """The least mean imbalance of any placement, over the windows with tokens: float[W, E]."""
    windows, capacity = np.atleast_2d(windows), np.array(capacity or [1.0] * num_ranks)
    per_rank, capacity = num_slots // num_ranks, capacity[capacity > 0]
    tables = complete_tables(windows.shape[1], per_rank * len(capacity), len(capacity))
    heights = [
        fullest(tables, load, capacity, split) * capacity.sum() / load.sum()
        for load in windows
        if load.any()
    ]
    return np.mean(heights, axis=0).min() - 1 if heights else 0.0


def assert_not_above(found, best, slack=1e-6):
    """Float32 against float64: as parts of the height, 1 + imbalance."""
    found, best = np.array(found), np.array(best)
    assert (found >= 0).all()
    above = (1 + found) / (1 + best) - 1
    assert above.max() <= slack, (above.argmax(), above.max())


@pytest.mark.parametrize(
    ("num_experts", "num_slots", "num_ranks"),
    [SIZES[0], *(pytest.param(*sizes, marks=pytest.mark.slow) for sizes in SIZES[1:])],
)
def test_no_placement_beats_the_bound(num_experts, num_slots, num_ranks):
    loads = draw_loads(num_experts, LAYERS, seed=num_slots)
    best = [optimum(load, num_slots, num_ranks) for load in loads]
    assert_not_above(bound(loads, num_slots, num_ranks), best)


# Without a slot to spare both splits are one.
@pytest.mark.parametrize(
    ("num_experts", "num_slots", "num_ranks"),
    [SIZES[0], *(pytest.param(*SIZES[i], marks=pytest.mark.slow) for i in (1, -1))],
)
def test_no_placement_beats_the_bound_under_the_balanced_split(num_experts, num_slots, num_ranks):
    loads = draw_loads(num_experts, 24, seed=num_ranks)
    best = [optimum(load, num_slots, num_ranks, split="balanced") for load in loads]
    assert_not_above(bound(loads, num_slots, num_ranks, split="balanced"), best)


def test_the_brute_force_of_the_balanced_split_agrees_with_linear_programmes():
    tables, load = complete_tables(4, 6, 3)[::37], draw_loads(4, 3)[2]
    capacity = np.array([1.0, 2.0, 0.5])
    heights = fullest(tables, load, capacity, "balanced")
    for table, height in zip(tables, heights, strict=True):
        rank, expert = np.nonzero(table)
        ranks = np.c_[np.arange(3)[:, None] == rank, -capacity]
        experts = np.c_[np.arange(4)[:, None] == expert, np.zeros(4)]
        goal = np.r_[np.zeros(len(rank)), 1]
        assert linprog(goal, ranks, np.zeros(3), experts, load).fun == pytest.approx(height)


@pytest.mark.slow
@pytest.mark.parametrize("split", ["even", "balanced"])
def test_no_placement_beats_the_bound_of_windows(split):
    windows = draw_loads(4, 3, 24, seed=3)
    windows[0, ::3] = 0  # a window without tokens in some layers
    windows[:, 4] = 0
    best = [optimum(windows[:, layer], 6, 3, split=split) for layer in range(24)]
    found = bound(windows, 6, 3, split=split)
    assert_not_above(found, best)
    assert found[4] == 0
    # No less than what the windows imply one by one, nor than their mean does.
    used = windows.sum(2) > 0
    alone = np.array([bound(window, 6, 3, split="balanced") for window in windows])
    number = np.maximum(used.sum(0), 1)
    assert (found >= (alone * used).sum(0) / number - 1e-6).all()
    shares = windows / np.maximum(windows.sum(2, keepdims=True), 1)
    assert (found >= bound(shares.sum(0), 6, 3, split=split) - 1e-5).all()


@pytest.mark.slow
def test_windows_alike_are_one_load():
    loads = draw_loads(4, 24)
    found = bound(np.stack([loads, 2 * loads, 0 * loads]), 6, 3)
    np.testing.assert_allclose(found, bound(loads, 6, 3), atol=3e-4)


@pytest.mark.slow
@pytest.mark.parametrize("split", ["even", pytest.param("balanced", marks=pytest.mark.slow)])
@pytest.mark.parametrize("capacity", [[1.0, 2.0, 0.7], [3.0, 0.0, 3.0], [0.0, 0.1, 0.4]])
def test_no_placement_beats_the_bound_with_capacities(capacity, split):
    loads = draw_loads(4, 24, seed=5)
    best = [optimum(load, 6, 3, capacity, split) for load in loads]
    assert_not_above(bound(loads, 6, 3, capacity=capacity, split=split), best)


@pytest.mark.slow
def test_ranks_alike_but_for_one_that_holds_nothing():
    # As two ranks of two: whatever is beside 9 is at least 4, where the mean is 12.
    loads = [[9, 6, 5, 4]]
    found = bound(loads, 6, 3, capacity=[0.3, 0.0, 0.3])
    assert found == pytest.approx([13 / 12 - 1], abs=1e-4)
    alike = bound(loads, 6, 3, capacity=[0.1] * 3)
    np.testing.assert_allclose(alike, bound(loads, 6, 3), atol=3e-4)


@pytest.mark.parametrize(
    ("load", "num_slots", "num_ranks", "by_hand"),
    [
        # Replicas 2, 1, 1: the largest is 60 / 2 = 30, the mean 80 / 4 = 20.
        ([60, 10, 10], 4, 4, 0.5),
        # Replicas 2, 2, 1, 1: all of 12, and the mean, 72 / 3 = 24, is more.
        ([24, 24, 12, 12], 6, 3, 0.0),
        # Replicas 2, 1, 1: the largest is 70, the mean 200 / 4 = 50.
        ([90, 70, 40], 4, 4, 0.4),
        # No slot to spare: one rank has 24, where the mean is 10.
        ([24, 3, 3], 3, 3, 1.4),
    ],
)
@pytest.mark.parametrize("split", ["even", "balanced"])
def test_the_mean_and_the_largest_replica_alone(load, num_slots, num_ranks, by_hand, split):
    assert bound([load], num_slots, num_ranks, split=split) == pytest.approx([by_hand])


@pytest.mark.parametrize(
    ("load", "num_slots", "num_ranks", "by_hand"),
    [
        # Whatever is beside 7 is at least 3: 10, where the mean is 9.
        ([7, 5, 5, 4, 3, 3], 6, 3, 10 / 9),
        # Four of 5 and two of 3: two of the 5 share a rank.
        ([5, 5, 5, 5, 3, 3], 6, 3, 10 * 3 / 26),
        # Four above 5 on three ranks of two: two of them share a rank.
        ([6, 7, 8, 9, 1, 1], 6, 3, 13 * 3 / 32),
        # Five of 5 on two ranks of three: one rank has three.
        ([5, 5, 5, 5, 5, 2], 6, 2, 15 * 2 / 27),
    ],
)
def test_sizes_together_say_more_than_the_largest(load, num_slots, num_ranks, by_hand):
    found = bound([load], num_slots, num_ranks)
    best = optimum(load, num_slots, num_ranks)
    assert best == pytest.approx(by_hand - 1)
    largest = max(load) * num_ranks / sum(load)
    assert largest <= 1  # so without the others the bound would be 0
    # A climb ends within 5e-5 of what its function can refute.
    assert found == pytest.approx([by_hand - 1], abs=1e-4)
    assert_not_above(found, [best])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("load", "least"),
    [
        # Four of five experts keep one replica: two of them share a rank, and the mean is 20 / 3.
        ([4, 4, 4, 4, 4], 8 * 3 / 20 - 1),
        # The halves of one 8, or what it is divided into, are beside the others, of 8 and 2.
        ([8, 8, 8, 2, 2], 10 * 3 / 28 - 1),
    ],
)
def test_experts_that_cannot_all_be_replicated_raise_both_splits(load, least):
    even, balanced = (bound([load], 6, 3, split=split) for split in ("even", "balanced"))
    assert optimum(load, 6, 3) == pytest.approx(least)
    assert optimum(load, 6, 3, split="balanced") == pytest.approx(least)
    assert even == pytest.approx([least], abs=1e-3)
    assert least / 2 < balanced[0] <= least + 1e-6  # the mean and the largest replica say 0


@pytest.mark.slow
@pytest.mark.parametrize(("split", "part"), [("even", 0.95), ("balanced", 0.7)])
def test_the_bound_of_pairs_is_most_of_the_optimum(split, part):
    loads = draw_loads(5, 24, seed=3)
    best = [optimum(load, 6, 3, split=split) for load in loads]
    assert bound(loads, 6, 3, split=split).sum() > part * np.sum(best)


def test_the_scale_of_the_load_does_not_matter():
    loads = draw_loads(4, 24).astype(np.float32)
    once = bound(loads, 6, 3)
    np.testing.assert_array_equal(bound(loads * 1024, 6, 3), once)
    np.testing.assert_allclose(bound(loads * 0.3, 6, 3), once, atol=3e-4)


def test_even_loads_have_a_bound_of_zero():
    assert bound([[7] * 6, [1] * 6, [1000] * 6], 6, 3).tolist() == [0.0] * 3


def test_sizes_and_splits_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="5 slots cannot be divided among 2 ranks"):
        bound([[1] * 4], 5, 2)
    with pytest.raises(ValueError, match="the split is 'odd'"):
        bound([[1] * 4], 6, 3, split="odd")


@pytest.mark.slow
def test_no_load_has_a_bound_of_zero():
    assert bound([[0] * 4], 6, 3).tolist() == [0.0]
    assert bound(np.zeros((3, 1, 4)), 6, 3, split="balanced").tolist() == [0.0]


@pytest.mark.slow
def test_the_bound_can_be_mapped_and_compiled_into_more():
    loads = draw_loads(4, LAYERS)
    one = functools.partial(lower_bound, num_slots=6, num_ranks=3)
    mapped = jax.jit(jax.vmap(one))(jnp.array(loads, jnp.float32).reshape(4, 12, 4))
    np.testing.assert_allclose(mapped.reshape(-1), bound(loads, 6, 3), atol=3e-4)
