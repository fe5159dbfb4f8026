import argparse

import numpy as np
import pytest

from jax_eplb import Placement, save_placement, save_recording
from jax_eplb.commands.inputs import (
    add_recording_options,
    parse_range,
    positive,
    read_recording,
    whole,
)
from tests.command_line import ITERATIONS, LAYERS, skewed_counts, skewed_recording


def read(*arguments):
    parser = argparse.ArgumentParser()
    add_recording_options(parser)
    return read_recording(parser.parse_args([str(a) for a in arguments]))


@pytest.mark.parametrize(
    ("text", "limits"), [("100-200", (100, 200)), ("5-", (5, None)), ("0-1", (0, 1))]
)
def test_a_range_is_half_open_and_may_have_no_end(text, limits):
    assert parse_range(text) == limits


@pytest.mark.parametrize(
    "text", ["", "-", "7", "-5", "a-b", "1-2-3", "1 - 2", "3-3", "4-3", "1.5-2"]
)
def test_what_is_no_range_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match=r"not a range such as 100-200|is empty"):
        parse_range(text)


def test_integers_have_a_least_value():
    assert (whole("0"), positive("12")) == (0, 12)
    for parse, text in ((whole, "-1"), (whole, "1.0"), (positive, "0"), (positive, "x")):
        with pytest.raises(argparse.ArgumentTypeError, match="is not an integer of"):
            parse(text)


def test_iterations_are_cut_and_small_ones_left_out(tmp_path):
    counts = skewed_counts()
    counts[1] = 1
    save_recording(skewed_recording(), tmp_path / "a.npz")
    assert read(tmp_path / "a.npz").iterations == ITERATIONS
    assert read(tmp_path / "a.npz", "--iter-start", 11, "--iter-stop", 13).iterations == (11, 12)
    np.save(tmp_path / "b.npy", counts)
    kept = read(tmp_path / "b.npy", "--min-tokens", 100, "--experts-per-token", 2)
    assert kept.iterations == (0, 2, 3)


def test_options_say_what_a_bare_array_does_not(tmp_path):
    np.save(tmp_path / "a.npy", skewed_counts(16))
    sizes = ["--num-experts", 12, "--experts-per-token", 2]
    kept = read(tmp_path / "a.npy", *sizes, "--unit", "slots")
    assert (kept.unit, kept.num_experts, kept.experts_per_token) == ("slots", 12, 2)
    assert kept.placement is None


def test_the_active_load_balancer_makes_slots_experts(tmp_path):
    active = Placement.default(num_experts=12, num_slots=16, num_ranks=4, layer_ids=LAYERS)
    save_placement(active, tmp_path / "active.yaml")
    np.save(tmp_path / "a.npy", skewed_counts(16))
    given = ["--active-load-balancer", tmp_path / "active.yaml", "--recorded-ep-size", 4]
    kept = read(tmp_path / "a.npy", *given)
    assert (kept.unit, kept.layer_ids) == ("slots", LAYERS)
    assert kept.expert_counts().sum() == skewed_counts(16).sum()
    with pytest.raises(ValueError, match="--active-load-balancer needs --recorded-ep-size"):
        read(tmp_path / "a.npy", *given[:2])
