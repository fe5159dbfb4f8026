"""Our own recording file: everything a Recording holds, and faults with their messages."""

import json
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings

from jax_eplb.formats import native
from jax_eplb.load import Recording
from jax_eplb.placement import Placement

SAVERS = {"npz": native.save_npz, "safetensors": native.save_safetensors}
LOADERS = {"npz": native.load_npz, "safetensors": native.load_safetensors}
both = pytest.mark.parametrize("kind", ["npz", "safetensors"])


@st.composite
def recordings(draw):
    windows, layers = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    num_ranks, per_rank = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    num_slots = num_ranks * per_rank
    num_experts = draw(st.integers(max(1, num_slots - 1), num_slots))
    unit = draw(st.sampled_from(["experts", "slots"]))
    width = num_experts if unit == "experts" else num_slots
    size = windows * layers * width
    counts = draw(st.lists(st.integers(0, 2**62), min_size=size, max_size=size))
    layer_ids = tuple(
        draw(st.lists(st.integers(0, 99), min_size=layers, max_size=layers, unique=True))
    )
    iterations = st.lists(st.integers(0, 2**40), min_size=windows, max_size=windows, unique=True)
    placement = rank_tokens = None
    if draw(st.booleans()):
        placement = Placement.default(
            num_experts=num_experts, num_slots=num_slots, num_ranks=num_ranks, layer_ids=layer_ids
        )
    if draw(st.booleans()):
        rank_tokens = np.arange(windows * layers * num_ranks).reshape(windows, layers, num_ranks)
    return Recording(
        counts=np.array(counts, np.int64).reshape(windows, layers, width),
        num_experts=num_experts,
        experts_per_token=draw(st.integers(1, 8)),
        unit=unit,
        layer_ids=layer_ids,
        iterations=tuple(draw(iterations)),
        placement=placement,
        rank_tokens=rank_tokens,
    )


def assert_same(read: Recording, written: Recording) -> None:
    for name in ("num_experts", "experts_per_token", "unit", "layer_ids", "iterations"):
        assert getattr(read, name) == getattr(written, name)
    np.testing.assert_array_equal(read.counts, written.counts)
    assert read.counts.dtype == np.int64
    assert (read.rank_tokens is None) == (written.rank_tokens is None)
    if read.rank_tokens is not None and written.rank_tokens is not None:
        np.testing.assert_array_equal(read.rank_tokens, written.rank_tokens)
        assert read.rank_tokens.dtype == np.int64
    assert (read.placement is None) == (written.placement is None)
    if read.placement is not None and written.placement is not None:
        for name in ("num_experts", "num_ranks", "layer_ids"):
            assert getattr(read.placement, name) == getattr(written.placement, name)
        old, new = written.placement.slot_to_expert, read.placement.slot_to_expert
        assert new.dtype == old.dtype
        assert new.tolist() == old.tolist()


@both
@given(recording=recordings())
@settings(derandomize=True, deadline=None, max_examples=30)
def test_all_of_a_recording_is_read_back(tmp_path_factory, kind, recording):
    path = tmp_path_factory.mktemp("native") / f"a.{kind}"
    SAVERS[kind](recording, path)
    read = LOADERS[kind](path)
    assert_same(read, recording)
    assert read.source == str(path)


def _recording(**changes) -> Recording:
    placement = Placement.from_slots(
        [[0, 1, 2, 0], [2, 1, 0, 1]], num_experts=3, num_ranks=2, layer_ids=(3, 4)
    )
    fields = {
        "counts": np.arange(24).reshape(3, 2, 4),
        "num_experts": 3,
        "experts_per_token": 2,
        "unit": "slots",
        "layer_ids": (3, 4),
        "iterations": (7, 8, 9),
        "placement": placement,
        "rank_tokens": np.arange(12).reshape(3, 2, 2),
    }
    return Recording(**{**fields, **changes})


@both
def test_the_same_recording_gives_the_same_bytes(tmp_path, kind):
    for name in ("a", "b"):
        SAVERS[kind](_recording(), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@both
def test_counts_of_any_memory_layout_are_written(tmp_path, kind):
    counts = np.arange(24).reshape(4, 2, 3).transpose(2, 1, 0)
    SAVERS[kind](_recording(counts=counts), tmp_path / "a")
    np.testing.assert_array_equal(LOADERS[kind](tmp_path / "a").counts, counts)


def rewrite(path, kind, *, arrays=None, metadata=None, text=None):
    """A file of `_recording()` with other arrays or metadata; None takes one out."""
    content = {**native._arrays(_recording()), **(arrays or {})}
    content = {name: array for name, array in content.items() if array is not None}
    header = {**native._metadata(_recording()), **(metadata or {})}
    header = {name: value for name, value in header.items() if value is not None}
    text = json.dumps(header) if text is None else text
    if kind == "npz":
        np.savez(path, jax_eplb=np.array(text), **content)
    else:
        safetensors.numpy.save_file(content, path, {"jax_eplb": text})
    return path


_FAULTY = [
    ({"arrays": {"counts": None}}, "no array 'counts'; it holds"),
    ({"arrays": {"layer_ids": None}}, "no array 'layer_ids'"),
    ({"arrays": {"iterations": None}}, "no array 'iterations'"),
    ({"arrays": {"counts": np.ones((3, 2, 4), np.float32)}}, "array 'counts' is float32 of shape"),
    ({"arrays": {"counts": np.ones((3, 2), int)}}, r"array 'counts' is int64 of shape \(3, 2\)"),
    ({"arrays": {"counts": -np.ones((3, 2, 4), int)}}, "iteration 7, layer 3, slot 0: negative"),
    ({"arrays": {"counts": np.ones((3, 2, 5), int)}}, "the placement has 4 slots, the counts 5"),
    ({"arrays": {"counts": np.ones((3, 2, 2), int)}}, "counts of 2 slots cannot hold 3 experts"),
    ({"arrays": {"layer_ids": np.array([3, 3])}}, "array 'layer_ids' holds 3 twice"),
    ({"arrays": {"iterations": np.array([7, 8, 7])}}, "array 'iterations' holds 7 twice"),
    ({"arrays": {"iterations": np.array([7, 8])}}, "2 iterations, 3 windows"),
    ({"arrays": {"layer_ids": np.array([1.5, 2])}}, "array 'layer_ids' is float64"),
    (
        {"arrays": {"layer_ids": np.array([3])}},
        "array 'slot_to_expert': 1 layer ids were given for 2 layers",
    ),
    ({"arrays": {"rank_tokens": np.ones((1, 2, 2), int)}}, "rank tokens have shape"),
    ({"arrays": {"rank_tokens": np.ones(3, int)}}, "array 'rank_tokens' is int64 of shape"),
    (
        {"arrays": {"slot_to_expert": np.array([[0, 1, 2, 0], [2, 1, 1, 1]])}},
        "array 'slot_to_expert': layer 4: expert 0 has no slot",
    ),
    ({"metadata": {"num_ranks": None}}, "metadata num_ranks is None, expected an integer"),
    ({"metadata": {"num_ranks": 3}}, "array 'slot_to_expert': 4 slots cannot be divided among 3"),
    ({"metadata": {"format": "other"}}, "does not say format 'jax_eplb.recording'"),
    (
        {"metadata": {"version": 2}},
        "version 2 of the recording format; this jax_eplb reads version 1",
    ),
    ({"metadata": {"version": None}}, "version None"),
    ({"metadata": {"num_experts": "3"}}, "metadata num_experts is '3', expected a positive"),
    ({"metadata": {"experts_per_token": 0}}, "metadata experts_per_token is 0"),
    ({"metadata": {"unit": "tokens"}}, "metadata unit is 'tokens', expected 'experts' or 'slots'"),
    ({"metadata": {"unit": None}}, "metadata unit is None"),
    ({"metadata": {"unit": "experts"}}, "counts of 4 experts, but num_experts is 3"),
    ({"text": "{"}, "the metadata 'jax_eplb' is no JSON"),
    ({"text": "[1]"}, "does not say format"),
]


@both
@pytest.mark.parametrize(("change", "message"), _FAULTY)
def test_each_fault_has_its_message(tmp_path, kind, change, message):
    path = rewrite(tmp_path / f"a.{kind}", kind, **change)
    with pytest.raises(ValueError, match=rf"a\.{kind}: .*{message}"):
        LOADERS[kind](path)


def test_metadata_that_is_no_text_is_named(tmp_path):
    np.savez(tmp_path / "a.npz", jax_eplb=np.arange(3), counts=np.ones((1, 1, 1), int))
    with pytest.raises(ValueError, match="array 'jax_eplb' is int64, expected text"):
        native.load_npz(tmp_path / "a.npz")


@both
def test_every_truncation_is_refused(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    SAVERS[kind](_recording(), path)
    whole = path.read_bytes()
    for size in range(0, len(whole), 11):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=rf"a\.{kind}: "):
            LOADERS[kind](path)


@both
def test_a_missing_file_is_named(tmp_path, kind):
    with pytest.raises(ValueError, match="gone: no such file"):
        LOADERS[kind](tmp_path / "gone")


def test_a_single_array_inside_no_archive_is_named(tmp_path):
    with (tmp_path / "a.npz").open("wb") as file:
        np.save(file, np.ones((1, 2, 3), int))
    with pytest.raises(ValueError, match=r"a\.npz: not an \.npz archive; its content is a single"):
        native.load_npz(tmp_path / "a.npz")


def test_pickled_objects_in_an_archive_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", counts=np.array([{}], object))
    with pytest.raises(ValueError, match=r"a\.npz: array 'counts' is damaged .*allow_pickle"):
        native.load_npz(tmp_path / "a.npz")


def test_options_may_repeat_what_the_file_says_but_not_contradict_it(tmp_path):
    path, recording = tmp_path / "a.npz", _recording()
    native.save_npz(recording, path)
    options = {"unit": "slots", "num_experts": 3, "experts_per_token": 2}
    assert_same(native.load_npz(path, **options, active_placement=recording.placement), recording)
    with pytest.raises(ValueError, match="its unit is 'slots', but 'experts' was given"):
        native.load_npz(path, unit="experts")
    with pytest.raises(ValueError, match="its experts_per_token is 2, but 4 was given"):
        native.load_npz(path, experts_per_token=4)
    other = Placement.default(num_experts=3, num_slots=4, num_ranks=2, layer_ids=(3, 4))
    with pytest.raises(ValueError, match="another one was given"):
        native.load_npz(path, active_placement=other)


def test_a_placement_can_be_added(tmp_path):
    recording = _recording()
    native.save_npz(_recording(placement=None), tmp_path / "a.npz")
    read = native.load_npz(tmp_path / "a.npz", active_placement=recording.placement)
    assert_same(read, recording)


@both
@pytest.mark.parametrize("name", ["counts", "load"])
def test_a_plain_array_is_read(tmp_path, kind, name):
    counts = np.arange(24, dtype=np.uint16).reshape(2, 3, 4)
    if kind == "npz":
        arrays: dict[str, Any] = {name: counts}
        np.savez(tmp_path / "a", **arrays)
        (tmp_path / "a.npz").rename(tmp_path / "a")
    else:
        safetensors.numpy.save_file({name: counts}, tmp_path / "a")
    read = LOADERS[kind](tmp_path / "a", experts_per_token=4)
    np.testing.assert_array_equal(read.counts, counts)
    assert (read.unit, read.num_experts, read.experts_per_token) == ("experts", 4, 4)
    assert (read.layer_ids, read.iterations) == ((0, 1, 2), (0, 1))


def test_counts_may_have_other_arrays_beside_them(tmp_path):
    np.savez(tmp_path / "a.npz", counts=np.ones((1, 2, 3), int), note=np.array("x"))
    assert native.load_npz(tmp_path / "a.npz").counts.shape == (1, 2, 3)


def test_several_arrays_of_other_names_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.ones((1, 2, 3), int), y=np.ones((1, 2, 3), int))
    with pytest.raises(ValueError, match=r"cannot be told from other arrays: \['x', 'y'\]"):
        native.load_npz(tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz")
    with pytest.raises(ValueError, match=r"cannot be told from other arrays: \[\]"):
        native.load_npz(tmp_path / "b.npz")


def test_shares_are_no_counts(tmp_path):
    np.savez(tmp_path / "a.npz", counts=np.ones((1, 2, 3)))
    with pytest.raises(ValueError, match=r"a\.npz: array 'counts': the counts are float64"):
        native.load_npz(tmp_path / "a.npz")


@both
def test_a_failed_write_leaves_the_old_file(tmp_path, kind, monkeypatch):
    SAVERS[kind](_recording(), tmp_path / "a")
    before = (tmp_path / "a").read_bytes()

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        SAVERS[kind](_recording(placement=None), tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1
