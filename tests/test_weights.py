import dataclasses
import json
import re

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import yaml

from jax_eplb.checkpoint import load_weights, save_weights
from jax_eplb.models import parameters
from jax_eplb.models.weights import SavedDecoder, load_decoder, load_model, save_decoder
from tests.small_decoder import SMALL, drawn_on_host

FACTS = {"steps": 3, "held_out_bits_per_byte": {"prose": 1.5}}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "new folder" / "small.safetensors"
    save_decoder(SavedDecoder(SMALL, drawn_on_host(), FACTS), path)
    return path


def changed(path, tmp_path, *, facts=None, **arrays):
    """A copy with other arrays; None leaves one out."""
    held, old_facts = load_weights(path)
    held |= {name.replace("_0_", "."): array for name, array in arrays.items()}
    kept = {name: array for name, array in held.items() if array is not None}
    copy = tmp_path / "copy.safetensors"
    save_weights(kept, copy, old_facts if facts is None else facts)
    return copy


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_arrays_and_facts_come_back_as_they_were(tmp_path, dtype):
    path = tmp_path / "some.safetensors"
    arrays = {"a": np.arange(6).reshape(2, 3).astype(dtype), "none": np.zeros((0, 4), dtype)}
    arrays["turned"] = arrays["a"].T  # not contiguous
    save_weights(arrays, path, {"ü": [1, 2.5]})
    found, facts = load_weights(path)
    assert facts == {"ü": [1, 2.5]}
    assert set(found) == set(arrays)
    for name, array in arrays.items():
        assert found[name].dtype == dtype
        np.testing.assert_array_equal(found[name], array)


def test_a_decoder_comes_back_rounded_to_bfloat16(saved):
    found = load_decoder(saved)
    assert (found.config, found.facts) == (SMALL, FACTS)
    for (name, array), (_, sent) in zip(
        parameters.named(found.params), parameters.named(drawn_on_host()), strict=True
    ):
        np.testing.assert_array_equal(array, sent.astype(ml_dtypes.bfloat16), err_msg=name)


def test_a_decoder_without_dense_layers_or_shared_expert_comes_back_too(tmp_path):
    config = dataclasses.replace(SMALL, num_dense_layers=0, shared_hidden_dim=0)
    shapes = parameters.shapes(config)
    params = zeros_of(shapes)
    save_decoder(SavedDecoder(config, params, {}), tmp_path / "plain.safetensors")
    found = load_decoder(tmp_path / "plain.safetensors")
    assert found.config == config
    assert found.params.sparse.moe.shared is None


def zeros_of(shapes):
    return jax.tree.map(lambda shape: np.zeros(shape), shapes, is_leaf=parameters.is_shape)


def test_nothing_but_the_new_file_is_left_and_it_replaces_the_old(tmp_path):
    path = tmp_path / "some.safetensors"
    for value in (1.0, 2.0):
        save_weights({"a": np.full(2, value)}, path, {})
    assert load_weights(path)[0]["a"].tolist() == [2.0, 2.0]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_a_truncated_file_is_refused_by_name(saved, tmp_path, kept):
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(saved.read_bytes()[:kept])
    with pytest.raises(ValueError, match=re.escape(f"{path}: not a whole safetensors file")):
        load_decoder(path)


def test_a_missing_file_is_named(tmp_path):
    path = tmp_path / "none.safetensors"
    with pytest.raises(ValueError, match=re.escape(f"{path}: cannot be read (No such file")):
        load_weights(path)


@pytest.mark.parametrize("metadata", [None, {"facts": "{"}])
def test_a_file_of_another_program_is_refused(tmp_path, metadata):
    path = tmp_path / "other.safetensors"
    safetensors.numpy.save_file({"a": np.ones(2, np.float32)}, path, metadata=metadata)
    with pytest.raises(ValueError, match=re.escape(f"{path}: no facts in its metadata")):
        load_weights(path)


def test_arrays_that_are_not_floats_are_refused(tmp_path):
    path = tmp_path / "other.safetensors"
    metadata = {"facts": json.dumps({})}
    safetensors.numpy.save_file({"a": np.ones(2, np.int16)}, path, metadata=metadata)
    with pytest.raises(ValueError, match="arrays that are not floats"):
        load_weights(path)


def test_a_missing_array_is_named(saved, tmp_path):
    path = changed(saved, tmp_path, dense_0_norm=None)
    with pytest.raises(ValueError, match=re.escape(f"{path}: the array 'dense.norm' is missing")):
        load_decoder(path)


def test_an_array_of_another_shape_is_named(saved, tmp_path):
    path = changed(saved, tmp_path, norm=np.ones(3, np.float32))
    with pytest.raises(
        ValueError, match=re.escape(f"{path}: 'norm' has shape (3,), expected (16,)")
    ):
        load_decoder(path)


@pytest.mark.parametrize("facts", [{"steps": 1}, [], 5])
def test_weights_without_a_config_are_refused(saved, tmp_path, facts):
    path = changed(saved, tmp_path, facts=facts)
    with pytest.raises(ValueError, match=re.escape(f"{path}: 'model' must be a mapping of sizes")):
        load_decoder(path)


def write_config(path, **changed):
    model = dataclasses.asdict(SMALL) | changed
    path.write_text(yaml.safe_dump({"weights": "small.safetensors", "model": model}))
    return path


def test_a_model_is_read_from_its_config_beside_its_weights(saved):
    found = load_model(write_config(saved.with_name("small.yaml")))
    assert found.config == SMALL


def test_a_config_that_is_not_the_weights_own_is_refused(saved):
    path = write_config(saved.with_name("other.yaml"), num_heads=4, head_dim=4)
    with pytest.raises(ValueError, match=r"num_heads is 4, but the weights .* were made with 2"):
        load_model(path)
