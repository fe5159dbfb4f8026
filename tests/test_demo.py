"""The demo: what it says and leaves, on a tiny model and the embedded held-out text."""

import contextlib
import functools
import io
import json
from importlib import resources

import numpy as np
import pytest
import yaml

from jax_eplb import load_placement, load_recording
from jax_eplb.cli import main
from jax_eplb.commands import demo, sample_text
from jax_eplb.planner import plan
from jax_eplb.report import rank_tokens
from tests.command_line import fail, run
from tests.tiny_model import tiny_decoder

# `jax-eplb demo` itself, as CI runs it, serves the embedded model, is fully optimised, and fails
# where outputs differ.
pytestmark = pytest.mark.light_compile

SIZES = {"PROMPT_BYTES": 48, "OUTPUT_TOKENS": 4, "MIN_TOKENS": 1024}
PROMPTS = 64 * 48


def make_small(patch, **sizes):
    patch.setattr(demo, "load_decoder", tiny_decoder)
    # Four plans are made, each by a program of its own, which this effort makes smaller.
    patch.setattr(demo, "plan", functools.partial(plan, effort="fast"))
    for name, value in (SIZES | sizes).items():
        patch.setattr(demo, name, value)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("demo") / "new"


@pytest.fixture(scope="module")
def figures(out):
    """The demo's JSON, of one run for all tests."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        make_small(patch)
        command = ["demo", "--num-slots", "24", "--batches", "1", "--json", "--out", str(out)]
        assert main(command) == 0
    return json.loads(printed.getvalue())


@pytest.mark.slow
def test_the_output_is_identical_and_the_imbalance_lower(figures):
    assert figures["identical_output"] is True
    in_turn = figures["imbalance_in_turn"]
    assert figures["imbalance_chance"] < in_turn < figures["imbalance_before"]
    # Dividing each batch mends what no plan can know.
    assert figures["imbalance_after"] < figures["imbalance_chance"] / 4


@pytest.mark.slow
def test_throughput_of_both_runs_is_given(figures):
    for leg in ("before", "after"):
        assert figures[f"requests_{leg}"] == 64
        assert figures[f"output_tokens_{leg}"] == 64 * 4
        assert figures[f"output_tokens_per_second_{leg}"] > 0
        assert figures[f"latency_mean_{leg}"] > 0


@pytest.mark.slow
def test_the_files_hold_what_was_printed(figures, out):
    report = json.loads((out / "report.json").read_text())
    assert figures.items() <= report.items()
    for leg in ("before", "after"):
        kept = load_recording(out / f"recording_{leg}.npz").with_at_least(SIZES["MIN_TOKENS"])
        tokens = rank_tokens(kept)
        imbalance = (tokens.max(axis=2) / tokens.mean(axis=2) - 1).mean()
        assert figures[f"imbalance_{leg}"] == pytest.approx(imbalance)
        assert report[leg]["average"]["imbalance"] == pytest.approx(imbalance)
        np.testing.assert_array_equal(kept.counts.sum(axis=2), PROMPTS * kept.experts_per_token)


@pytest.mark.slow
def test_both_runs_routed_the_same_text_to_the_same_experts(figures, out):
    before, after = (load_recording(out / f"recording_{leg}.npz") for leg in ("before", "after"))
    np.testing.assert_array_equal(before.counts, after.counts)
    assert [r.placement and r.placement.num_slots for r in (before, after)] == [16, 24]


@pytest.mark.slow
def test_the_plan_is_the_one_that_was_served_and_was_made_from_other_text(figures, out):
    planned = load_placement(out / "plan.yaml", num_ranks=8)
    served = load_recording(out / "recording_after.npz").placement
    assert served is not None
    np.testing.assert_array_equal(planned.slot_to_expert, served.slot_to_expert)
    assert yaml.safe_load((out / "plan.yaml").read_text())["num_slots"] == 24
    first, second = (
        load_recording(out / f"recording{name}.npz").counts for name in ("", "_before")
    )
    assert (first != second).any()


@pytest.mark.slow
def test_pictures_are_left(figures, out):
    pictures = [out / "balance.png", *(out / "recording").glob("*.png")]
    assert len(pictures) > 3
    for path in pictures:
        assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-slots", 84], "84 slots cannot be divided among 8 ranks"),
        (["--num-slots", 56], "56 slots cannot hold 64 experts"),
        (["--ep-size", 9, "--num-slots", 81], "9 ranks need as many devices"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_before_anything_runs(
    capsys, tmp_path, arguments, message
):
    assert message in fail(capsys, "demo", "--out", tmp_path, *arguments)


@pytest.mark.slow
def test_two_devices_and_no_redundancy_are_a_demo_too(capsys, tmp_path, monkeypatch):
    make_small(monkeypatch, SEQUENCES=8, MIN_TOKENS=256)
    arguments = ["--ep-size", 2, "--num-slots", 16, "--batches", 1, "--out", tmp_path / "two"]
    code, out, _ = run(capsys, "demo", *arguments)
    assert code == 0
    assert "Generated tokens: identical." in out
    assert "16 experts on 2 devices" in out
    assert "iterations of 384 tokens" in out


@pytest.mark.parametrize("half", ["first", "second"])
def test_requests_come_from_their_half_the_kinds_in_turn(half):
    made = sample_text.sample_requests(half, 2000, prompt_bytes=demo.PROMPT_BYTES, output_tokens=32)
    texts = {}
    for kind in sample_text.KINDS:
        text = (resources.files("jax_eplb.models") / "samples" / f"{kind}.txt").read_bytes()
        middle = len(text) // 2
        texts[kind] = text[:middle] if half == "first" else text[middle:]
    for number, request in enumerate(made):
        assert len(request.prompt) == demo.PROMPT_BYTES
        assert bytes(request.prompt.tolist()) in texts[sample_text.KINDS[number % 4]]
    assert len({bytes(r.prompt.tolist()) for r in made}) == len(made)
