"""What a run leaves for the next: load that fits any mesh, and the placement if it still fits."""

import numpy as np
import pytest

from jax_eplb import Placement
from jax_eplb.checkpoint import Checkpoints
from jax_eplb.online import Balancer, BalancerConfig, kept_load
from jax_eplb.serving import keep_run, placement_to_begin_with, read_run

pytestmark = pytest.mark.light_compile

CONFIG = BalancerConfig(layer_updates_per_iter=1, warm_up_iterations=100)
COUNTS = np.array([[9, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 9]])


def placement(ranks=2, slots=8):
    return Placement.default(num_experts=6, num_slots=slots, num_ranks=ranks, layer_ids=(3, 5))


def used(iterations=4, config=CONFIG, **options):
    balancer = Balancer(placement(), config, **options)
    for _ in range(iterations):
        balancer.after_step(COUNTS[None], np.full((2, 2), 7))
    return balancer


@pytest.mark.parametrize("window_size", [None, 3])
def test_a_balancer_that_goes_on_is_one_that_never_ended(tmp_path, window_size):
    config = BalancerConfig(
        layer_updates_per_iter=1, warm_up_iterations=100, window_size=window_size
    )
    with Checkpoints(tmp_path / "kept") as checkpoints:
        keep_run(checkpoints, used(4, config))
    kept = read_run(tmp_path / "kept")
    assert kept is not None
    resumed, whole = used(2, config, kept=kept.load), used(6, config)
    for name, value in kept_load(whole.state).items():
        np.testing.assert_array_equal(value, kept_load(resumed.state)[name])
    assert resumed.iteration == whole.iteration == 6


def test_the_last_of_a_folder_counts_and_none_is_none(tmp_path):
    assert read_run(tmp_path / "none") is None
    with Checkpoints(tmp_path / "kept") as checkpoints:
        for iterations in (2, 5):
            keep_run(checkpoints, used(iterations))
    kept = read_run(tmp_path / "kept")
    assert kept is not None
    assert kept.load["iteration"] == 5


@pytest.mark.slow
def test_the_placement_stays_where_it_fits_and_is_planned_anew_where_not(tmp_path):
    with Checkpoints(tmp_path / "kept") as checkpoints:
        keep_run(checkpoints, used())
    kept = read_run(tmp_path / "kept")
    assert kept is not None
    begun = placement_to_begin_with(kept, placement(), "even")
    np.testing.assert_array_equal(begun.slot_to_expert, placement().slot_to_expert)
    other = placement_to_begin_with(kept, placement(ranks=4), "even")
    assert (other.num_ranks, other.num_slots, other.layer_ids) == (4, 8, (3, 5))
    for row, hot in zip(np.asarray(other.slot_to_expert), (0, 5), strict=True):
        assert (row == hot).sum() == 3  # all the copies there are go to the hot expert


def test_what_is_not_of_a_run_or_of_another_is_refused(tmp_path):
    with Checkpoints(tmp_path / "weights") as checkpoints:
        checkpoints.save(1, {"w": np.ones(3)}, None)
    with pytest.raises(ValueError, match="weights/1: holds no load of a run"):
        read_run(tmp_path / "weights")
    load = kept_load(used().state)
    with pytest.raises(ValueError, match=r"a load of shape \(2, 5\), not \(2, 6\); it is of anoth"):
        used(kept=load | {"load": np.ones((2, 5), np.float32)})
    with pytest.raises(ValueError, match=r"window .* use the same window_size"):
        used(config=BalancerConfig(layer_updates_per_iter=1, window_size=4), kept=load)
    with pytest.raises(ValueError, match="has no 'weight'"):
        used(kept={name: value for name, value in load.items() if name != "weight"})
