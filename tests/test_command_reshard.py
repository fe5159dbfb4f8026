"""`jax-eplb reshard`, and the script of the same options."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jax_eplb import Placement, load_placement, save_placement, save_recording
from jax_eplb.checkpoint import Checkpoints
from jax_eplb.checkpoint.sources import open_source
from jax_eplb.cli import main
from jax_eplb.load import Recording
from jax_eplb.planner import plan
from tests import hugging_face_cases as cases
from tests.checkpoint_cases import assert_same, planned, state_of, targets
from tests.command_line import fail, run, skewed_counts, succeed, write_statistics
from tests.test_rewrite import assert_holds

pytestmark = pytest.mark.light_compile

LAYERS = (1, 2)  # DeepSeek's


@pytest.fixture
def model(tmp_path):
    return cases.write(cases.deepseek, tmp_path / "model")


def placement_beside(out):
    placement = open_source(out).placement
    written = load_placement(out / "moe_load_balancer.yaml", num_ranks=placement.num_ranks)
    np.testing.assert_array_equal(written.slot_to_expert, placement.slot_to_expert)
    return placement


def test_the_default_is_the_initial_layout_in_the_same_format(capsys, model, tmp_path):
    out = tmp_path / "out"
    text = succeed(capsys, "reshard", model, out, "--ep-size", 4)
    assert_holds(out, cases.arrays_of(cases.deepseek))
    placement = placement_beside(out)
    expected = Placement.default(num_experts=6, num_ranks=4, layer_ids=LAYERS)
    np.testing.assert_array_equal(placement.slot_to_expert, expected.slot_to_expert)
    assert f"{model}: safetensors, 6 experts in 2 layers, 6 arrays of each expert, 5 others" in text
    assert "for 8 slots on 4 ranks, 2 each" in text
    assert text.endswith(f"all of it read back, checksums equal\n{out}\n")


def test_a_load_balancer_file_says_where_experts_go(capsys, model, tmp_path):
    rows = [[5, 4, 3, 2, 1, 0, 5, 3], [0, 2, 4, 1, 3, 5, 1, 0]]
    wanted = Placement.from_slots(rows, num_experts=6, num_ranks=2, layer_ids=LAYERS)
    save_placement(wanted, tmp_path / "plan.yaml")
    options = ("--ep-size", 2, "--load-balancer", tmp_path / "plan.yaml", "--format", "orbax")
    succeed(capsys, "reshard", model, tmp_path / "out", *options)
    np.testing.assert_array_equal(placement_beside(tmp_path / "out").slot_to_expert, rows)
    error = fail(capsys, "reshard", model, tmp_path / "b", *options, "--num-slots", 10)
    assert "plan.yaml has 8 slots, but --num-slots is 10; leave it out" in error


@pytest.mark.slow
def test_a_recording_is_planned_for(capsys, tmp_path):
    """One of layers 3, 4 and 7 with 12 experts, as these checkpoints have them."""
    counts = skewed_counts()
    write_statistics(tmp_path / "load", counts)
    saved = planned(16, 4)
    with Checkpoints(tmp_path / "run") as checkpoints:
        checkpoints.save(2, state_of(saved), saved)
    options = ("--ep-size", 4, "--num-slots", 16, "--recording", tmp_path / "load")
    text = succeed(capsys, "reshard", tmp_path / "run", tmp_path / "out", *options)
    assert re.search(r"moved    \d+ of 48 slots change; .* of experts are new to their rank", text)
    expected = plan(counts, 16, 4, layer_ids=saved.layer_ids).placement
    found = placement_beside(tmp_path / "out")
    np.testing.assert_array_equal(found.slot_to_expert, expected.slot_to_expert)
    with Checkpoints(tmp_path / "out") as checkpoints:
        assert_same(checkpoints.restore(targets(state_of(found))).state, state_of(found))


def test_slots_are_written_in_files_of_their_ranks(capsys, model, tmp_path):
    options = ("--ep-size", 4, "--layout", "slots")
    text = succeed(capsys, "reshard", model, tmp_path / "out", *options)
    files = {p.name for p in (tmp_path / "out").glob("*.safetensors")}
    assert files == {*(f"rank-{r:05d}.safetensors" for r in range(4)), "others.safetensors"}
    assert all(name in text for name in files)
    error = fail(capsys, "reshard", model, tmp_path / "b", *options, "--format", "orbax")
    assert "--layout slots writes safetensors; leave out --format orbax" in error


def test_a_dry_run_says_what_it_would_do_and_writes_nothing(capsys, model, tmp_path):
    options = ("--ep-size", 2, "--num-slots", 8, "--layout", "slots", "--dry-run")
    text = succeed(capsys, "reshard", model, tmp_path / "out", *options)
    one = 3 * (32 + 4)  # three float8 matrices with a scale each
    other = 32 * 2 + 2 * (32 * 2 + 6 * 4)
    assert text.splitlines()[2:] == [
        f"read     {2 * 8 * one / 1e3:.2f} kB of experts, {other} B of others",
        f"written  {(2 * 8 * one + other) / 1e3:.2f} kB to {tmp_path / 'out'}: safetensors, in "
        "slot order",
        f"         {2 * 4 * one} B  rank-00000.safetensors",
        f"         {2 * 4 * one} B  rank-00001.safetensors",
        f"         {other} B  others.safetensors",
        "moved    unknown: the checkpoint has no placement",
        f"a rank reads {2 * 4 * one} B of experts when it loads",
    ]
    assert not (tmp_path / "out").exists()


def test_json_is_alone_on_standard_output(capsys, model, tmp_path):
    options = ("--ep-size", 2, "--num-slots", 8, "--json")
    dry = json.loads(succeed(capsys, "reshard", model, tmp_path / "out", *options, "--dry-run"))
    done = json.loads(succeed(capsys, "reshard", model, tmp_path / "out", *options))
    assert dry == done
    size = sum(array.nbytes for array in cases.arrays_of(cases.deepseek).values())
    assert done["bytes_written"] == size == sum(done["files"].values())
    assert done["output"] == str(tmp_path / "out")


def test_layers_that_no_plan_names_may_keep_the_initial_layout(capsys, model, tmp_path):
    row = [5, 4, 3, 2, 1, 0, 5, 3]
    one = Placement.from_slots([row], num_experts=6, num_ranks=2, layer_ids=(1,))
    save_placement(one, tmp_path / "one.yaml")
    options = ("--ep-size", 2, "--load-balancer", tmp_path / "one.yaml")
    error = fail(capsys, "reshard", model, tmp_path / "out", *options)
    assert "one.yaml" in error
    succeed(capsys, "reshard", model, tmp_path / "out", *options, "--default-layers", 2)
    found = np.asarray(placement_beside(tmp_path / "out").slot_to_expert)
    initial = Placement.default(num_experts=6, num_ranks=2, num_slots=8)
    np.testing.assert_array_equal(found, [row, *np.asarray(initial.slot_to_expert)])
    for layers in ("7", "1,2"):
        error = fail(capsys, "reshard", model, tmp_path / "b", *options, "--default-layers", layers)
        assert "has MoE layers [1, 2]; name some of them" in error


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("num_slots: [", "unparsable YAML"),
        ("num_slots: 8\ninitial_global_assignments: {1: [0, 1]}", "num_slots is 8"),
        (
            "num_slots: 6\ninitial_global_assignments: "
            "{1: [0, 1, 2, 3, 4, 5], 9: [0, 1, 2, 3, 4, 5]}",
            "layer",
        ),
        (
            "num_slots: 8\ninitial_global_assignments: "
            "{1: [0, 1, 2, 3, 4, 5, 6, 7], 2: [0, 1, 2, 3, 4, 5, 6, 7]}",
            "unknown expert 6; this model's experts are 0 to 5",
        ),
    ],
)
def test_a_damaged_plan_or_one_of_another_model_is_refused(capsys, model, tmp_path, text, message):
    (tmp_path / "plan.yaml").write_text(text)
    options = ("--ep-size", 2, "--load-balancer", tmp_path / "plan.yaml")
    error = fail(capsys, "reshard", model, tmp_path / "out", *options)
    assert str(tmp_path / "plan.yaml") in error
    assert message in error
    assert not (tmp_path / "out").exists()


def test_a_recording_of_another_model_is_refused(capsys, model, tmp_path):
    other = Recording(
        np.ones((1, 2, 5), int),
        num_experts=5,
        experts_per_token=2,
        layer_ids=LAYERS,
        iterations=(0,),
    )
    save_recording(other, tmp_path / "load.npz")
    options = ("--ep-size", 2, "--recording", tmp_path / "load.npz")
    error = fail(capsys, "reshard", model, tmp_path / "out", *options)
    assert "load.npz: 5 experts in layers [1, 2], but" in error


def test_damage_that_is_met_on_the_way_ends_with_code_1(capsys, model, tmp_path):
    succeed(capsys, "reshard", model, tmp_path / "a", "--ep-size", 2, "--format", "orbax")
    chunk = tmp_path / "a/0/pytree/model.layers.mlp.experts.up_proj.weight/1.3.0.0"
    chunk.write_bytes(b"x" * 32)
    code, out, err = run(capsys, "reshard", tmp_path / "a", tmp_path / "b", "--ep-size", 2)
    assert (code, out) == (1, "")
    assert f"jax-eplb reshard: error: {chunk}: damaged" in err.replace("\n", "")
    assert not (tmp_path / "b").exists()


def test_the_options_exclude_each_other(capsys, model):
    for arguments in (
        ["reshard", str(model), "out"],
        [
            "reshard",
            str(model),
            "out",
            "--ep-size",
            "2",
            "--load-balancer",
            "a",
            "--recording",
            "b",
        ],
    ):
        with pytest.raises(SystemExit):
            main(arguments)
    error = capsys.readouterr().err
    assert "required: --ep-size" in error
    assert "--recording: not allowed with argument --load-balancer" in error


@pytest.mark.slow
def test_the_script_takes_the_same_options(model, tmp_path):
    script = Path(__file__).parents[1] / "scripts/reshard_checkpoint.py"
    arguments = [model, tmp_path / "out", "--ep-size", "2", "--num-slots", "8"]
    run = subprocess.run(
        [sys.executable, script, *arguments], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert "resharding" in run.stderr  # the bar
    assert_holds(tmp_path / "out", cases.arrays_of(cases.deepseek))
