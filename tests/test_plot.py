"""What is drawn: the data on the axes, not pixels."""

import matplotlib.image
import numpy as np
import pytest

from jax_eplb.load import Recording
from jax_eplb.placement import Placement
from jax_eplb.plot import (
    before_after,
    experts_by_slot,
    imbalance_by,
    imbalance_by_iteration,
    recording_figures,
    save_figures,
    tokens_by_iteration,
    tokens_by_layer,
    tokens_per_rank,
)
from jax_eplb.plot.heat_maps import limit_of, relative

pytestmark = pytest.mark.light_compile

RECORDING = {
    "rank_by_iteration",
    "rank_by_layer",
    "expert_by_iteration",
    "expert_by_layer",
    "tokens_per_rank",
}


def recording(windows=3, layers=2, experts=4, **options):
    counts = np.random.default_rng(0).integers(1, 100, (windows, layers, experts))
    return Recording(
        counts, num_experts=experts, experts_per_token=2, layer_ids=range(3, 3 + layers), **options
    )


def lines_of(axes):
    return {line.get_label(): np.asarray(line.get_ydata()).tolist() for line in axes.lines}


@pytest.mark.slow
def test_a_recording_gives_its_pictures(tmp_path):
    figures = recording_figures(recording(), num_ranks=2)
    assert set(figures) == RECORDING
    files = save_figures(tmp_path / "new" / "pictures", figures)
    assert [file.stem for file in files] == list(figures)
    for file in files:
        picture = matplotlib.image.imread(file)
        assert picture.shape[0] > 200
        assert len(np.unique(picture[..., :3].reshape(-1, 3), axis=0)) > 10


def test_a_placement_adds_before_and_after():
    placement = Placement.default(num_experts=4, num_ranks=3, layer_ids=(3, 4))
    figures = recording_figures(recording(), placement=placement)
    assert set(figures) == RECORDING | {"before_after"}


def test_slots_are_named_slots():
    counts = np.ones((1, 1, 6), int)
    held = Recording(counts, num_experts=4, experts_per_token=2, unit="slots")
    assert "slot_by_layer" in recording_figures(held, num_ranks=2)


def test_nothing_is_left_open_in_pyplot(tmp_path):
    import matplotlib.pyplot as plt

    save_figures(tmp_path, {"bars": tokens_per_rank(np.ones((1, 1, 2)), None, (0,))})
    assert plt.get_fignums() == []


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 4), (4, 58, 9)])
@pytest.mark.parametrize("value", [0, 7])
def test_even_and_empty_loads_can_be_drawn(tmp_path, shape, value):
    tokens = np.full(shape, float(value))
    figure = before_after(tokens, tokens, range(shape[1]), chance=0.0)
    (path,) = save_figures(tmp_path, {"a": figure})
    assert path.stat().st_size > 1000


def test_layers_that_do_not_agree_are_refused():
    tokens = np.ones((2, 3, 4))
    with pytest.raises(ValueError, match=r"after: tokens have shape \(2, 2, 4\); .* 3 layers"):
        before_after(tokens, tokens[:, :2], (0, 1, 2))


def test_points_are_the_imbalances_and_the_line_is_chance():
    before, after = np.array([[[3, 1], [4, 0]]]), np.array([[[2, 2], [3, 1]]])
    axes = before_after(before, after, (7, 9), 0.25).axes[0]
    lines = lines_of(axes)
    assert lines["before (average 0.750)"] == [0.5, 1.0]
    assert lines["after (average 0.250)"] == [0.0, 0.5]
    assert "chance alone (average 0.250)" in axes.get_legend_handles_labels()[1]


def test_many_layers_are_cut_to_the_most_imbalanced():
    ranks = np.ones((1, 20, 2))
    chosen = [1, 2, 3, 5, 8, 13, 17, 19]
    ranks[:, chosen, 0] = 5
    held = recording(windows=1, layers=20)
    figure = tokens_by_iteration(held.counts, ranks, held.layer_ids, held.iterations, "expert")
    titles = [axes.get_title() for axes in figure.axes if axes.images and axes.get_visible()]
    assert titles == [f"layer {3 + i}" for i in chosen]
    assert "8 most imbalanced of 20 layers" in figure.get_suptitle()


def test_a_heat_map_holds_loads_relative_to_the_mean():
    figure = tokens_by_layer({"": np.array([[[1, 3], [6, 2]], [[1, 3], [0, 0]]])}, (3, 4), "rank")
    image = figure.axes[0].images[0].get_array()
    np.testing.assert_allclose(image, [[0.5 + 1 / 6, 1.5], [1.5, 0.5 + 1 / 6]], rtol=0.02)


def test_bars_are_of_the_most_imbalanced_layer():
    before = np.array([[[1, 1], [3, 1]], [[1, 1], [5, 3]]])
    after = np.array([[[1, 1], [2, 2]], [[1, 1], [4, 4]]])
    axes = tokens_per_rank(before, after, (3, 4)).axes[0]
    assert "layer 4" in axes.get_title()
    assert [bar.get_height() for bar in axes.patches] == [4, 2, 3, 3]


def test_empty_iterations_are_masked_and_the_scale_is_bounded():
    shown = relative(np.array([[0, 0], [3, 1]]))
    assert shown.mask.tolist() == [[True, True], [False, False]]
    assert shown[1].tolist() == [1.5, 0.5]
    assert limit_of(relative(np.zeros((2, 2)))) == 1.1
    assert limit_of(relative(np.eye(100) * 9)) == 16


def test_imbalances_over_time_are_drawn_as_they_are_and_as_running_means():
    values = np.linspace(0.5, 0.1, 50)
    series = {"static": values, "online": values / 2}
    axes = imbalance_by_iteration(series, change=25, updates=[3, 30], smooth=2).axes[0]
    raw, mean = axes.lines[0].get_ydata(), lines_of(axes)["static (mean 0.300)"]
    np.testing.assert_array_equal(raw, values)
    np.testing.assert_allclose(mean, [values[0], *(values[1:] + values[:-1]) / 2])
    assert axes.lines[-2].get_xdata() == [25, 25]
    assert list(axes.lines[-1].get_xdata()) == [3, 30]
    imbalance_by_iteration({"one": np.zeros(1)})


def test_imbalance_by_a_quantity_has_its_points_in_order_and_the_floor():
    axes = imbalance_by("slots", {"even": {80: 0.1, 64: 0.3}}, title="T", chance=0.02).axes[0]
    even, floor = axes.lines
    assert (list(even.get_xdata()), list(even.get_ydata())) == ([64, 80], [0.3, 0.1])
    assert set(floor.get_ydata()) == {0.02}
    assert (axes.get_xlabel(), axes.get_title()) == ("slots", "T")


def test_a_placement_is_drawn_slot_by_slot():
    # Expert 2 twice, a rank's last slot empty; loads 6, 1, 4, 1 of layer 9.
    placement = Placement.from_slots(
        [[0, 1, 2, 3, 0, 1], [0, 2, 2, 1, 3, 4]],
        num_experts=4,
        num_ranks=2,
        layer_ids=(8, 9),
        may_be_empty=True,
    )
    figure = experts_by_slot(placement, np.array([[1, 1, 1, 1], [6, 1, 4, 1]]), 1)
    bars, slots = figure.axes[:2]
    np.testing.assert_allclose([bar.get_height() for bar in bars.patches], [10 / 6, 2 / 6])
    drawn = slots.images[0].get_array()  # [N, P], over the mean of 2
    np.testing.assert_allclose(drawn[:2], [[3, 0.5], [1, 0.5]], rtol=0.03)
    words = {t.get_position(): (t.get_text(), t.get_weight()) for t in slots.texts}
    assert words == {
        (0, 0): ("0", "normal"),
        (0, 1): ("2", "bold"),
        (0, 2): ("2", "bold"),
        (1, 0): ("1", "normal"),
        (1, 1): ("3", "normal"),
        (1, 2): ("–", "normal"),
    }
    assert "layer 9: 6 slots on 2 ranks" in figure.get_suptitle()


def test_an_empty_layer_of_a_placement_can_be_drawn(tmp_path):
    placement = Placement.default(num_experts=4, num_ranks=2, num_layers=1)
    save_figures(tmp_path, {"empty": experts_by_slot(placement, np.zeros((1, 4)), 0)})
