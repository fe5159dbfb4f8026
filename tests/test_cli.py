"""Parsing, exit codes, and that no input brings a traceback; each command has its own tests."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jax_eplb import save_recording
from jax_eplb.cli import build_parser, main
from tests.command_line import fail, skewed_counts, skewed_recording, write_statistics


@pytest.mark.parametrize("command", ["demo", "report", "plan", "run", "reshard", "convert"])
def test_each_command_explains_itself(capsys, command):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    assert f"usage: jax-eplb {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: COMMAND"),
        (["serve"], "invalid choice: 'serve'"),
        (["report"], "required: RECORDING"),
        (["report", "a.npz", "--ep-size", "0"], "'0' is not an integer of 1 or more"),
        (["report", "a.npz", "--ep-size", "two"], "'two' is not an integer of 1 or more"),
        (["report", "a.npz", "--iter-start", "-1"], "'-1' is not an integer of 0 or more"),
        (["report", "a.npz", "--unit", "tokens"], "invalid choice: 'tokens'"),
        (["plan", "a.npz", "--ep-size", "4"], "required: -o/--output"),
        (["plan", "a.npz", "-o", "b.yaml"], "required: --ep-size"),
        (["plan", "a.npz", "--layer-updates-per-iter", "-2"], "not an integer of 0 or more"),
        (["run", "--model", "a.yaml"], "required: --dataset, --ep-size"),
        (["run", "--record-iters", "7"], "'7' is not a range such as 100-200"),
        (["run", "--record-iters", "9-9"], "'9-9' is empty; the end is not included"),
        (["run", "--warmup", "-1"], "'-1' is not an integer of 0 or more"),
        (["demo", "--batches", "0"], "'0' is not an integer of 1 or more"),
        (["demo", "--online", "--iterations", "0"], "'0' is not an integer of 1 or more"),
        (["run", "--window-size", "0"], "'0' is not an integer of 1 or more"),
        (["convert", "a.yaml", "b.json"], "required: --to"),
        (["convert", "a.yaml", "b.json", "--to", "tgi"], "invalid choice: 'tgi'"),
        (["convert", "a", "b", "--to", "vllm", "--layers", "5-3"], "names no layer"),
        (["convert", "a", "b", "--to", "vllm", "--layers", "1-99999"], "are more than 10000"),
        (["demo", "--colour"], "unrecognized arguments: --colour"),
    ],
)
def test_a_wrong_option_ends_with_code_2_and_says_which(capsys, arguments, message):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_the_demos_default_is_eight_devices():
    arguments = build_parser().parse_args(["demo"])
    assert (arguments.ep_size, arguments.num_slots, arguments.online) == (8, None, False)


def not_an_archive(path):
    path.with_suffix(".npz").write_bytes(b"PK nothing of the kind")
    return path.with_suffix(".npz")


def cut_short(path):
    path = path.with_suffix(".npz")
    save_recording(skewed_recording(), path)
    path.write_bytes(path.read_bytes()[:-200])
    return path


def negative(path):
    counts = skewed_counts()
    counts[2, 1, 4] = -7
    np.save(path.with_suffix(".npy"), counts)
    return path.with_suffix(".npy")


def a_rank_without_a_tensor(path):
    write_statistics(path, skewed_counts())
    tensors = load_file(path / "rank1.safetensors")
    del tensors["12_4"]
    save_file(tensors, path / "rank1.safetensors")
    return path


def no_meta(path):
    write_statistics(path, skewed_counts())
    (path / "meta_info.json").unlink()
    return path


def unknown_suffix(path):
    path.with_suffix(".csv").write_text("1,2\n")
    return path.with_suffix(".csv")


def absent(path):
    return path


DAMAGE = {
    not_an_archive: "recorded.npz",
    cut_short: "recorded.npz",
    negative: "negative count -7",
    a_rank_without_a_tensor: "12_4",
    no_meta: "meta_info.json: no such file",
    unknown_suffix: "unknown format '.csv'",
    absent: "no such file or directory",
}


@pytest.mark.parametrize("command", ["report", "plan"])
@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_a_damaged_recording_is_refused_by_name(capsys, tmp_path, damage, command):
    path = damage(tmp_path / "recorded")
    output = ["-o", tmp_path / "plan.yaml"] if command == "plan" else []
    error = fail(capsys, command, path, "--ep-size", 4, *output)
    assert str(path) in error
    assert DAMAGE[damage] in error


def test_an_interrupted_command_ends_with_code_130(monkeypatch):
    def interrupt(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("jax_eplb.commands.report.run", interrupt)
    assert main(["report", "a.npz"]) == 130


def test_json_of_a_report_is_alone_on_standard_output(capsys, tmp_path):
    save_recording(skewed_recording(), tmp_path / "a.npz")
    assert main(["report", str(tmp_path / "a.npz"), "--ep-size", "3", "--json"]) == 0
    out, err = capsys.readouterr()
    assert isinstance(json.loads(out), dict)
    assert (out.count("\n"), err) == (1, "")
