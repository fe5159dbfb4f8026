import json
from pathlib import Path

import matplotlib.image
import pytest

from jax_eplb.formats import save_recording
from tests.command_line import fail, succeed
from tests.simulation_cases import changing_recording, uniform_recording

pytestmark = pytest.mark.light_compile

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "simulate"
# One size, whose programs other tests compile, too.
QUICK = (
    "--ep-size=2",
    "--num-slots=8",
    "--replica-choice=even",
    "--intervals=1",
    "--decays=0.5",
    "--max-moves=all",
    "--history=3",
)
CHEAP = ("--bytes-per-expert=1", "--tokens-per-second=1e6", "--attention-share=0")


@pytest.fixture
def changing(tmp_path):
    save_recording(changing_recording(), tmp_path / "changing.npz")
    return tmp_path / "changing.npz"


@pytest.mark.slow
def test_the_answer_is_a_table_and_a_sentence(capsys, changing, tmp_path):
    out = succeed(capsys, "simulate", changing, *QUICK, *CHEAP, "--plot", tmp_path / "pictures")
    lines = out.splitlines()
    assert lines[0] == "8 slots on 2 ranks, replica choice even"
    names = [line[: lines[1].index("imbalance")].strip() for line in lines[2:9]]
    assert names[:3] == ["none", "static", "every window"]
    assert names[5:] == ["oracle", "recommended: every window, decay 0.5"]
    assert "9 of 12 windows scored" in out
    assert "re-plan every iteration" in out
    for name in ("imbalance_over_time", "imbalance_by_redundancy", "gain_by_interval"):
        path = tmp_path / "pictures" / f"{name}.png"
        assert str(path) in lines
        assert matplotlib.image.imread(path).shape[0] > 300


@pytest.mark.slow
def test_json_has_the_recommendation_and_what_it_rests_on(capsys, changing):
    out = json.loads(succeed(capsys, "simulate", changing, *QUICK, *CHEAP, "--json"))
    made = out["recommendation"]
    assert made["balance"] is True
    assert (made["num_slots"], made["replan_every"], made["replica_choice"]) == (8, 1, "even")
    assert 0.05 < made["expected_gain"] < 1
    assert made["reason"].startswith("2 redundant experts per 2 ranks")
    imbalance = {row["policy"]: row["imbalance"] for row in out["policies"]}
    assert imbalance["oracle"] < imbalance["static"] < imbalance["none"]
    assert {row["policy"] for row in out["sweep"]} == {"static", "every window, decay 0.5"}
    assert out["costs"]["tokens_per_second"] == 1e6


@pytest.mark.slow
def test_a_uniform_load_is_better_left_alone(capsys, tmp_path):
    path = tmp_path / "uniform.npz"
    save_recording(uniform_recording(), path)
    out = json.loads(succeed(capsys, "simulate", path, *QUICK, *CHEAP, "--json"))
    assert out["recommendation"]["balance"] is False
    assert out["recommendation"]["reason"].startswith("Don't balance")


@pytest.mark.slow
def test_presets_and_own_figures_go_together(capsys, changing):
    files = (
        "--model",
        CONFIGS / "models/deepseek_v3.yaml",
        "--device",
        CONFIGS / "devices/h800.yaml",
    )
    out = json.loads(
        succeed(capsys, "simulate", changing, *QUICK, *files, "--bytes-per-second=1e9", "--json")
    )
    assert out["costs"]["bytes_per_expert"] == 3 * 7168 * 2048
    assert out["costs"]["bytes_per_second"] == 1e9
    # Windows of some hundred tokens: each rank waits for its weights, and moves cost far more.
    assert out["recommendation"]["balance"] is False


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--model", "m.yaml"), "--model and --device belong together"),
        (("--model", "m.yaml", "--device", "d.yaml"), "m.yaml: cannot be read"),
        (("--attention-share", "1"), "attention_share is 1.0; use 0 or more, below 1"),
        (("--history", "12"), "history is 12 of 12 windows"),
        (("--num-slots", "9"), "9 slots"),
    ],
)
def test_what_makes_no_sense_is_refused(capsys, changing, options, message):
    assert message in fail(capsys, "simulate", changing, "--ep-size=2", *options)


def test_without_ranks_the_recording_must_say(capsys, changing):
    message = fail(capsys, "simulate", changing)
    assert "does not say on how many ranks" in message
    assert "--ep-size" in message
