"""Saved on some devices with one placement, restored on others with another."""

import json
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_eplb import Placement, expert_mesh
from jax_eplb.checkpoint import Checkpoints
from tests.checkpoint_cases import (
    EXPERTS,
    LAYERS,
    SHAPE,
    assert_same,
    bank,
    by_expert,
    planned,
    state_of,
    targets,
)

pytestmark = pytest.mark.light_compile

SAVED = planned(16, 8)


class BalancerState(NamedTuple):
    window: np.ndarray
    step: np.ndarray


BALANCER = BalancerState(np.arange(6.0).reshape(2, 3), np.int64(41))
FACTS = {"model": "small", "bits": 1.5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Saved on eight devices, sixteen slots."""
    path = tmp_path_factory.mktemp("run")
    with Checkpoints(path) as checkpoints:
        checkpoints.save(5, state_of(SAVED), SAVED, balancer=BALANCER, facts=FACTS)
    return path


@pytest.mark.parametrize(("ranks", "slots"), [(1, 12), (2, 14), (4, 12), (4, 20), (8, 16), (8, 24)])
def test_any_devices_slots_and_placement_can_read_it(folder, ranks, slots):
    placement = planned(slots, ranks, seed=ranks)
    expected = state_of(placement)
    with Checkpoints(folder) as checkpoints:
        restored = checkpoints.restore(targets(expected), placement)
    assert_same(restored.state, expected)
    assert (restored.step, restored.facts) == (5, FACTS)


def test_without_a_placement_the_saved_one_is_used(folder):
    with Checkpoints(folder) as checkpoints:
        restored = checkpoints.restore(state_of(SAVED))
    assert_same(restored.state, state_of(SAVED))
    np.testing.assert_array_equal(restored.placement.slot_to_expert, SAVED.slot_to_expert)
    assert restored.placement.layer_ids == LAYERS
    assert restored.placement.num_ranks == 8


def bytes_of_process():
    """What this process has read from files, as the kernel counts it."""
    with open("/proc/self/io") as counts:
        return int(dict(line.split(": ") for line in counts)["rchar"])


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="Linux counts what was read")
@pytest.mark.parametrize(("ranks", "slots"), [(2, 12), (4, 20), (8, 24)])
def test_a_device_reads_the_experts_that_it_holds_and_no_others(tmp_path, ranks, slots):
    values = by_expert((64, 64))
    expert_bytes = values[0, 0].nbytes
    with Checkpoints(tmp_path) as checkpoints:
        state = {"up": bank(values, SAVED, P(None, "expert"))}
        checkpoints.save(1, state, SAVED)
        placement = planned(slots, ranks)
        like = targets({"up": bank(values, placement, P(None, "expert"))})
        checkpoints.wait()
        before = bytes_of_process()
        restored = checkpoints.restore(like, placement)
        of_process = bytes_of_process() - before
    table = np.asarray(placement.slot_to_expert).reshape(len(LAYERS), ranks, -1)
    held = [sum(len(set(row[rank])) for row in table) for rank in range(ranks)]
    assert list(restored.bytes_read.values()) == [n * expert_bytes for n in held]
    if slots == EXPERTS:  # N of E experts: N / E of the bank
        assert set(restored.bytes_read.values()) == {values.nbytes // ranks}
    total = sum(held) * expert_bytes
    assert total <= of_process < total + 100_000  # descriptions and checksums besides


def test_an_array_that_all_devices_hold_is_read_once(folder):
    placement = planned(12, 4)
    like = {"params": {"router": targets(state_of(placement))["params"]["router"]}}
    with Checkpoints(folder) as checkpoints:
        restored = checkpoints.restore(like, placement)
    assert list(restored.bytes_read.values()) == [10 * 4]


def test_each_expert_is_a_file_of_its_own_and_stands_once(folder):
    files = {p.name for p in (folder / "5/pytree/params.experts.up").iterdir()}
    assert files == {".zarray"} | {f"{la}.{e}.0.0" for la in range(3) for e in range(EXPERTS)}
    one = np.fromfile(folder / "5/pytree/params.experts.up/1.7.0.0", np.float32)
    np.testing.assert_array_equal(one.reshape(SHAPE), by_expert()[1, 7])


def test_orbax_reads_it_without_this_library(folder):
    arrays = ocp.StandardCheckpointer().restore(folder / "5/pytree")
    np.testing.assert_array_equal(arrays["params"]["experts"]["up"], by_expert())
    assert arrays["optimizer"][2] == 7
    with ocp.CheckpointManager(folder) as manager:
        found = manager.restore(
            5,
            args=ocp.args.Composite(
                pytree=ocp.args.StandardRestore(),
                jax_eplb=ocp.args.JsonRestore(),
                balancer=ocp.args.StandardRestore(),
            ),
        )
    np.testing.assert_array_equal(found.pytree["params"]["experts"]["bias"], by_expert((4,)))
    assert found.jax_eplb["placement"]["layer_ids"] == list(LAYERS)
    assert found.balancer["step"] == 41


def test_orbax_restores_it_onto_a_mesh_by_the_same_tree(folder):
    placement = Placement.default(num_experts=EXPERTS, num_ranks=4, layer_ids=LAYERS)
    expected = state_of(placement)  # each expert once: expert order is slot order
    found = ocp.StandardCheckpointer().restore(folder / "5/pytree", targets(expected))
    assert_same(found, expected)


def test_the_balancers_state_comes_back_beside_the_weights(folder):
    like = BalancerState(np.zeros((2, 3)), np.int64(0))
    with Checkpoints(folder) as checkpoints:
        restored = checkpoints.restore({}, balancer=like)
    np.testing.assert_array_equal(restored.balancer.window, BALANCER.window)
    assert (restored.balancer.step, restored.balancer.step.dtype) == (41, np.int64)


def test_a_type_may_differ(folder):
    placement = planned(12, 2)
    expected = state_of(placement, ml_dtypes.bfloat16)["params"]["experts"]
    like = {"params": {"experts": targets(expected)}}
    with Checkpoints(folder) as checkpoints:
        restored = checkpoints.restore(like, placement)
    assert_same(restored.state["params"]["experts"], expected)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, np.uint8, np.bool])
def test_bytes_of_any_type_are_kept(tmp_path, dtype):
    state = {"a": jnp.asarray(np.arange(7).astype(dtype)), "none": jnp.zeros((0, 3), dtype)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, None)
        restored = checkpoints.restore(jax.tree.map(np.asarray, state))
    assert restored.state["a"].dtype == dtype
    np.testing.assert_array_equal(restored.state["a"], state["a"])
    assert restored.state["none"].shape == (0, 3)


def test_layers_in_a_list_are_told_apart(tmp_path):
    placement, other = planned(16, 4), planned(14, 2)

    def layers(placement):
        table = np.asarray(placement.slot_to_expert)
        mesh = NamedSharding(expert_mesh(placement.num_ranks), P("expert"))
        return [{"up": jax.device_put(by_expert()[i][table[i]], mesh)} for i in range(len(LAYERS))]

    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, layers(placement), placement)
        restored = checkpoints.restore(targets(layers(other)), other)
    assert_same(restored.state, layers(other))


def test_an_expert_that_devices_share_is_written_in_their_parts(tmp_path):
    placement, other = planned(16, 4), planned(14, 2)
    devices = np.array(jax.devices()).reshape(4, 2)
    mesh = jax.sharding.Mesh(devices, ("expert", "width"), axis_types=(AxisType.Auto,) * 2)
    table = np.asarray(placement.slot_to_expert)
    rows = by_expert()[np.arange(3)[:, None], table]
    state = {"up": jax.device_put(rows, NamedSharding(mesh, P(None, "expert", None, "width")))}
    expected = {"up": bank(by_expert(), other, P(None, "expert"))}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, placement)
        assert_same(checkpoints.restore(targets(expected), other).state, expected)
        assert_same(checkpoints.restore(targets(state), placement).state, state)
    names = {p.name for p in (tmp_path / "1/pytree/up").iterdir()}
    assert {"0.3.0.0", "0.3.0.1"} <= names


def test_replicas_along_another_axis_are_written_once(tmp_path):
    placement = planned(16, 4)
    mesh = jax.sharding.Mesh(
        np.array(jax.devices()).reshape(2, 4), ("data", "expert"), axis_types=(AxisType.Auto,) * 2
    )
    rows = by_expert()[np.arange(3)[:, None], np.asarray(placement.slot_to_expert)]
    state = {"up": jax.device_put(rows, NamedSharding(mesh, P(None, "expert")))}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, placement)
        assert_same(checkpoints.restore(targets(state)).state, state)


def test_an_empty_slot_is_restored_as_zeros_and_never_saved(tmp_path):
    table = np.array([[0, 1, 2, 3]])
    full = np.arange(8.0, dtype=np.float32).reshape(4, 2)
    spread = NamedSharding(expert_mesh(2), P("expert"))
    whole = Placement.from_slots(table, num_experts=4, num_ranks=2)
    gap = Placement(jnp.array([[0, 4, 1, 2, 3, 4]], jnp.int32), 4, 2, (0,))
    like = {"up": jax.ShapeDtypeStruct((6, 2), np.float32, sharding=spread)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"up": jax.device_put(full, spread)}, whole)
        state = checkpoints.restore(like, gap).state
        np.testing.assert_array_equal(state["up"][jnp.array([0, 2, 3, 4])], full)
        np.testing.assert_array_equal(state["up"][jnp.array([1, 5])], np.zeros((2, 2)))
        checkpoints.save(2, state, gap)
        again = checkpoints.restore({"up": jax.device_put(full, spread)}, whole)
        restored = checkpoints.open()
    np.testing.assert_array_equal(again.state["up"], full)
    np.testing.assert_array_equal(restored.placement.slot_to_expert, gap.slot_to_expert)


def test_arrays_may_change_while_they_are_written(tmp_path):
    """The save returns before it has written, and the state is then given away."""
    state = state_of(SAVED)
    change = jax.jit(lambda s: jax.tree.map(lambda x: -x - 1, s), donate_argnums=0)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, SAVED)
        for _ in range(3):
            state = change(state)
        restored = checkpoints.restore(targets(state))
    assert_same(restored.state, state_of(SAVED))


def test_the_last_few_are_kept(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (5, 10, 15):
            checkpoints.save(step, {"a": np.full(3, step)}, None)
        checkpoints.wait()
        assert checkpoints.steps == [10, 15]
        assert checkpoints.restore({"a": np.zeros(3, int)}).state["a"].tolist() == [15] * 3
        assert checkpoints.restore({"a": np.zeros(3, int)}, step=10).state["a"].tolist() == [10] * 3


def test_what_stands_beside_the_weights_is_plain_json(folder):
    found = json.loads((folder / "5/jax_eplb/metadata").read_text())
    assert found["placement"]["slot_to_expert"] == np.asarray(SAVED.slot_to_expert).tolist()
    assert found["banks"]["params.experts.up"] == {
        "layers": list(LAYERS),
        "stacked": True,
        "template": None,
    }
    assert found["facts"] == FACTS
