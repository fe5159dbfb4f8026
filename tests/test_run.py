"""`jax-eplb run` on the tiny model: what it records, writes and prints is what the engine does."""

import dataclasses
import json

import numpy as np
import pytest
import yaml

from jax_eplb import Placement, load_recording, save_placement
from jax_eplb.models.weights import save_decoder
from jax_eplb.serving import read_run
from tests.command_line import fail, succeed
from tests.tiny_model import CONFIG, tiny_decoder

pytestmark = pytest.mark.light_compile

# Prompts and output lengths of the file's lines; one is of ids, and one of as many tokens as a
# sequence of `test_engine` may have, so that both compile the same steps.
REQUESTS = [
    {"prompt": "To be", "output_length": 4},
    {"prompt": "for i in range", "output_length": 1},
    {"token_ids": [1, 2, 3], "output_length": 6},
    {"prompt": "2 + 2", "output_length": 27},
    {"prompt": "A", "output_length": 5},
]
WRITTEN = sum(r["output_length"] for r in REQUESTS)
READ = sum(len(r.get("prompt", "abc")) + r["output_length"] - 1 for r in REQUESTS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model's weights and its YAML, requests, and a load balancer of 4 ranks and 32 slots."""
    folder = tmp_path_factory.mktemp("tiny")
    save_decoder(tiny_decoder(), folder / "weights.safetensors")
    values = {"weights": "weights.safetensors", "model": dataclasses.asdict(CONFIG)}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(values))
    (folder / "requests.jsonl").write_text("\n".join(map(json.dumps, REQUESTS)) + "\n")
    placement = Placement.default(num_experts=16, num_slots=32, num_ranks=4, layer_ids=(1, 2))
    save_placement(placement, folder / "plan.yaml")
    save_placement(placement, folder / "online.yaml", layer_updates_per_iter=2)
    text = (folder / "online.yaml").read_text()
    (folder / "cut.yaml").write_text(text[: len(text) // 2])
    for name, experts, layers in (("other", 12, (1, 2)), ("fewer", 16, (1,))):
        placement = Placement.default(
            num_experts=experts, num_slots=32, num_ranks=4, layer_ids=layers
        )
        save_placement(placement, folder / f"{name}.yaml", layer_updates_per_iter=2)
    return folder


def arguments(folder, ep_size=4):
    files = ["--model", folder / "tiny.yaml", "--dataset", folder / "requests.jsonl"]
    return ["run", *files, "--ep-size", ep_size, "--max-batch-size", 2]


def written(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_every_line_gets_its_tokens_and_a_balanced_run_writes_the_same(capsys, folder, tmp_path):
    outputs = {}
    for name, options in {"initial": [], "plan": ["--load-balancer", folder / "plan.yaml"]}.items():
        path = tmp_path / "new" / f"{name}.jsonl"
        succeed(capsys, *arguments(folder), *options, "--output", path)
        outputs[name] = written(path)
    assert outputs["initial"] == outputs["plan"]
    assert [row["line"] for row in outputs["plan"]] == [1, 2, 3, 4, 5]
    for row, request in zip(outputs["plan"], REQUESTS, strict=True):
        assert len(row["token_ids"]) == request["output_length"]
        assert row["text"] == bytes(row["token_ids"]).decode(errors="replace")


@pytest.mark.slow
def test_json_is_one_object_of_throughput_and_report(capsys, folder):
    figures = json.loads(succeed(capsys, *arguments(folder), "--json"))
    assert set(figures) == {"throughput", "report"}
    assert figures["throughput"]["requests"] == len(REQUESTS)
    assert figures["throughput"]["output_tokens"] == WRITTEN
    assert figures["report"]["layers"].keys() == {"1", "2"}
    assert (figures["report"]["basis"], figures["report"]["ranks"]) == ("measured", 4)
    assert figures["report"]["tokens"] == READ


@pytest.mark.slow
def test_text_has_the_table_and_the_throughput(capsys, folder):
    lines = succeed(capsys, *arguments(folder)).splitlines()
    assert lines[0].split() == ["layer", "mean", "std", "imbalance"]
    assert lines[3].startswith("average")
    assert lines[-1].startswith(f"5 requests, {WRITTEN} output tokens in ")


@pytest.mark.slow
def test_all_is_recorded_and_read_again(capsys, folder, tmp_path):
    options = ["--load-balancer", folder / "plan.yaml", "--record", tmp_path / "run.npz"]
    succeed(capsys, *arguments(folder), *options)
    kept = load_recording(tmp_path / "run.npz")
    assert kept.rank_tokens is not None
    assert kept.placement is not None
    np.testing.assert_array_equal(kept.counts.sum(axis=(0, 2)), [READ * 3, READ * 3])
    np.testing.assert_array_equal(kept.counts.sum(axis=2), kept.rank_tokens.sum(axis=2))
    assert (kept.placement.num_slots, kept.layer_ids, kept.experts_per_token) == (32, (1, 2), 3)


@pytest.mark.slow
def test_a_range_goes_to_a_directory_that_plan_and_report_read(capsys, folder, tmp_path):
    directory = tmp_path / "statistics"
    options = ["--record", directory, "--record-iters", "1-3"]
    figures = json.loads(succeed(capsys, *arguments(folder), *options, "--json"))
    assert figures["report"]["iterations"] == 2
    assert load_recording(directory).iterations == (1, 2)
    plan = tmp_path / "plan.yaml"
    sizes = ["--ep-size", 4, "--num-slots", 32, "--effort", "fast"]
    succeed(capsys, "plan", directory, *sizes, "-o", plan)
    report = succeed(capsys, "report", directory, "--ep-size", 4, "--load-balancer", plan, "--json")
    assert json.loads(report)["basis"] == "predicted"
    succeed(capsys, *arguments(folder), "--load-balancer", plan)


@pytest.mark.slow
def test_warming_up_is_neither_recorded_nor_measured(capsys, folder):
    plain = json.loads(succeed(capsys, *arguments(folder), "--json"))
    warmed = json.loads(succeed(capsys, *arguments(folder), "--warmup", 7, "--json"))
    assert warmed["report"] == plain["report"]
    assert warmed["throughput"]["iterations"] == plain["throughput"]["iterations"]


@pytest.mark.slow
def test_a_file_with_layer_updates_is_balanced_while_it_serves(capsys, folder, tmp_path):
    texts = []
    lines = "\n".join(map(json.dumps, REQUESTS * 4)) + "\n"
    (tmp_path / "many.jsonl").write_text(lines)
    many = ["--dataset", tmp_path / "many.jsonl"]
    for name in ("plan", "online"):
        path = tmp_path / f"{name}.jsonl"
        options = ["--load-balancer", folder / f"{name}.yaml", "--output", path, "--json"]
        # Of the options that only one that follows the load has, those that are known.
        if name == "online":
            options += ["--replica-choice", "even", "--events", tmp_path / "new" / "events.jsonl"]
            options += ["--balancer-warmup", 2, "--step-interval", 1]
        figures = json.loads(succeed(capsys, *arguments(folder), *many, *options))
        texts.append(path.read_text())
    assert texts[0] == texts[1]
    did = figures["balancer"]
    events = written(tmp_path / "new" / "events.jsonl")
    assert did["updates"] == len(events) > 0
    assert did["moved_slots"] == sum(event["moves"] for event in events)
    assert did["moved_bytes"] == sum(event["bytes"] for event in events)
    assert min(event["decided_at"] for event in events) == 3
    assert 0 <= did["stall_ms_p50"] <= did["stall_ms_p99"]
    assert did["failures"] == 0
    # A static file says nothing of a balancer.
    assert "balancer" not in json.loads(succeed(capsys, *arguments(folder), "--json"))


@pytest.mark.slow
def test_the_balancers_counters_are_served(capsys, folder):
    options = ["--load-balancer", folder / "online.yaml", "--prometheus-port", 0]
    assert " updates of a layer moved " in succeed(capsys, *arguments(folder), *options)


@pytest.mark.slow
def test_the_temperature_samples_and_small_waves_do_not(capsys, folder, tmp_path):
    texts = []
    for number, options in enumerate(
        ([], ["--temperature", 2], ["--temperature", 2], ["--moe-max-num-tokens", 4])
    ):
        path = tmp_path / f"{number}.jsonl"
        succeed(capsys, *arguments(folder), *options, "--output", path)
        texts.append(path.read_text())
    assert texts[1] == texts[2] != texts[0]
    assert texts[3] == texts[0]


@pytest.mark.slow
def test_the_choice_of_replicas_moves_load_between_ranks_and_changes_no_token(
    capsys, folder, tmp_path
):
    texts, spread = [], []
    for choice in ("even", "balanced", "local"):
        path = tmp_path / f"{choice}.jsonl"
        options = ["--load-balancer", folder / "plan.yaml", "--replica-choice", choice]
        figures = json.loads(
            succeed(capsys, *arguments(folder), *options, "--output", path, "--json")
        )
        texts.append(path.read_text())
        spread.append(figures["report"]["average"]["imbalance"])
    assert texts[1] == texts[2] == texts[0]
    assert spread[1] < spread[0] != spread[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ep-size", 9], "9 ranks need as many devices; there are 8"),
        (["--ep-size", 8, "--load-balancer", "plan.yaml", "--temperature", -1], "temperature is"),
        (["--load-balancer", "none.yaml"], "none.yaml: no such file"),
        (["--load-balancer", "cut.yaml"], "cut.yaml: unparsable YAML"),
        (["--load-balancer", "other.yaml"], "other.yaml: layer 1: expert 12 has no slot"),
        (["--load-balancer", "fewer.yaml"], "fewer.yaml: layer 2 missing"),
        (["--ep-size", 3, "--load-balancer", "plan.yaml"], "32 slots cannot be divided among 3"),
        (["--dataset", "none.jsonl"], "none.jsonl: cannot be read"),
        (["--dataset", "tiny.yaml"], "tiny.yaml, line 1: not JSON"),
        (["--model", "requests.jsonl"], "requests.jsonl: "),
        (["--model", "none.yaml"], "none.yaml: cannot be read"),
        (["--moe-max-num-tokens", 3], "moe_max_num_tokens is 3"),
        pytest.param(  # it runs
            ["--record-iters", "90-100"],
            "those from 90 to 100 were to be kept",
            marks=pytest.mark.slow,
        ),
        (["--load-balancer", "plan.yaml", "--horizon", 9], "--horizon is for a placement that fol"),
        (["--events", "events.jsonl"], "--events is for a placement that follows the load; give a"),
        (["--load-balancer", "online.yaml", "--change-factor", 2], "give window_size, too"),
    ],
)
def test_what_cannot_run_is_refused_in_a_line(capsys, monkeypatch, folder, options, message):
    monkeypatch.chdir(folder)
    assert message in fail(capsys, *arguments(folder), *options)


@pytest.mark.slow
def test_the_outputs_are_kept_where_nothing_was_in_the_range(capsys, folder, tmp_path):
    path = tmp_path / "out.jsonl"
    options = ["--record-iters", "90-100", "--output", path]
    fail(capsys, *arguments(folder), *options)
    assert len(written(path)) == len(REQUESTS)


@pytest.mark.slow
def test_a_run_goes_on_from_its_output_and_reads_its_weights_from_a_checkpoint(
    capsys, folder, tmp_path
):
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    succeed(capsys, *arguments(folder), "--output", whole)
    checkpoint = tmp_path / "checkpoint"
    sizes = ["--ep-size", 2, "--num-slots", 16, "--format", "orbax"]
    succeed(capsys, "reshard", folder / "weights.safetensors", checkpoint, *sizes)
    values = yaml.safe_load((folder / "tiny.yaml").read_text()) | {"weights": str(checkpoint)}
    (tmp_path / "stored.yaml").write_text(yaml.safe_dump(values))
    lines = whole.read_text().splitlines(keepends=True)
    out.write_text(lines[1] + lines[3] + lines[0][:20])
    stored = ["run", "--model", tmp_path / "stored.yaml", *arguments(folder)[3:]]
    figures = json.loads(succeed(capsys, *stored, "--output", out, "--resume", "--json"))
    assert figures["throughput"]["requests"] == len(REQUESTS) - 2
    assert out.read_text() == whole.read_text()
    message = fail(capsys, *stored, "--output", out, "--resume")
    assert "has all 5 requests: nothing to do" in message


def test_a_checkpoint_of_another_model_is_refused(capsys, folder, tmp_path):
    values = yaml.safe_load((folder / "tiny.yaml").read_text()) | {"weights": str(tmp_path)}
    (tmp_path / "stored.yaml").write_text(yaml.safe_dump(values))
    stored = ["run", "--model", tmp_path / "stored.yaml", *arguments(folder)[3:]]
    assert "holds no complete checkpoint" in fail(capsys, *stored)


@pytest.mark.slow
def test_what_a_run_kept_is_where_the_next_begins(capsys, folder, tmp_path):
    online = ["--load-balancer", folder / "online.yaml", "--checkpoint", tmp_path / "kept"]
    online += ["--replica-choice", "even"]  # half of the compiling
    events = tmp_path / "events.jsonl"
    first = json.loads(succeed(capsys, *arguments(folder), *online, "--json"))
    kept = read_run(tmp_path / "kept")
    assert kept is not None
    iterations = first["throughput"]["iterations"]
    assert kept.load["iteration"] == iterations
    assert kept.load["load"].sum() > 0
    options = ["--checkpoint-interval", 10, "--events", events, "--json"]
    second = json.loads(succeed(capsys, *arguments(folder), *online, *options))
    again = read_run(tmp_path / "kept")
    assert again is not None
    assert again.load["iteration"] == iterations + second["throughput"]["iterations"]
    fewer = arguments(folder, ep_size=2)
    succeed(capsys, *fewer, *online, "--json")  # other ranks go on from it, too


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--resume"], "--resume goes on with an output: give --output FILE, too"),
        (["--checkpoint", "kept"], "--checkpoint is for a placement that follows the load"),
        (["--process-id", 0], "--process-id is for several processes: add --distributed"),
        (["--distributed", "--process-id", 0], "--process-id needs --coordinator, too"),
        (
            ["--distributed", "--coordinator", "x:1", "--num-processes", 3, "--process-id", 0],
            "--ep-size 4 is not divisible by --num-processes 3",
        ),
    ],
)
def test_options_that_do_not_fit_together_are_refused(capsys, folder, options, message):
    assert message in fail(capsys, *arguments(folder), *options)
