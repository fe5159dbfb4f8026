"""The format is chosen by what the path is."""

import zipfile
from typing import Any, cast

import numpy as np
import pytest

from jax_eplb import formats
from jax_eplb.load import Recording
from jax_eplb.placement import Placement


def _recording() -> Recording:
    placement = Placement.default(num_experts=3, num_slots=4, num_ranks=2, layer_ids=(3, 4))
    counts = np.arange(24).reshape(3, 2, 4)
    return Recording(counts, 3, 2, "slots", (3, 4), (7, 8, 9), placement)


@pytest.mark.parametrize("name", ["a.npz", "a.safetensors", "a.npy", "statistics"])
def test_a_recording_written_to_a_path_is_read_from_it(tmp_path, name):
    recording = _recording()
    formats.save_recording(recording, tmp_path / name)
    read = formats.load_recording(str(tmp_path / name), active_placement=recording.placement)
    np.testing.assert_array_equal(read.expert_counts(), recording.expert_counts())
    assert read.layer_ids == (3, 4)
    assert read.num_experts == 3


@pytest.mark.parametrize("name", ["a.npz", "a.safetensors", "statistics"])
def test_unit_iterations_and_experts_per_token_survive(tmp_path, name):
    formats.save_recording(_recording(), tmp_path / name)
    read = formats.load_recording(tmp_path / name)
    assert (read.unit, read.iterations, read.experts_per_token) == ("slots", (7, 8, 9), 2)


def test_an_existing_directory_is_written_to_whatever_its_name(tmp_path):
    directory = tmp_path / "run.1"
    directory.mkdir()
    formats.save_recording(_recording(), directory)
    assert (directory / "meta_info.json").is_file()


def test_a_pt_file_is_read_by_its_suffix(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02}.")
    with pytest.raises(ValueError, match="no 'logical_count'"):
        formats.load_recording(tmp_path / "a.pt")


def test_a_plan_is_no_recording(tmp_path):
    (tmp_path / "plan.yaml").write_text("num_slots: 8\n")
    with pytest.raises(ValueError, match=r"plan\.yaml: a plan; a recording is a directory"):
        formats.load_recording(tmp_path / "plan.yaml")


def test_an_unknown_path_lists_what_is_known(tmp_path):
    (tmp_path / "a.csv").write_text("")
    for name in ("directory", r"\.npz", r"\.safetensors", r"\.npy", r"\.pt"):
        with pytest.raises(ValueError, match=rf"a\.csv: unknown format '\.csv'.*{name}"):
            formats.load_recording(tmp_path / "a.csv")
    with pytest.raises(ValueError, match=r"a\.pt: no format to write '\.pt'; use .*\.npz"):
        formats.save_recording(_recording(), tmp_path / "a.pt")
    with pytest.raises(ValueError, match="gone: no such file or directory"):
        formats.load_recording(tmp_path / "gone")


def test_options_reach_the_reader(tmp_path):
    np.savez(tmp_path / "a.npz", np.ones((1, 2, 6), int))
    read = formats.load_recording(
        tmp_path / "a.npz", unit="slots", num_experts=4, experts_per_token=3
    )
    assert (read.unit, read.num_experts, read.experts_per_token) == ("slots", 4, 3)
    with pytest.raises(ValueError, match="unit is 'tokens'"):
        formats.load_recording(tmp_path / "a.npz", unit=cast(Any, "tokens"))


def test_placements_are_read_and_written(tmp_path):
    placement = Placement.default(num_experts=3, num_slots=4, num_ranks=2, layer_ids=(3, 4))
    formats.save_placement(placement, tmp_path / "a.yaml", layer_updates_per_iter=1)
    read = formats.load_placement(tmp_path / "a.yaml", num_ranks=2)
    assert read.slot_to_expert.tolist() == placement.slot_to_expert.tolist()
