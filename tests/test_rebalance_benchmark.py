"""The benchmark of changes of placement, at a tiny size."""

import json

import numpy as np
import pytest

from benchmarks import rebalance

pytestmark = pytest.mark.light_compile


@pytest.mark.parametrize("fraction", [0.01, 0.1, 1.0])
def test_a_change_has_about_the_size_asked_for_and_keeps_every_expert(fraction):
    old = np.tile(np.arange(40) % 32, (5, 1))
    new = rebalance.change(old, fraction, np.random.default_rng(0))
    assert (old != new).mean() == pytest.approx(fraction, abs=0.05)
    assert (old != new).any()
    np.testing.assert_array_equal(np.sort(new), np.sort(old))


@pytest.mark.slow
def test_changed_slots_are_fewer_bytes_than_whole_banks(capsys):
    sizes = ["--layers", "2", "--experts", "8", "--slots", "8", "--ranks", "4"]
    narrow = ["--embed-dim", "8", "--hidden-dim", "4", "--tokens", "2"]
    rebalance.main([*sizes, *narrow, "--fractions", "0.2", "1", "--repeats", "1", "--json"])
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert len(rows) == 8
    row_bytes = 4 * 3 * 8 * 4
    for ours, together, take, reload in (rows[:4], rows[4:]):
        assert ours["megabytes"] * 1e6 <= 16 * row_bytes * ours["changed"] / 100
        assert take["bytes_ratio"] > 1
        assert reload["megabytes"] * 1e6 == 16 * row_bytes
        assert together["changed"] == ours["changed"]
        assert all(row["ms"] > 0 for row in (ours, together, take, reload))
