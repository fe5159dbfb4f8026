from pathlib import Path

import numpy as np
import pytest

from jax_eplb.simulate.costs import Costs, costs_of, read_device, read_model

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "simulate"
MODELS = sorted((CONFIGS / "models").glob("*.yaml"))
DEVICES = sorted((CONFIGS / "devices").glob("*.yaml"))


def test_a_step_is_the_fullest_rank_of_each_layer_and_what_is_always_the_same():
    costs = Costs(tokens_per_second=1000, bytes_per_expert=1, attention_share=0.25)
    imbalance = np.array([[[0.0, 1.0]], [[0.5, 0.5]]])  # two policies, one window, two layers
    seconds = costs.step_seconds(imbalance, np.array([[600, 600]]), num_ranks=2, num_slots=4)
    # 0.3 s of experts and 0.1 s of the rest in each layer that is perfectly balanced.
    np.testing.assert_allclose(seconds[:, 0], [0.4 + 0.7, 0.55 + 0.55])


def test_a_rank_takes_at_least_as_long_as_it_reads_its_weights():
    costs = Costs(1000.0, bytes_per_expert=100, memory_bytes_per_second=1000, attention_share=0.0)
    options = {"num_ranks": 2, "num_slots": 8}
    few, many = np.array([[100]]), np.array([[1000]])
    np.testing.assert_allclose(costs.step_seconds(np.array([[1.0]]), few, **options), 0.4)
    np.testing.assert_allclose(costs.step_seconds(np.array([[1.0]]), many, **options), 1.0)
    # Below this many choices nothing is gained: 400 of them keep the fullest rank for 0.4 s.
    assert costs.least_choices(1.0, **options) == 400
    below = costs.step_seconds(np.array([[1.0]]), np.array([[400]]), **options)
    np.testing.assert_allclose(below, costs.step_seconds(np.array([[0.0]]), few, **options))


def test_a_window_without_tokens_takes_no_time():
    seconds = Costs().step_seconds(np.zeros((2, 1)), np.array([[0], [8]]), num_ranks=2, num_slots=2)
    assert seconds[0] == 0 < seconds[1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokens_per_second": 0}, "tokens_per_second is 0; use a number above 0"),
        ({"bytes_per_second": float("nan")}, "bytes_per_second is nan"),
        ({"attention_share": 1.0}, "attention_share is 1.0; use 0 or more, below 1"),
        ({"bytes_per_expert": "1e6"}, "bytes_per_expert is '1e6'; use a number"),
    ],
)
def test_costs_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Costs(**settings)


@pytest.mark.parametrize("device", DEVICES, ids=lambda path: path.stem)
@pytest.mark.parametrize("model", MODELS, ids=lambda path: path.stem)
def test_every_preset_can_be_read(model, device):
    costs = costs_of(read_model(model), read_device(device))
    assert 0.1 < costs.attention_share < 0.5
    assert 1e6 < costs.bytes_per_expert < 1e9
    assert 1e6 < costs.tokens_per_second < 1e9


def test_every_number_of_a_preset_has_its_source_above_it():
    for path in [*MODELS, *DEVICES]:
        lines = path.read_text().splitlines()
        section = next(i for i, line in enumerate(lines) if line in ("model:", "device:"))
        assert lines[section + 1].strip().startswith("#"), path


def test_the_defaults_are_those_of_a_preset():
    model, device = CONFIGS / "models/qwen3_30b_a3b.yaml", CONFIGS / "devices/h200.yaml"
    costs, default = costs_of(read_model(model), read_device(device)), Costs()
    for name in ("bytes_per_expert", "bytes_per_second", "memory_bytes_per_second"):
        assert getattr(costs, name) == getattr(default, name)
    assert costs.tokens_per_second == pytest.approx(default.tokens_per_second, rel=0.01)
    assert costs.attention_share == pytest.approx(default.attention_share, abs=0.01)
    # As the docstring says, and whatever the widths are.
    moved_for = costs.bytes_per_expert / costs.bytes_per_second * costs.tokens_per_second
    assert round(moved_for) == 1418


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: 3", "expected a mapping with a 'model' section"),
        ("- 1", "expected a mapping with a 'model' section"),
        ("model: {embed_dim: 1}", "the model setting 'activated_parameters' is missing"),
        ("model: [", "not YAML"),
    ],
)
def test_a_file_that_is_no_preset_is_named(tmp_path, text, message):
    path = tmp_path / "model.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"model.yaml: .*{message}"):
        read_model(path)
    with pytest.raises(ValueError, match=r"absent\.yaml: cannot be read"):
        read_device(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("embed_dim: 2048", "embed_dim: two", "embed_dim is 'two'; use a positive number"),
        ("3.3e+9", "3.3e9", r"activated_parameters is '3.3e9'; use a positive number, as 1.0e\+12"),
        ("arithmetic: bfloat16", "arithmetic: int4", "arithmetic is 'int4'"),
        ("  embed_dim", "  width: 1\n  embed_dim", "the model setting 'width' is unknown"),
    ],
)
def test_a_wrong_setting_is_named(tmp_path, old, new, message):
    path = tmp_path / "model.yaml"
    path.write_text((CONFIGS / "models/qwen3_30b_a3b.yaml").read_text().replace(old, new))
    with pytest.raises(ValueError, match=message):
        read_model(path)
