import json
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from jax_eplb import metrics
from jax_eplb.load import Recording
from jax_eplb.placement import Placement
from jax_eplb.report import Report, build_report, chance_by_layer, rank_tokens

pytestmark = pytest.mark.light_compile

SLOTS = [[0, 1, 2, 0, 3, 1], [3, 2, 3, 1, 0, 3]]
counts = arrays(np.int64, (3, 2, 4), elements=st.integers(0, 2**40))


def placement(slots=SLOTS, num_experts=4, num_ranks=3, layer_ids=(3, 5)):
    return Placement.from_slots(
        slots, num_experts=num_experts, num_ranks=num_ranks, layer_ids=layer_ids
    )


def recording(values=None, **options):
    values = np.arange(24).reshape(3, 2, 4) if values is None else values
    defaults = {"num_experts": 4, "experts_per_token": 2, "layer_ids": (3, 5)}
    return Recording(np.asarray(values), **(defaults | options))


def recount(values, slots, num_ranks):
    """float64[W, L, P], one slot at a time."""
    tokens = np.zeros((*values.shape[:2], num_ranks))
    for layer, row in enumerate(slots):
        for slot, expert in enumerate(row):
            rank = slot * num_ranks // len(row)
            tokens[:, layer, rank] += values[:, layer, expert] / row.count(expert)
    return tokens


@given(counts)
def test_prediction_equals_a_recount_slot_by_slot(values):
    predicted = rank_tokens(recording(values), placement=placement())
    assert predicted.dtype == np.float64
    np.testing.assert_allclose(predicted, recount(values, SLOTS, 3), rtol=1e-15)


def test_the_balanced_split_fills_the_fullest_rank_as_little_as_can_be():
    values = np.random.default_rng(0).integers(0, 1000, (3, 2, 4))
    tokens = rank_tokens(recording(values), placement=placement(), split="balanced")
    np.testing.assert_allclose(tokens.sum(axis=2), values.sum(axis=2), rtol=1e-6)
    for layer, row in enumerate(SLOTS):
        homes = [{slot // 2 for slot in range(6) if row[slot] == expert} for expert in range(4)]
        # Experts with no replica outside of some ranks cannot leave these (Hall, 1935).
        groups = [{0}, {1}, {2}, {0, 1}, {0, 2}, {1, 2}, {0, 1, 2}]
        for window in range(3):
            inside = (
                sum(values[window, layer, e] for e in range(4) if homes[e] <= group) / len(group)
                for group in groups
            )
            assert tokens[window, layer].max() == pytest.approx(max(inside), rel=2e-3)
    report = build_report(recording(values), placement=placement(), split="balanced")
    assert report.basis == "predicted, balanced split"
    np.testing.assert_allclose(report.summary.imbalance, metrics.summarize(tokens).imbalance)


def test_whole_numbers_above_float32_are_kept():
    values = np.full((1, 2, 4), 2**24 + 1)
    assert rank_tokens(recording(values), num_ranks=4).tolist() == values.tolist()


def test_default_layout_is_the_fewest_slots():
    tokens = rank_tokens(recording([[[1, 2, 3, 4], [8, 0, 0, 0]]]), num_ranks=3)
    layout = np.asarray(
        Placement.default(num_experts=4, num_ranks=3, num_layers=2).slot_to_expert
    ).tolist()
    assert layout[0] == [0, 1, 1, 2, 2, 3]
    np.testing.assert_array_equal(
        tokens, recount(np.array([[[1, 2, 3, 4], [8, 0, 0, 0]]]), layout, 3)
    )


def test_measured_tokens_come_before_a_prediction():
    measured = np.arange(18).reshape(3, 2, 3)
    held = recording(rank_tokens=measured, placement=placement())
    for num_ranks in (None, 3):
        np.testing.assert_array_equal(rank_tokens(held, num_ranks=num_ranks), measured)
    assert build_report(held).basis == "measured"


def test_measured_tokens_are_not_used_for_another_number_of_ranks():
    held = recording(rank_tokens=np.zeros((3, 2, 3), int), placement=placement())
    report = build_report(held, num_ranks=2)
    assert (report.basis, report.count) == ("default layout", 2)
    np.testing.assert_array_equal(
        rank_tokens(held, num_ranks=2), held.counts.reshape(3, 2, 2, 2).sum(axis=3)
    )


def test_the_placement_of_the_recording_predicts_where_ranks_were_not_counted():
    held = recording(placement=placement())
    np.testing.assert_array_equal(rank_tokens(held), rank_tokens(held, placement=placement()))
    assert build_report(held).basis == "predicted, placement of the recording"


@pytest.mark.parametrize("active", [None, placement()])
def test_slot_counts_are_added_up_by_blocks(active):
    values = np.arange(36).reshape(3, 2, 6)
    held = recording(values, unit="slots", placement=active)
    expected = values.reshape(3, 2, 3, 2).sum(axis=3)
    np.testing.assert_array_equal(rank_tokens(held, num_ranks=3), expected)
    assert build_report(held, num_ranks=3).basis == "measured"


def test_slot_counts_under_another_placement_are_first_counted_by_expert():
    held = recording(np.arange(36).reshape(3, 2, 6), unit="slots", placement=placement())
    by_expert = recording(held.expert_counts())
    other = placement([[0, 1, 2, 3], [3, 1, 2, 0]], num_ranks=2)
    np.testing.assert_array_equal(
        rank_tokens(held, placement=other), rank_tokens(by_expert, placement=other)
    )
    np.testing.assert_array_equal(
        rank_tokens(held, num_ranks=2), rank_tokens(by_expert, num_ranks=2)
    )


def test_slot_counts_without_a_placement_cannot_be_predicted_from():
    held = recording(np.ones((1, 2, 6), int), unit="slots")
    with pytest.raises(ValueError, match="which expert sat in a slot is not recorded"):
        rank_tokens(held, placement=placement())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"run\.npz: .*give the number of ranks \(--ep-size\)"),
        (
            {"placement": placement(layer_ids=(3, 4))},
            r"layers 3, 4, run\.npz has 3, 5; give a placement planned for this model",
        ),
        (
            {"placement": placement([[0, 1, 2], [2, 1, 0]], num_experts=3)},
            r"for 3 experts, run\.npz has 4; give a placement planned for this model",
        ),
        ({"placement": placement(), "num_ranks": 2}, r"for 3 ranks, but 2 .*--ep-size"),
        ({"num_ranks": 4, "split": "local"}, "split is 'local'; expected 'even' or 'balanced'"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        rank_tokens(recording(source="run.npz"), **options)


@pytest.mark.parametrize("num_ranks", [0, 4])
def test_slots_that_the_ranks_do_not_divide_are_refused(num_ranks):
    held = recording(np.ones((1, 2, 6), int), unit="slots", source="run.npz")
    with pytest.raises(ValueError, match=rf"run\.npz: 6 slots .* {num_ranks} ranks \(--ep-size\)"):
        rank_tokens(held, num_ranks=num_ranks)


def example_report():
    """The rows of TensorRT-LLM's example of a report, DeepSeek-R1 on 36 ranks."""
    summary = metrics.Summary(
        mean=np.array([1024.0]),
        std=np.array([187.9552]),
        imbalance=np.array([0.498043]),
        average=metrics.Average(1024.0, 491.651199, 1.564272),
    )
    return Report((3,), summary, 0.5, 0.625, 0.01, "measured", "ranks", 36, 50, 230400)


def test_text_is_a_right_aligned_table():
    lines = example_report().to_text().split("\n")
    assert lines[:3] == [
        "layer     mean         std  imbalance",
        "3       1024.0  187.955200   0.498043",
        "average 1024.0  491.651199   1.564272",
    ]
    assert lines[3] == (
        "36 ranks, 50 iterations, 230400 tokens; measured; balancedness 0.5000 (mean of ratios), "
        "0.6250 (ratio of sums); chance alone would leave an imbalance of 0.0100"
    )
    assert len(lines) == 4


def test_columns_grow_with_their_figures():
    text = build_report(recording(np.full((1, 2, 4), 10**9) * [1, 1, 1, 5]), num_ranks=4).to_text()
    table = text.split("\n")[:-1]
    assert {len(line) for line in table} == {len(table[0])}
    assert re.search(r"average 2000000000\.0  2000000000\.000000 +1\.500000", text)


def test_json_is_plain_and_agrees_with_the_metrics():
    held = recording()
    tokens = rank_tokens(held, num_ranks=2)
    object_ = json.loads(json.dumps(build_report(held, num_ranks=2).to_json()))
    summary = metrics.summarize(tokens)
    assert list(object_["layers"]) == ["3", "5"]
    assert object_["layers"]["5"] == {
        "mean": summary.mean[1],
        "std": summary.std[1],
        "imbalance": summary.imbalance[1],
    }
    assert object_["average"] == summary.average._asdict()
    ratios = metrics.balancedness_mean_of_ratios(tokens).mean()
    assert object_["balancedness_mean_of_ratios"] == pytest.approx(ratios)
    sums = metrics.balancedness_ratio_of_sums(tokens).mean()
    assert object_["balancedness_ratio_of_sums"] == pytest.approx(sums)
    assert (object_["basis"], object_["ranks"], object_["iterations"]) == ("default layout", 2, 3)
    # Each layer routes 2 choices a token; layer 5 saw the most.
    assert object_["tokens"] == held.counts[:, 1].sum() // 2


def test_chance_is_averaged_over_iterations_with_tokens():
    values = np.array([[[50, 50, 0, 0]] * 2, [[0] * 4] * 2, [[900, 0, 0, 0]] * 2])
    expected = metrics.chance_imbalance(np.array([100, 900]), 4).mean()
    held = recording(values)
    np.testing.assert_allclose(chance_by_layer(held, 4), [expected, expected])
    assert build_report(held, num_ranks=4).chance == pytest.approx(expected)


def test_chance_of_many_different_iterations_is_close_to_that_of_more_draws():
    held = recording(np.random.default_rng(0).integers(900, 1100, (300, 2, 4)))
    expected = metrics.chance_imbalance(held.counts.sum(axis=2), 4).mean()
    assert chance_by_layer(held, 4).mean() == pytest.approx(expected, rel=0.02)


def test_an_iteration_without_tokens_changes_no_figure_but_their_number():
    values = np.arange(24).reshape(3, 2, 4)
    empty = np.concatenate([values, np.zeros((1, 2, 4), int)])
    with_it = build_report(recording(empty), num_ranks=2).to_json()
    without = build_report(recording(values), num_ranks=2).to_json()
    assert with_it == without | {"iterations": 4}


def test_a_recording_without_tokens_is_all_zeros():
    report = build_report(recording(np.zeros((2, 2, 4), int)), num_ranks=2)
    assert report.summary.average == (0, 0, 0)
    assert (report.chance, report.tokens, report.balancedness_ratio_of_sums) == (0, 0, 1)


@pytest.mark.parametrize(
    ("held", "options", "over", "count"),
    [
        (recording(), {}, "experts", 4),
        (recording(np.ones((1, 2, 6), int), unit="slots"), {}, "slots", 6),
        (recording(), {"placement": placement()}, "slots", 6),
    ],
)
def test_per_expert_is_over_what_was_counted_or_the_slots_of_a_placement(
    held, options, over, count
):
    report = build_report(held, per_expert=True, **options)
    assert (report.over, report.count, report.to_json()[over]) == (over, count, count)
    mean = held.counts.sum(axis=2).mean(axis=0) / count
    np.testing.assert_allclose(report.summary.mean, mean)


def test_per_expert_refuses_a_placement_for_other_ranks():
    with pytest.raises(ValueError, match="for 3 ranks, but 2"):
        build_report(recording(), per_expert=True, placement=placement(), num_ranks=2)


def test_a_single_rank_is_balanced():
    report = build_report(recording(), num_ranks=1)
    assert report.summary.average.imbalance == 0
    assert report.to_text().split("\n")[-1].startswith("1 rank, 3 iterations, ")
