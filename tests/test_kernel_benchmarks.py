"""The benchmarks of the grouped product and of the layer, at tiny sizes."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from benchmarks import ceilings, grouped_matmul, layer
from benchmarks.ceilings import Ceilings, burst_ms, compile_all

pytestmark = pytest.mark.light_compile

GIVEN = ["--bandwidth", "1e10", "--flops", "1e11"]


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(ceilings, "measure_ceilings", lambda dtype: Ceilings(1.0, 1.0))
    for module in (grouped_matmul, layer):
        monkeypatch.setattr(module, "burst_ms", lambda *call: burst_ms(*call, bursts=1))
    monkeypatch.setattr(layer, "device_ms", lambda *call: burst_ms(*call, bursts=1))
    monkeypatch.setattr(layer, "CPU_LAYERS", (layer.Layer("tiny", 16, 8, 4, 4, 2),))


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], pytest.param(["--gradients"], marks=pytest.mark.slow)])
def test_products_are_compared_with_ragged_dot_and_their_floor(capsys, options):
    grouped_matmul.main(["--shape", "3", "40", "8", "4", *GIVEN, "--json", *options])
    found = json.loads(capsys.readouterr().out)
    rows = {row["implementation"]: row for row in found["rows"]}
    assert set(rows) == {"default", "ragged_dot", "blocked", "reference"}
    assert rows["ragged_dot"]["of_ragged_dot"] == 1
    assert found["machine"]["bandwidth"] == 1e10
    # All three groups have rows here: 3·8·4 weights, 40 rows of 8 in, of 4 out.
    products = 3 if options else 1
    floor = 1e3 * max(4 * (96 + 480) / 1e10, 2 * 40 * 32 / 1e11) * products
    assert rows["default"]["floor_ms"] == pytest.approx(floor)


@pytest.mark.slow
def test_products_print_a_table(capsys):
    grouped_matmul.main(["--shape", "3", "40", "8", "4", *GIVEN])
    assert "3 × 40 × 8 × 4" in capsys.readouterr().out


@pytest.mark.slow
def test_the_layer_is_compared_with_ragged_dot_and_timed_by_stage(capsys):
    layer.main([*GIVEN, "--stages", "--json"])
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["layer"] == "tiny"
    assert row["of_peer"] == pytest.approx(row["peer_ms"] / row["ms"])
    assert all(row[stage] > 0 for stage in layer.STAGES)
    values = row["experts"] * 3 * 8 * 4 + 2 * 16 * 8
    assert row["floor_ms"] == pytest.approx(1e3 * max(4 * values / 1e10, 2 * 32 * 96 / 1e11))


@pytest.mark.slow
def test_the_layer_prints_a_table_of_those_asked_for(capsys, monkeypatch):
    figures = dict.fromkeys(("ms", "floor_ms", "of_floor", "counting", "peer_ms", "experts"), 1.0)
    monkeypatch.setattr(
        layer, "measure", lambda layers, *_: [{"layer": x.name} | figures for x in layers]
    )
    layer.main([*GIVEN, "--layer", "tiny"])
    assert "tiny" in capsys.readouterr().out
    layer.main([*GIVEN, "--layer", "none"])
    assert "tiny" not in capsys.readouterr().out


def test_a_call_that_does_not_compile_leaves_its_reason():
    def wrong(x):
        raise ValueError("too small")

    found = compile_all({"good": (abs, [1.0]), "wrong": (wrong, [1.0])})
    assert found["good"](-2.0) == 2
    assert found["wrong"] == "ValueError: too small"


def test_on_a_gpu_what_a_burst_takes_to_begin_and_to_end_is_no_calls(monkeypatch):
    clock, waiting = [0.0], []

    def call():
        waiting.append(1)

    def wait(result):
        clock[0] += 0.5e-3 + 1e-3 * len(waiting)
        waiting.clear()

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "block_until_ready", wait)
    monkeypatch.setattr(ceilings, "time", SimpleNamespace(perf_counter=lambda: clock[0], sleep=id))
    assert burst_ms(call) == pytest.approx(1.0)


def test_all_processes_make_as_many_calls_in_a_burst(monkeypatch):
    # Each times the first call for itself; a collective that one process leaves out hangs.
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "broadcast_one_to_all", lambda calls: np.int32(7))
    made = []
    burst_ms(lambda: made.append(1), bursts=2)
    assert len(made) == 2 + 2 * 7
