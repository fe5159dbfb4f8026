"""The whole offline loop on a recording of a real model, against plain numpy."""

from pathlib import Path

import numpy as np
import pytest
import yaml

from jax_eplb import Recording, load_placement, load_recording, plan, save_placement
from jax_eplb.report import build_report, rank_tokens

pytestmark = pytest.mark.light_compile

RECORDING = Path(__file__).parent / "data" / "byte_model_recording.npz"


@pytest.fixture(scope="module")
def recording() -> Recording:
    return load_recording(RECORDING).with_at_least(4096)


def recount(counts, assignments, num_ranks):
    """Tokens of each rank under the even split, by loops and a dictionary."""
    out = np.zeros((*counts.shape[:2], num_ranks))
    for layer, slots in enumerate(assignments):
        replicas = {expert: slots.count(expert) for expert in slots}
        for slot, expert in enumerate(slots):
            rank = slot // (len(slots) // num_ranks)
            out[:, layer, rank] += counts[:, layer, expert] / replicas[expert]
    return out


def test_the_recording_is_skewed_and_whole(recording):
    assert recording.layer_ids == (1, 2, 3, 4, 5, 6)
    tokens = recording.counts.sum(axis=2)
    np.testing.assert_array_equal(tokens, 8192 * recording.experts_per_token)
    report = build_report(recording, num_ranks=8)
    assert report.summary.average.imbalance > 10 * report.chance


def test_the_measured_ranks_are_those_of_the_initial_layout(recording):
    counts = recording.counts.reshape(*recording.counts.shape[:2], 8, 8).sum(axis=3)
    np.testing.assert_array_equal(rank_tokens(recording), counts)


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "slots"), [(8, 80), (16, 96), (4, 64)])
def test_the_plan_file_read_back_gives_what_a_recount_gives(recording, tmp_path, ranks, slots):
    result = plan(
        recording.expert_counts(), num_slots=slots, num_ranks=ranks, layer_ids=recording.layer_ids
    )
    path = tmp_path / "plan.yaml"
    save_placement(result.placement, path, layer_updates_per_iter=2)
    values = yaml.safe_load(path.read_text())
    assert values["num_slots"] == slots
    assert values["layer_updates_per_iter"] == 2
    assert list(values["initial_global_assignments"]) == list(recording.layer_ids)
    assignments = list(values["initial_global_assignments"].values())
    for row in assignments:
        assert len(row) == slots
        assert set(row) == set(range(64))

    placement = load_placement(path, num_ranks=ranks)
    predicted = rank_tokens(recording, placement=placement)
    expected = recount(recording.counts, assignments, ranks)
    np.testing.assert_allclose(predicted, expected, rtol=1e-9)
    # float32 in the planner, float64 here.
    imbalance = (expected.max(axis=2) / expected.mean(axis=2) - 1).mean(axis=0)
    np.testing.assert_allclose(np.asarray(result.imbalance), imbalance, atol=2e-6)


@pytest.mark.slow
def test_a_plan_from_two_iterations_balances_the_other_two(recording):
    first, second = recording.keep([0, 1]), recording.keep([2, 3])
    result = plan(first.expert_counts(), num_slots=80, num_ranks=8, layer_ids=recording.layer_ids)
    before = build_report(second, num_ranks=8).summary.average.imbalance
    after = build_report(second, placement=result.placement).summary.average.imbalance
    assert after < before / 3
