import dataclasses
import re

import pytest

from jax_eplb import MoEConfig
from jax_eplb.models import DecoderConfig
from jax_eplb.models.config import read_config
from tests.small_decoder import SMALL

VALUES = dataclasses.asdict(SMALL)


def decoder(**changed):
    return DecoderConfig.from_dict(VALUES | changed, "small.yaml")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: decoder(num_heads=0), "num_heads is 0; use an integer of 1 or more"),
        (lambda: decoder(num_experts="8"), "num_experts is '8'; use an integer of 1 or more"),
        (lambda: decoder(num_experts=8.0), "num_experts is 8.0; use an integer"),
        (lambda: decoder(num_layers=True), "num_layers is True; use an integer"),
        (lambda: decoder(num_dense_layers=-1), "num_dense_layers is -1; use an integer of 0 or"),
        (lambda: decoder(num_dense_layers=3), "num_dense_layers is 3 of 3 layers; at least one"),
        (lambda: decoder(head_dim=7), "head_dim is 7; rotary positions need an even one"),
        (lambda: decoder(n_routed_experts=8), "unknown model setting 'n_routed_experts'; known: "),
        (lambda: decoder(rope_base="1e4"), "rope_base is '1e4'; use a positive number"),
        (lambda: decoder(norm_epsilon=-1e-6), "norm_epsilon is -1e-06; use a positive number"),
        (lambda: decoder(experts_per_token=9), "experts_per_token is 9 of 8 experts"),
        (lambda: DecoderConfig.from_dict({"vocab_size": 3}, "small.yaml"),
         "the model setting 'dense_hidden_dim' is missing"),
        (lambda: DecoderConfig.from_dict(None, "small.yaml"), "'model' must be a mapping"),
    ],
)  # fmt: skip
def test_a_faulty_decoder_setting_is_refused_by_file_and_name(call, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        call()
    assert str(caught.value).startswith("small.yaml: ")


def test_settings_with_a_default_may_be_left_out():
    given = {k: v for k, v in VALUES.items() if k not in ("rope_base", "norm_epsilon")}
    assert DecoderConfig.from_dict(given, "small.yaml") == SMALL


def test_moe_layers_follow_the_dense_ones():
    assert decoder().num_moe_layers == 2
    assert decoder().moe_layer_ids == (1, 2)


def test_the_config_of_the_byte_model_is_whole():
    values = read_config("configs/byte_moe.yaml")
    config = DecoderConfig.from_dict(values["model"], "configs/byte_moe.yaml")
    assert config.num_moe_layers >= 6
    assert config.num_experts >= 64
    assert config.experts_per_token >= 4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read (No such file or directory)"),
        (b"model: [", "not YAML"),
        (b"model: \xff", "not YAML"),
        (b"- 1", "expected a mapping with a 'model' section"),
        (b"training: {}", "expected a mapping with a 'model' section"),
        (b"", "expected a mapping with a 'model' section"),
    ],
)
def test_a_faulty_file_is_named(tmp_path, content, message):
    path = tmp_path / "model.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        read_config(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_the_layers_config_takes_over_the_decoders_sizes():
    moe = SMALL.moe(num_slots=16, num_ranks=4, moe_max_num_tokens=8)
    assert moe == MoEConfig(
        embed_dim=16,
        hidden_dim=8,
        num_experts=8,
        experts_per_token=2,
        num_slots=16,
        num_ranks=4,
        shared_hidden_dim=8,
        moe_max_num_tokens=8,
    )
