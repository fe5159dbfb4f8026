"""SGLang-JAX's `.npy` and `.json` files; arrays of counts alone are `.npy` too."""

import contextlib
import functools
import io

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from jax_eplb.formats import sglang_jax
from jax_eplb.formats.native import save_npy
from jax_eplb.formats.sglang_jax import save_placement, save_recording
from jax_eplb.load import Recording
from jax_eplb.placement import Placement

load_npy = functools.partial(sglang_jax.load_npy, unsafe_pickle=True)


def _counts(windows=3, layers=4, experts=5) -> np.ndarray:
    return np.arange(1, windows * layers * experts + 1).reshape(windows, layers, experts)


def test_a_pickle_is_only_read_where_the_caller_says_so(tmp_path):
    np.save(tmp_path / "a.npy", np.array({"logical_count": _counts()[0]}, object))
    with pytest.raises(ValueError, match=r"a\.npy: holds a pickle, .* unsafe_pickle=True"):
        sglang_jax.load_npy(tmp_path / "a.npy")
    np.save(tmp_path / "b.npy", _counts())
    np.testing.assert_array_equal(sglang_jax.load_npy(tmp_path / "b.npy").counts, _counts())


def test_sglang_jaxs_dict_is_read(tmp_path):
    counts = _counts()[0]
    counts[:2] = 0
    np.save(
        tmp_path / "a.npy",
        np.array({"logical_count": counts, "timestamp": "20260101_1200"}, object),
    )
    recording = load_npy(tmp_path / "a.npy")
    np.testing.assert_array_equal(recording.counts, counts[None, 2:])
    assert recording.layer_ids == (2, 3)


def test_a_plain_array_is_taken_as_it_is(tmp_path):
    counts = _counts()
    counts[0, 1] = 0
    counts[2] = 0
    np.save(tmp_path / "a.npy", counts)
    np.testing.assert_array_equal(load_npy(tmp_path / "a.npy").counts, counts)
    np.save(tmp_path / "b.npy", counts[0])
    assert load_npy(tmp_path / "b.npy").counts.shape == (1, 4, 5)


@given(st.lists(st.integers(0, 2**50), min_size=12, max_size=12))
@settings(derandomize=True, deadline=None, max_examples=20)
def test_counts_written_are_read_back(tmp_path_factory, counts):
    path = tmp_path_factory.mktemp("npy") / "a.npy"
    recording = Recording(np.array(counts).reshape(2, 2, 3), 3, 2)
    save_npy(recording, path)
    np.testing.assert_array_equal(load_npy(path).counts, recording.counts)
    np.testing.assert_array_equal(np.load(path), recording.counts)


def test_counts_by_slot_are_written_by_expert(tmp_path):
    placement = Placement.from_slots([[1, 0, 2, 1]], num_experts=3, num_ranks=2)
    recording = Recording(np.array([[[1, 2, 3, 4]]]), 3, 1, "slots", placement=placement)
    save_npy(recording, tmp_path / "a.npy")
    assert np.load(tmp_path / "a.npy").tolist() == [[[2, 5, 3]]]
    unknown = Recording(np.array([[[1, 2, 3, 4]]]), 3, 1, "slots")
    with pytest.raises(ValueError, match="which expert sat in a slot is not recorded"):
        save_npy(unknown, tmp_path / "b.npy")
    assert not (tmp_path / "b.npy").exists()


def test_more_counts_than_experts_are_slots(tmp_path):
    np.save(tmp_path / "a.npy", _counts())
    recording = load_npy(tmp_path / "a.npy", num_experts=4)
    assert (recording.unit, recording.num_experts) == ("slots", 4)
    assert load_npy(tmp_path / "a.npy", unit="slots").unit == "slots"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (np.ones((1, 2, 3)), r"a\.npy: the counts are float64; expected integers"),
        (np.ones((1, 2, 3), bool), r"a\.npy: the counts are bool"),
        (np.ones(3, int), r"a\.npy: the counts have shape \(3,\)"),
        (np.ones((2, 0, 3), int), r"a\.npy: "),
        (-_counts(), r"a\.npy: iteration 2, layer 3, expert 4: negative count -60"),
        (np.array([{}, {}]), r"a\.npy: an array \(2,\) of objects"),
        (np.array(None), r"a\.npy: holds a NoneType, expected a dict"),
        ({"counts": 1}, r"a\.npy: no 'logical_count'; it holds \['counts'\]"),
        ({"logical_count": "x"}, r"a\.npy: logical_count is a str"),
        ({"logical_count": np.ones((1, 2))}, r"a\.npy: logical_count: the counts are float64"),
        ({"logical_count": np.array([{}, 1])}, r"a\.npy: array 'logical_count' is damaged"),
        ({"logical_count": np.ones(2, "M8[s]")}, r"a\.npy: array 'logical_count' is damaged"),
    ],
)
def test_each_fault_of_a_npy_file_has_its_message(tmp_path, content, message):
    np.save(tmp_path / "a.npy", np.asarray(content))
    with pytest.raises(ValueError, match=message):
        load_npy(tmp_path / "a.npy")


class _Evil:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


def test_a_pickled_call_is_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.array({"logical_count": _Evil(tmp_path / "mark")}, object))
    with pytest.raises(ValueError, match=r"a\.npy: refused to load (_?io)\.open"):
        load_npy(tmp_path / "a.npy")
    assert not (tmp_path / "mark").exists()


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="gone: no such file"):
        load_npy(tmp_path / "gone")


def test_a_placement_is_a_plain_array_or_a_dict(tmp_path):
    placement = Placement.from_slots([[2, 1, 0, 1]], num_experts=3, num_ranks=2, layer_ids=[1])
    save_placement(placement, tmp_path / "a.npy", num_layers=3)
    written = np.load(tmp_path / "a.npy", allow_pickle=False)
    assert (written.dtype, written.tolist()) == (
        np.int32,
        [[0, 1, 2, 0], [2, 1, 0, 1], [0, 1, 2, 0]],
    )
    save_placement(placement, tmp_path / "a.json")
    expected = '{"physical_to_logical_map": [[0, 1, 2, 0], [2, 1, 0, 1]]}'
    assert (tmp_path / "a.json").read_text() == expected


def test_counts_are_summed_over_windows_and_written_as_json(tmp_path):
    recording = Recording(np.array([[[1, 2]], [[3, 4]]]), 2, 1, layer_ids=(1,))
    save_recording(recording, tmp_path / "a.json", num_layers=3)
    assert (tmp_path / "a.json").read_text() == '{"logical_count": [[0, 0], [4, 6], [0, 0]]}'
    with pytest.raises(ValueError, match=r"a\.npy: SGLang-JAX's counts must be .* named \.json"):
        save_recording(recording, tmp_path / "a.npy")


@pytest.mark.parametrize("content", [_counts(), {"logical_count": _counts()}])
def test_every_truncation_of_a_npy_file_is_refused(tmp_path, content):
    path = tmp_path / "a.npy"
    np.save(path, np.asarray(content))
    whole = path.read_bytes()
    for size in range(0, len(whole), 5):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"a\.npy: "):
            load_npy(path)


# numpy takes a damaged header for one that Python 2 wrote, and tries that.
@pytest.mark.filterwarnings("ignore:Reading `.npy` or `.npz` file required:UserWarning")
@given(st.lists(st.tuples(st.integers(0), st.integers(0, 255)), min_size=1, max_size=3))
@settings(derandomize=True, deadline=None, max_examples=150)
def test_damaged_bytes_are_refused_or_read_never_worse(tmp_path_factory, changes):
    path = tmp_path_factory.mktemp("npy") / "a.npy"
    buffer = io.BytesIO()
    np.save(buffer, np.array({"logical_count": _counts()}, object))
    data = bytearray(buffer.getvalue())
    for place, byte in changes:
        data[place % len(data)] = byte
    path.write_bytes(bytes(data))
    with contextlib.suppress(ValueError):  # any other error would be a fault of the reader
        load_npy(path)
