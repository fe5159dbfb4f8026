"""SGLang's `.pt` and `.json` files. The `.pt` files are written by hand, without torch."""

import json
import pickle
import zipfile

import numpy as np
import pytest

from jax_eplb.formats.sglang import load_json, load_pt, save_placement, save_recording
from jax_eplb.load import Recording
from jax_eplb.placement import Placement


def write_pt(path, **entries):
    """A dict as torch.save writes it: contiguous int64 tensors for arrays, the rest as it is."""
    storages = []
    data = [b"\x80\x02}("]
    for name, value in entries.items():
        data.append(_text(name))
        if not isinstance(value, np.ndarray):
            data.append(pickle.dumps(value, 2)[2:-1])
            continue
        steps = [step // 8 for step in value.strides]
        data += [
            b"ctorch._utils\n_rebuild_tensor_v2\n((",
            _text("storage"),
            b"ctorch\nLongStorage\n",
        ]
        data += [_text(str(len(storages))), _text("cpu"), _int(value.size), b"tQ", _int(0)]
        data += [b"(", *map(_int, value.shape), b"t(", *map(_int, steps), b"t\x89}tR"]
        storages.append(value.astype("<i8").tobytes())
    data.append(b"u.")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", b"".join(data))
        for key, storage in enumerate(storages):
            archive.writestr(f"a/data/{key}", storage)
    return path


def _text(text: str) -> bytes:
    return b"X" + len(text).to_bytes(4, "little") + text.encode()


def _int(number: int) -> bytes:
    return b"J" + number.to_bytes(4, "little")


def _counts(windows=3, layers=4, experts=5) -> np.ndarray:
    return np.arange(1, windows * layers * experts + 1).reshape(windows, layers, experts)


def test_sglangs_file_is_read(tmp_path):
    path = write_pt(
        tmp_path / "a.pt",
        rank=0,
        logical_count=_counts(),
        average_utilization_rate_over_window=None,
        last_physical_to_logical_map=np.zeros((4, 6), int),
    )
    recording = load_pt(path, experts_per_token=2)
    np.testing.assert_array_equal(recording.counts, _counts())
    assert (recording.unit, recording.num_experts, recording.experts_per_token) == ("experts", 5, 2)
    assert recording.iterations == (0, 1, 2)
    assert recording.layer_ids == (0, 1, 2, 3)
    assert recording.placement is None


def test_steps_not_filled_and_dense_layers_are_left_out(tmp_path):
    counts = _counts()
    counts[1:2] = 0  # the buffer's rest
    counts[:, :2] = 0  # dense layers
    recording = load_pt(write_pt(tmp_path / "a.pt", logical_count=counts))
    np.testing.assert_array_equal(recording.counts, counts[[0, 2]][:, 2:])
    assert recording.iterations == (0, 2)
    assert recording.layer_ids == (2, 3)


def test_one_step_may_have_no_axis_of_its_own(tmp_path):
    recording = load_pt(write_pt(tmp_path / "a.pt", logical_count=_counts()[0]))
    assert recording.counts.shape == (1, 4, 5)


def test_a_file_of_zeros_is_refused(tmp_path):
    path = write_pt(tmp_path / "a.pt", logical_count=np.zeros((2, 3, 4), int))
    with pytest.raises(ValueError, match=r"a\.pt: logical_count: all counts are 0"):
        load_pt(path)


def test_the_active_placement_names_the_layers(tmp_path):
    placement = Placement.default(num_experts=5, num_ranks=2, layer_ids=(3, 4, 5, 6))
    recording = load_pt(
        write_pt(tmp_path / "a.pt", logical_count=_counts()), active_placement=placement
    )
    assert recording.layer_ids == (3, 4, 5, 6)
    assert recording.unit == "experts"
    assert recording.placement is placement


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"rank": 0}, r"no 'logical_count'; it holds \['rank'\]"),
        ({"records": []}, "in a mode of detail .* --expert-distribution-recorder-mode stat"),
        ({"logical_count": [[1]]}, "logical_count is a list, expected a tensor"),
        ({"logical_count": np.ones(3, int)}, r"the counts have shape \(3,\); expected"),
        ({"logical_count": np.ones((0, 2, 3), int)}, r"the counts have shape \(0, 2, 3\)"),
        ({"logical_count": -_counts()}, "iteration 2, layer 3, expert 4: negative count -60"),
    ],
)
def test_each_fault_of_a_pt_file_has_its_message(tmp_path, entries, message):
    with pytest.raises(ValueError, match=rf"a\.pt: .*{message}"):
        load_pt(write_pt(tmp_path / "a.pt", **entries))


def test_a_pt_file_of_another_thing_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("a/data.pkl", pickle.dumps([1, 2], 2))
    with pytest.raises(ValueError, match=r"a\.pt: holds a list, expected a dict"):
        load_pt(tmp_path / "a.pt")


def test_a_missing_file_is_named(tmp_path):
    for load in (load_json, load_pt):
        with pytest.raises(ValueError, match="gone: no such file"):
            load(tmp_path / "gone")


def test_counts_are_read_from_json(tmp_path):
    counts = _counts()
    counts[:, 0] = 0
    (tmp_path / "a.json").write_text(json.dumps({"logical_count": counts.tolist()}))
    recording = load_json(tmp_path / "a.json", experts_per_token=2)
    np.testing.assert_array_equal(recording.counts, counts[:, 1:])
    assert (recording.layer_ids, recording.experts_per_token) == ((1, 2, 3), 2)
    (tmp_path / "a.json").write_text(json.dumps({"logical_count": counts[1].tolist()}))
    np.testing.assert_array_equal(load_json(tmp_path / "a.json").counts, counts[1:2, 1:])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "unparsable JSON"),
        ("[1", "unparsable JSON"),
        ("[" * 100_000, "unparsable JSON"),
        ("[1]", "holds a list, expected a dict"),
        ("{}", "no 'logical_count'; it holds "),
        ('{"logical_count": [[1]], "logical_count": [[2]]}', "'logical_count' stands twice"),
        ('{"logical_count": []}', r"logical_count: \[\] is no list of integers"),
        ('{"logical_count": [[1, 2], [3]]}', "logical_count: lists of unequal length"),
        ('{"logical_count": [[1, 2], 3]}', r"logical_count: \[\[1, 2\], 3\] is no list"),
        ('{"logical_count": [[[[1]]]]}', r"logical_count: \[\[1\]\] is no list of integers"),
        ('{"logical_count": [[1, true]]}', r"logical_count: \[1, True\] is no list"),
        ('{"logical_count": [["a", 1]]}', r"logical_count: \['a', 1\] is no list"),
        ('{"logical_count": [[1, 1e5]]}', r"logical_count: \[1, 100000.0\] is no list"),
        ('{"logical_count": [[1, 99999999999999999999]]}', "logical_count: a count: too large"),
        ('{"logical_count": [[1, -1]]}', "logical_count: iteration 0, layer 0, expert 1: negative"),
    ],
)
def test_each_fault_of_a_json_file_has_its_message(tmp_path, text, message):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=rf"a\.json: .*{message}"):
        load_json(tmp_path / "a.json")


def test_a_placement_has_a_row_for_each_layer_and_nothing_beside_them(tmp_path):
    placement = Placement.from_slots([[2, 1, 0, 1]], num_experts=3, num_ranks=2, layer_ids=[1])
    save_placement(placement, tmp_path / "a.json", num_layers=3)
    expected = '{"physical_to_logical_map": [[0, 1, 2, 0], [2, 1, 0, 1], [0, 1, 2, 0]]}'
    assert (tmp_path / "a.json").read_text() == expected
    save_placement(placement, tmp_path / "b.json")
    assert json.loads((tmp_path / "b.json").read_text())["physical_to_logical_map"][1:] == [
        [2, 1, 0, 1]
    ]


@pytest.mark.parametrize("suffix", [".json", ".pt"])
def test_counts_written_are_read_back_under_their_layers(tmp_path, suffix):
    counts = _counts(windows=2, layers=2)
    recording = Recording(counts, 5, 2, layer_ids=(1, 3))
    path = tmp_path / f"a{suffix}"
    save_recording(recording, path, num_layers=6)
    read = (load_pt if suffix == ".pt" else load_json)(path)
    np.testing.assert_array_equal(read.counts, counts)
    assert read.layer_ids == (1, 3)


def test_what_sglang_would_not_read_is_not_written(tmp_path):
    placement = Placement.default(num_experts=2, num_ranks=1, layer_ids=[4])
    with pytest.raises(ValueError, match=r"a\.yaml: SGLang must be .* named \.json or \.pt"):
        save_placement(placement, tmp_path / "a.yaml")
    with pytest.raises(ValueError, match="said to have 4 layers, but the plan has layer 4; give 5"):
        save_placement(placement, tmp_path / "a.json", num_layers=4)
    slots = Recording(np.ones((1, 1, 4), int), 3, 1, "slots")
    with pytest.raises(ValueError, match="which expert sat in a slot is not recorded"):
        save_recording(slots, tmp_path / "a.pt")
    assert not list(tmp_path.iterdir())
