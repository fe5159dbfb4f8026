"""`jax-eplb run --distributed`: several processes write what one writes, and go on after a loss."""

import contextlib
import dataclasses
import json
import signal
import time

import numpy as np
import pytest
import yaml

from jax_eplb import Placement, expert_mesh, save_placement
from jax_eplb.checkpoint import Checkpoints
from jax_eplb.cli import main
from jax_eplb.serving import read_run
from tests.processes import finish, free_port, started_together
from tests.tiny_model import CONFIG, tiny_decoder

pytestmark = [pytest.mark.light_compile, pytest.mark.slow]

RANKS = 4
REQUESTS = 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model whose weights are a checkpoint, requests, and a plan that is to follow the load."""
    folder = tmp_path_factory.mktemp("processes")
    placement = Placement.default(num_experts=16, num_slots=24, num_ranks=RANKS, layer_ids=(1, 2))
    params = tiny_decoder().on_mesh(placement, expert_mesh(RANKS), "expert", np.float32)
    with Checkpoints(folder / "weights") as checkpoints:
        checkpoints.save(0, params, placement)
    values = {"weights": "weights", "model": dataclasses.asdict(CONFIG)}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(values))
    generator = np.random.default_rng(0)
    rows = [
        {"token_ids": generator.integers(0, 64, 8).tolist(), "output_length": 8 + number % 5}
        for number in range(REQUESTS)
    ]
    (folder / "requests.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    save_placement(placement, folder / "online.yaml", layer_updates_per_iter=1)
    return folder


def arguments(folder, out, ep_size=RANKS):
    files = ["--model", folder / "tiny.yaml", "--dataset", folder / "requests.jsonl"]
    online = ["--load-balancer", folder / "online.yaml", "--checkpoint", f"{out}.kept"]
    online += ["--replica-choice", "even"]  # half of the compiling
    sizes = ["--ep-size", ep_size, "--max-batch-size", 2, "--checkpoint-interval", 5]
    return list(map(str, ["run", *files, *online, *sizes, "--output", out, "--json"]))


def together(processes, *command):
    """The command in so many processes, each of which counts itself in."""
    where = ["--distributed", "--coordinator", f"localhost:{free_port()}"]
    where += ["--num-processes", str(processes), "--process-id"]
    own = (str(process) for process in range(processes))
    return started_together(["-m", "jax_eplb", *command, *where, process] for process in own)


def rows_of(path):
    return path.read_text().count("\n") if path.exists() else 0


@pytest.fixture(scope="module")
def alone(folder, tmp_path_factory):
    """What one process with four devices writes."""
    out = tmp_path_factory.mktemp("alone") / "out.jsonl"
    with contextlib.redirect_stdout(None):
        assert main(arguments(folder, out)) == 0
    return out.read_text()


@pytest.mark.soak  # the other test serves with several processes, too; those of moves with two
def test_two_processes_follow_the_load_and_write_what_one_writes(folder, alone, tmp_path):
    out = tmp_path / "out.jsonl"
    with together(2, *arguments(folder, out)) as started:
        first, second = finish(started)
    assert out.read_text() == alone
    assert "throughput" not in second  # one of them prints
    figures = json.loads(first)
    assert figures["throughput"]["requests"] == REQUESTS
    assert figures["balancer"]["moved_slots"] > 0
    assert figures["balancer"]["failures"] == 0


def test_three_processes_go_on_where_four_lost_one(folder, alone, tmp_path):
    out = tmp_path / "out.jsonl"
    with together(4, *arguments(folder, out)) as started:
        while rows_of(out) < 8 or not read_run(f"{out}.kept"):
            assert all(process.poll() is None for process in started), started[0].communicate()
            time.sleep(0.02)
        started[2].kill()
        for process in started:  # nobody waits for ever for who is gone
            _, error = process.communicate(timeout=100)
            assert process.returncode != 0
            # XLA's own threads may notice first, and end the process before ours can say so.
            says_why = "process" in error or process.returncode == -signal.SIGABRT
            assert process is started[2] or says_why, error
    written = rows_of(out)
    assert 8 <= written < REQUESTS
    kept = read_run(f"{out}.kept")
    assert kept is not None
    assert kept.placement.num_ranks == 4
    with together(3, *arguments(folder, out, 3), "--resume") as started:
        first, *_ = finish(started)
    assert json.loads(first)["throughput"]["requests"] == REQUESTS - written
    assert out.read_text() == alone
    kept_by_three = read_run(f"{out}.kept")
    assert kept_by_three is not None
    assert kept_by_three.load["iteration"] > kept.load["iteration"]
    assert kept_by_three.placement.num_ranks == 3
