"""The online demo on a tiny model: figures, files, the replay that tells static plan and oracle."""

import contextlib
import io
import json

import numpy as np
import pytest

from jax_eplb import Placement, load_recording
from jax_eplb.cli import main
from jax_eplb.commands import demo_online
from jax_eplb.report import rank_tokens
from tests.command_line import fail
from tests.tiny_model import tiny_decoder

pytestmark = pytest.mark.light_compile

KEYS = {
    "recompilations",
    "identical_output",
    "imbalance_static",
    "imbalance_online",
    "imbalance_oracle",
    "stall_ms_p50",
    "stall_ms_p99",
    "moved_slots",
    "moved_bytes",
}


@pytest.mark.slow
def test_a_replay_puts_every_choice_on_a_rank_that_holds_its_expert_and_levels():
    generator = np.random.default_rng(0)
    counts = generator.integers(0, 40, (3, 2, 6))
    default = Placement.default(num_experts=6, num_ranks=2, num_slots=8, num_layers=2)
    tables = np.broadcast_to(np.asarray(default.slot_to_expert), (3, 2, 8))
    tokens = demo_online.replay(counts, tables, 2)
    np.testing.assert_array_equal(tokens.sum(axis=2), counts.sum(axis=2))
    for row, table, found in zip(
        counts.reshape(6, 6), tables.reshape(6, 8), tokens.reshape(6, 2), strict=True
    ):
        held = [set(half.tolist()) for half in table.reshape(2, 4)]
        alone = [sum(row[e] for e in held[r] - held[1 - r]) for r in (0, 1)]
        best = max(*alone, -(-row.sum() // 2))
        assert best <= found.max() <= best + 1


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("online") / "new"


@pytest.fixture(scope="module")
def figures(out):
    """Without spare slots, as the few experts would be level under any plan."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(demo_online, "load_decoder", tiny_decoder)
        sizes = ["--ep-size", "4", "--num-slots", "16", "--iterations", "96"]
        assert main(["demo", "--online", *sizes, "--json", "--out", str(out)]) == 0
    return json.loads(printed.getvalue())


@pytest.mark.slow
def test_the_placement_follows_compiles_nothing_and_changes_no_token(figures):
    assert figures.keys() >= KEYS
    assert figures["recompilations"] == 0
    assert figures["identical_output"] is True
    assert figures["failures"] == 0
    assert figures["iterations"] == 96
    assert figures["moved_slots"] > 0
    # After the change of text, which a static plan knows nothing of.
    second = {n: figures[f"imbalance_{n}_second_half"] for n in ("static", "online", "oracle")}
    assert second["oracle"] < second["online"] < 0.9 * second["static"]
    assert figures["imbalance_static"] < figures["imbalance_unbalanced"]


@pytest.mark.slow
def test_the_files_hold_what_was_printed(figures, out):
    assert json.loads((out / "online.json").read_text()) == figures
    assert (out / "online.png").read_bytes().startswith(b"\x89PNG")
    events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    assert sum(event["moves"] for event in events) == figures["moved_slots"]
    assert len(events) == figures["updates"]
    tokens = rank_tokens(load_recording(out / "recording_online.npz"))
    imbalance = (tokens.max(axis=2) / tokens.mean(axis=2) - 1).mean()
    assert figures["imbalance_online"] == pytest.approx(imbalance)


def test_sizes_that_do_not_fit_are_refused_before_anything_runs(capsys, tmp_path):
    error = fail(capsys, "demo", "--online", "--num-slots", 70, "--out", tmp_path)
    assert "70 slots cannot be divided among 8 ranks" in error
