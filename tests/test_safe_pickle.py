"""Pickles: what is in the table is built, and nothing else is imported, called or changed."""

import io
import os
import pickle
from collections import OrderedDict
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from jax_eplb.formats.safe_pickle import (
    NUMPY_NAMES,
    PickledArray,
    PickledDtype,
    PickleError,
    load_pickle,
)


def load(data: bytes, **options):
    return load_pickle(io.BytesIO(data), Path("a.npy"), NUMPY_NAMES, **options)


class Call:
    """Pickles as the call of a function with arguments."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


@given(st.permutations(range(2)), st.sampled_from(["<i4", ">i8", "u1", "<f4", "?"]))
@settings(derandomize=True, deadline=None, max_examples=20)
def test_arrays_are_read_in_any_order_and_type(axes, dtype):
    values = np.arange(12).reshape(3, 4).astype(dtype).transpose(axes)
    read = load(pickle.dumps({"x": values}))["x"].array()
    assert read.dtype == values.dtype
    np.testing.assert_array_equal(read, values)


def test_the_names_of_numpy_1_are_read():
    values = np.arange(6).reshape(2, 3)
    pickled = pickle.dumps(values, 3)  # numpy 1 wrote protocol 3
    old = pickled.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
    assert old != pickled
    np.testing.assert_array_equal(load(old).array(), values)


def test_an_array_of_objects_gives_its_objects():
    read = load(pickle.dumps(np.array([{"a": 1}, "b"], object)))
    assert read.items() == [{"a": 1}, "b"]
    with pytest.raises(ValueError, match="not an array of numbers"):
        read.array()
    with pytest.raises(ValueError, match="not an array of objects"):
        load(pickle.dumps(np.arange(2))).items()


@pytest.mark.parametrize("values", [np.ones(2, "M8[s]"), np.ones(2, complex), np.array(["a"])])
def test_other_types_of_array_are_refused(values):
    read = load(pickle.dumps(values))
    with pytest.raises(ValueError, match=r"dtype .* is not read from a pickle"):
        read.array()


def test_plain_values_are_kept():
    values = [1, -(2**70), 0.5, "a", b"b", None, True, (1, 2), {3: [4]}, {5}, OrderedDict(a=1)]
    assert load(pickle.dumps(values)) == values


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("function", [os.system, eval, exec, getattr, np.load, Path, PickledArray])
def test_any_other_name_is_refused_and_named(function, protocol):
    data = pickle.dumps({"x": Call(function, "1")}, protocol)
    with pytest.raises(PickleError, match=r"^a\.npy: refused to load \w[\w.]*\.\w+; only tensors"):
        load(data)


def test_the_refusal_says_module_and_name():
    with pytest.raises(PickleError, match=r"refused to load shutil\.rmtree; only"):
        load(b"cshutil\nrmtree\n.")
    # Protocol 4 reaches attributes of what may be named; here OrderedDict's.
    data = b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.fromkeys\x93."
    with pytest.raises(PickleError, match=r"refused to load collections\.OrderedDict\.fromkeys;"):
        load(data)


def test_a_hostile_pickle_executes_nothing(tmp_path):
    mark = tmp_path / "mark"
    data = pickle.dumps([Call(open, str(mark), "w"), 1])
    pickle.loads(data)[0].close()
    assert mark.exists(), "the pickle would do harm elsewhere"
    mark.unlink()
    with pytest.raises(PickleError, match=r"refused to load (_?io)\.open"):
        load(data)
    assert not mark.exists()


@pytest.mark.parametrize("function", ["numpy\ndtype", "numpy._core.multiarray\n_reconstruct"])
@pytest.mark.parametrize("attribute", [b"__call__", b"__class__", b"other"])
def test_a_pickle_cannot_change_the_table(function, attribute):
    # PROTO 2, the function, state (None, {attribute: 1}), BUILD, STOP.
    name = len(attribute).to_bytes(4, "little") + attribute
    data = b"\x80\x02c" + function.encode() + b"\nN}X" + name + b"K\x01s\x86b."
    with pytest.raises(PickleError, match=r"a\.npy: damaged pickle \((Attribute|Type)Error"):
        load(data)
    values = np.arange(3)
    np.testing.assert_array_equal(load(pickle.dumps(values)).array(), values)


def test_a_call_of_what_is_no_function_is_damage():
    with pytest.raises(PickleError, match=r"damaged pickle \(TypeError"):
        load(b"\x80\x02cnumpy\nndarray\n)R.")


def test_a_persistent_id_needs_a_storage():
    data = b"\x80\x02K\x07Q."
    assert load(data, load_storage=lambda pid: pid + 1) == 8
    with pytest.raises(PickleError, match="a persistent id outside a torch file"):
        load(data)


def test_every_truncation_is_damage_and_names_the_file():
    whole = pickle.dumps({"x": np.arange(5), "y": [1, "a"]})
    for size in range(len(whole)):
        with pytest.raises(PickleError, match=r"^a\.npy: damaged pickle \("):
            load(whole[:size])


def test_a_dtype_of_another_order_is_kept_as_data():
    read = load(pickle.dumps(np.dtype(">i4")))
    assert isinstance(read, PickledDtype)
    assert read.dtype() == np.dtype(">i4")
