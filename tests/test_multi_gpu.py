"""The benchmark of several devices, whole, at a tiny size; and tokens made for given experts."""

import json

import jax
import numpy as np
import pytest

from benchmarks import multi_gpu
from benchmarks.layer_stack import Shape
from benchmarks.multi_gpu_moves import turn
from benchmarks.replayed_routing import Replay, routers, tokens_for

pytestmark = pytest.mark.light_compile

TINY = Shape("tiny", 16, 8, 8, 2)


def test_tokens_choose_the_experts_they_were_made_for():
    generator = np.random.default_rng(0)
    ids = np.stack([generator.permutation(32)[:6] for _ in range(3 * 50)]).reshape(3, 50, 6)
    kept = routers(3, 64, 32)
    tokens = jax.vmap(tokens_for, in_axes=(0, 0, None))(ids, kept, jax.random.key(0))
    logits = np.asarray(tokens @ kept)
    np.testing.assert_array_equal(np.argsort(-logits, axis=-1)[..., :6], ids)
    # The others are far below: rounding to bfloat16 changes no choice.
    chosen = np.take_along_axis(logits, ids, axis=-1)
    assert chosen.min() - np.sort(logits, axis=-1)[..., -7].max() > 2


def test_a_batch_follows_the_recordings_second_half():
    ids = np.arange(80).reshape(20, 2, 2)
    replay = Replay("trace", 80, 2, np.zeros((8, 2, 80)), ids)
    batch = replay.batch(np.array([1]), 12, window=1, of=2)
    later = [*range(15, 20), *range(10, 17)]  # it begins again at the half
    np.testing.assert_array_equal(batch[0], ids[later, 1])
    counts = np.zeros((8, 1, 6))
    counts[:4, 0, :2], counts[4:, 0, 3:5] = 10, 10
    drawn = Replay("counts", 6, 2, counts, None).batch(np.array([0]), 50, window=0, of=1)
    assert set(drawn.ravel()) == {3, 4}
    uniform = Replay("counts", 6, 2, counts, None).uniform(1, 30)
    np.testing.assert_array_equal(np.bincount(uniform.ravel()), 10)
    drawn = Replay("counts", 6, 2, counts, None).drawn(1, 3000)[0]
    assert (drawn[:, 0] != drawn[:, 1]).all()
    np.testing.assert_allclose(np.bincount(drawn.ravel()), 1000, rtol=0.15)


def test_a_turn_of_as_many_steps_as_ranks_comes_back():
    table = np.arange(12).reshape(1, 12)
    turned = table
    for _ in range(3):
        turned = turn(turned, 3, 2, [0])
        assert (turned != table).sum() in (0, 6)
    np.testing.assert_array_equal(turned, table)


def with_one_batch(measure):
    """Of the two numbers of tokens the first: the other would compile everything once more."""

    def run(*given, **options):
        return measure(*(each[:1] if each == (64, 8) else each for each in given), **options)

    return run


@pytest.mark.slow
def test_every_part_gives_its_figures(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(multi_gpu, "SHAPES", (TINY._replace(name="not asked for"), TINY))
    monkeypatch.setattr(multi_gpu, "REPLAYED", {8: TINY})
    monkeypatch.setattr(multi_gpu, "small", lambda shape: shape)
    monkeypatch.setattr("benchmarks.multi_gpu_moves._STEPS", 4)
    for part in ("exchange", "balancing", "moves"):
        measure = getattr(multi_gpu, f"measure_{part}")
        monkeypatch.setattr(multi_gpu, f"measure_{part}", with_one_batch(measure))
    load = np.random.default_rng(0).gamma(0.5, size=8)
    counts = np.random.default_rng(1).multinomial(512, load / load.sum(), size=(8, 4))
    np.savez(tmp_path / "recording.npz", counts=counts)
    file = tmp_path / "figures.json"
    options = ["--ranks", "2", "--layers", "2", "--rounds", "1", "--placements", "3"]
    options += ["--effort", "fast", "--windows", "1", "--waves", "2", "--shapes", TINY.name]
    options += ["--recordings", str(tmp_path / "recording.npz"), "--more-slots", "1"]
    multi_gpu.main([*options, "--json", str(file)])
    found = json.loads(file.read_text())
    assert {row["exchange"] for row in found["exchange"]} == {"waves", "all_gather", "2 waves"}
    assert {row["shape"] for row in found["exchange"] + found["moves"]} == {TINY.name}
    by_variant = {row["variant"]: row for row in found["balancing"] if row["tokens"] == 64}
    assert by_variant["uniform routing"]["imbalance"] == 0
    assert by_variant["contiguous"]["slots_per_rank"] == 4
    assert by_variant["planned, balanced"]["slots_per_rank"] == 5
    assert 0 < by_variant["drawn uniformly"]["imbalance"] < by_variant["contiguous"]["imbalance"]
    assert by_variant["planned, balanced"]["imbalance"] < by_variant["contiguous"]["imbalance"]
    assert all(row["compilations"] == 0 for row in found["moves"])
    assert {row["layers"] for row in found["moves"] if "tokens" in row} == {1, 2}
    assert [row["wrong"] for row in found["checks"]] == [0] * 11
    assert "Experts moved while layers run" in capsys.readouterr().out


@pytest.mark.slow
def test_one_device_moves_its_own_slots(tmp_path, monkeypatch):
    monkeypatch.setattr(multi_gpu, "SHAPES", (TINY,))
    monkeypatch.setattr(multi_gpu, "small", lambda shape: shape)
    monkeypatch.setattr("benchmarks.multi_gpu_moves._STEPS", 4)
    monkeypatch.setattr(multi_gpu, "measure_moves", with_one_batch(multi_gpu.measure_moves))
    file = tmp_path / "figures.json"
    options = ["--ranks", "1", "--layers", "1", "--rounds", "1", "--placements", "3"]
    multi_gpu.main([*options, "--parts", "moves", "checks", "--json", str(file)])
    found = json.loads(file.read_text())
    assert all(row["megabytes"] > 0 and row["compilations"] == 0 for row in found["moves"])
    assert [row["wrong"] for row in found["checks"]] == [0] * 11


def test_the_part_that_replays_asks_for_recordings(capsys):
    with pytest.raises(SystemExit):
        multi_gpu.main(["--ranks", "2"])
    assert "give --recordings" in capsys.readouterr().err


def test_plans_need_slots_for_replicas(capsys):
    with pytest.raises(SystemExit):
        multi_gpu.main(["--ranks", "2", "--parts", "checks", "--more-slots", "0"])
    assert "--more-slots 0: write 1 or more" in capsys.readouterr().err
