"""The benchmark of the exchange at a tiny size."""

import json

import pytest

from benchmarks import exchange

pytestmark = pytest.mark.light_compile


@pytest.mark.slow
def test_a_cap_lowers_the_memory_and_every_row_has_a_time(capsys):
    sizes = ["--ranks", "4", "--tokens", "64", "--embed-dim", "16", "--hidden-dim", "8"]
    exchange.main([*sizes, "--experts", "8", "--caps", "32", "--repeats", "1", "--json"])
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert len(rows) == 8
    memory = {(row["exchange"], row["cap"], row["load"]): row["memory_mib"] for row in rows}
    for name in ("waves", "all_gather"):
        for load in ("by chance", "all to rank 0"):
            assert memory[name, 32, load] < memory[name, None, load]
    assert all(row["ms"] > 0 for row in rows)
