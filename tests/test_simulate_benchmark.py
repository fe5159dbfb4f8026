import numpy as np
import pytest

from benchmarks.simulate import _costs_of, _parse_pairs, _preset_of, read
from benchmarks.step_times import RANKS, _whole_rows
from jax_eplb import Placement
from jax_eplb.simulate import Costs

pytestmark = pytest.mark.light_compile


def test_recordings_get_the_costs_of_the_preset_that_they_are_named_for(tmp_path):
    path = tmp_path / "counts.npz"
    arrays = {"gpt_oss_20b_w1024": (2, 3, 32), "olmoe_domains": (2, 3, 64), "other": (1, 1, 4)}
    np.savez(path, **{name: np.ones(shape, int) for name, shape in arrays.items()})
    (oss, olmoe, other), notes = read([str(path)], _parse_pairs("olmoe:8,gpt_oss:2"))
    assert (oss.num_experts, oss.experts_per_token, oss.counts.shape) == (32, 4, (2, 3, 32))
    preset = _preset_of(oss.source)
    assert preset is not None
    assert preset.stem == "gpt_oss_20b"
    assert _costs_of(oss).bytes_per_expert == 3 * 2880 * 2880 * 4.25 / 8
    assert _costs_of(olmoe) == _costs_of(other) == Costs()
    assert [olmoe.experts_per_token, other.experts_per_token] == [8, 1]
    assert notes == []


@pytest.mark.parametrize("split", ["even", "balanced"])
def test_rows_are_whole_and_none_is_lost(split):
    counts = np.random.default_rng(0).integers(0, 50, (2, 3, 12))
    placement = Placement.default(num_experts=12, num_ranks=RANKS, num_slots=24, layer_ids=range(3))
    table = np.asarray(placement.slot_to_expert)
    rows = _whole_rows(counts, table, split)
    assert rows.shape == (2, 3, RANKS, 3)
    assert rows.min() >= 0
    for layer in range(3):
        for expert in range(12):
            held = rows.reshape(2, 3, -1)[:, layer, table[layer] == expert]
            np.testing.assert_array_equal(held.sum(axis=1), counts[:, layer, expert])
