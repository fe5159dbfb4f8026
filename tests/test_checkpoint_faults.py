"""Full disks, cut-off saves and damaged files: an error that says which, and nothing is lost."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from jax_eplb import Placement
from jax_eplb.checkpoint import Checkpoints, array_files
from tests.checkpoint_cases import (
    EXPERTS,
    LAYERS,
    assert_same,
    bank,
    by_expert,
    planned,
    state_of,
    targets,
)

pytestmark = pytest.mark.light_compile

PLACEMENT = planned(16, 4)


def save(folder, *steps):
    with Checkpoints(folder, keep=3) as checkpoints:
        for step in steps:
            checkpoints.save(step, state_of(PLACEMENT), PLACEMENT)


def restore(folder, **keywords):
    with Checkpoints(folder) as checkpoints:
        return checkpoints.restore(targets(state_of(PLACEMENT)), **keywords)


def fill_disk(monkeypatch, after):
    """Let every file after the first few find no room."""
    write, written = array_files.write_file, []

    def limited(path, data):
        written.append(path)
        if len(written) > after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write(path, data)

    monkeypatch.setattr(array_files, "write_file", limited)


@pytest.mark.parametrize("after", [0, 3, 40])
def test_a_full_disk_is_reported_and_what_was_saved_stays(tmp_path, monkeypatch, after):
    save(tmp_path, 1)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        with monkeypatch.context() as patch:
            fill_disk(patch, after)
            checkpoints.save(2, state_of(PLACEMENT), PLACEMENT)
            with pytest.raises(OSError, match=r"could not be written \(No space left") as caught:
                checkpoints.wait()
        assert caught.value.errno == errno.ENOSPC
        assert str(tmp_path) in str(caught.value)
        assert [p.name for p in tmp_path.iterdir()] == ["1"]  # the room is free again
        assert_same(restore(tmp_path).state, state_of(PLACEMENT))
        checkpoints.save(2, state_of(PLACEMENT), PLACEMENT)  # there is room again
        checkpoints.wait()
        assert checkpoints.steps == [2]
    assert_same(restore(tmp_path).state, state_of(PLACEMENT))


def test_the_next_save_reports_a_failed_one_too(tmp_path, monkeypatch):
    with Checkpoints(tmp_path) as checkpoints:
        with monkeypatch.context() as patch:
            fill_disk(patch, 0)
            checkpoints.save(1, state_of(PLACEMENT), PLACEMENT)
            with pytest.raises(OSError, match="could not be written"):
                checkpoints.save(2, state_of(PLACEMENT), PLACEMENT)
        checkpoints.save(2, state_of(PLACEMENT), PLACEMENT)
    assert restore(tmp_path).step == 2


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file" / "run", Path("/proc/none/run")):
        with pytest.raises(OSError, match=str(folder)):
            Checkpoints(folder)


@pytest.mark.slow
def test_a_process_killed_in_the_middle_leaves_the_save_before(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.checkpoint_process", "cut-off", str(tmp_path)],
        cwd=Path(__file__).parents[1],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"  # and it never ends
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    partial = [p for p in tmp_path.iterdir() if p.name != "1"]
    assert len(partial) == 1  # some of step 2 is there
    assert any(partial[0].rglob("0.0.0.0"))
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps == [1]
        like = state_of(PLACEMENT)
        assert_same(checkpoints.restore(like).state, like)
        checkpoints.save(2, like, PLACEMENT)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2"]


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def delete(path):
    path.unlink()


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("pytree/params.experts.up/1.7.0.0", cut_short, "holds 95 bytes, expected 96"),
        ("pytree/params.experts.up/1.7.0.0", flip_a_bit, "damaged; its checksum is not the one"),
        ("pytree/params.experts.up/1.7.0.0", delete, r"cannot be read \(No such file"),
        ("pytree/params.router/0.0", flip_a_bit, "damaged; its checksum is not the one"),
        ("pytree/params.router/.zarray", cut_short, "damaged; it is not JSON"),
        ("pytree/params.router/.zarray", delete, r"cannot be read \(No such file"),
        ("pytree/_METADATA", empty, "damaged; it is not JSON"),
        ("pytree/_METADATA", delete, r"cannot be read \(No such file"),
        ("pytree/checksums.0.json", cut_short, "damaged; it is not JSON"),
        ("pytree/checksums.0.json", delete, "its checksum is missing; the save was not whole"),
        ("jax_eplb/metadata", cut_short, "damaged; it is not JSON"),
        ("jax_eplb/metadata", delete, r"cannot be read \(No such file"),
    ],
)
def test_a_damaged_checkpoint_is_refused_by_file_and_the_one_before_is_offered(
    tmp_path, file, damage, message
):
    save(tmp_path, 1, 2)
    damage(tmp_path / "2" / file)
    where = (tmp_path / "2" / file).parent if "checksums" in file else tmp_path / "2" / file
    with pytest.raises(ValueError, match=message) as caught:
        restore(tmp_path)
    assert str(where) in str(caught.value)
    assert "steps [1] are there, too" in str(caught.value)
    assert_same(restore(tmp_path, step=1).state, state_of(PLACEMENT))


def test_a_placement_that_is_none_is_refused_by_file(tmp_path):
    save(tmp_path, 1)
    path = tmp_path / "1/jax_eplb/metadata"
    path.write_text(path.read_text().replace('"num_ranks": 4', '"num_ranks": 5'))
    with pytest.raises(ValueError, match=r"1/jax_eplb/metadata: 16 slots cannot be divided"):
        restore(tmp_path)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_experts": EXPERTS + 2}, "is for 14 experts, but this checkpoint has 12"),
        ({"layer_ids": (3, 4, 8)}, r"for layers \[3, 4, 8\], but this checkpoint has \[3, 4, 7\]"),
        ({"layer_ids": (3, 4)}, r"for layers \[3, 4\], but this checkpoint has \[3, 4, 7\]"),
    ],
)
def test_a_plan_for_another_model_is_refused(tmp_path, sizes, message):
    save(tmp_path, 1)
    sizes = {"num_experts": EXPERTS, "num_ranks": 4, "num_slots": 16, "layer_ids": LAYERS} | sizes
    with pytest.raises(ValueError, match=message + "; give a plan for this model"):
        restore(tmp_path, placement=Placement.default(**sizes))


def test_a_state_with_other_slots_than_the_placement_is_refused(tmp_path):
    save(tmp_path, 1)
    with pytest.raises(ValueError, match=r"\(3, 20, 4, 6\) when it is laid out in 20 slots"):
        restore(tmp_path, placement=planned(20, 4))


def test_an_array_that_was_not_saved_is_named(tmp_path):
    save(tmp_path, 1)
    with (
        Checkpoints(tmp_path) as checkpoints,
        pytest.raises(ValueError, match=r"1: the array 'params.other' is not in this checkpoint"),
    ):
        checkpoints.restore({"params": {"other": np.zeros(3)}})


def test_a_placement_of_other_slots_than_the_state_is_refused_before_anything_is_written(tmp_path):
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(ValueError, match="20 slots"):
        checkpoints.save(1, state_of(PLACEMENT), planned(20, 4))
    assert not list(tmp_path.iterdir())


def test_an_expert_without_a_slot_cannot_be_saved(tmp_path):
    table = np.asarray(PLACEMENT.slot_to_expert).copy()
    table[1][table[1] == 5] = 6
    lost = Placement(jax.numpy.asarray(table), EXPERTS, 4, LAYERS)
    with (
        Checkpoints(tmp_path) as checkpoints,
        pytest.raises(ValueError, match="layer 4: expert 5 has no slot"),
    ):
        checkpoints.save(1, state_of(PLACEMENT), lost)


def test_a_step_is_not_written_over(tmp_path):
    save(tmp_path, 1)
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(ValueError, match="step 1 is saved"):
        checkpoints.save(1, state_of(PLACEMENT), PLACEMENT)


def test_where_there_is_none_or_not_that_step_the_error_says_so(tmp_path):
    with pytest.raises(ValueError, match="holds no complete checkpoint"):
        restore(tmp_path / "new")
    save(tmp_path, 1, 3)
    with pytest.raises(ValueError, match=r"no step 2; there are \[1, 3\]"):
        restore(tmp_path, step=2)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (np.zeros(3), "an array named ''"),
        ({"a/b": np.zeros(3)}, "an array named 'a/b'"),
        ({"a.b": np.zeros(3), "a": {"b": np.zeros(3)}}, "two arrays are named 'a.b'"),
        ({"key": jax.random.key(0)}, "jax.random.key_data"),
    ],
)
def test_what_cannot_be_saved_is_named(tmp_path, state, message):
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(ValueError, match=message):
        checkpoints.save(1, state, None)


def test_orbaxs_own_checkpoints_are_refused_with_a_remedy(tmp_path):
    import orbax.checkpoint as ocp

    save(tmp_path, 1)
    with ocp.StandardCheckpointer() as other:
        other.save(tmp_path / "1/pytree", {"a": np.zeros(3)}, force=True)
    with pytest.raises(ValueError, match="was written by Orbax itself"):
        restore(tmp_path)


def test_a_placement_for_a_state_without_banks_is_refused(tmp_path):
    """Without the expert axis in its sharding an array is no bank, whatever its shape."""
    state = {"up": bank(by_expert(), PLACEMENT, jax.sharding.PartitionSpec())}
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(ValueError, match="is a bank"):
        checkpoints.save(1, state, PLACEMENT)
