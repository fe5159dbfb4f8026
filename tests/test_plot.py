import matplotlib.image
import numpy as np
import pytest

from jax_eplb.load import Recording
from jax_eplb.placement import Placement
from jax_eplb.plot import (
    _by_iteration,
    _by_layer,
    _draw_imbalances,
    _limit,
    _relative,
    _tokens_per_rank,
    plot_before_after,
    plot_over_time,
    plot_recording,
)

RECORDING = {
    "rank_by_iteration.png",
    "rank_by_layer.png",
    "expert_by_iteration.png",
    "expert_by_layer.png",
    "tokens_per_rank.png",
}


def recording(windows=3, layers=2, experts=4, **options):
    counts = np.random.default_rng(0).integers(1, 100, (windows, layers, experts))
    return Recording(
        counts, num_experts=experts, experts_per_token=2, layer_ids=range(3, 3 + layers), **options
    )


def test_a_recording_gives_its_pictures(tmp_path):
    files = plot_recording(tmp_path / "new" / "pictures", recording(), num_ranks=2)
    assert {file.name for file in files} == RECORDING
    for file in files:
        picture = matplotlib.image.imread(file)
        assert picture.shape[0] > 200
        assert len(np.unique(picture[..., :3].reshape(-1, 3), axis=0)) > 10


def test_a_placement_adds_before_and_after(tmp_path):
    placement = Placement.default(num_experts=4, num_ranks=3, layer_ids=(3, 4))
    files = plot_recording(tmp_path, recording(), placement=placement)
    assert {file.name for file in files} == RECORDING | {"before_after.png"}


def test_slots_are_named_slots(tmp_path):
    counts = np.ones((1, 1, 6), int)
    held = Recording(counts, num_experts=4, experts_per_token=2, unit="slots")
    names = {file.name for file in plot_recording(tmp_path, held, num_ranks=2)}
    assert "slot_by_layer.png" in names


def test_nothing_is_left_open_in_pyplot(tmp_path):
    import matplotlib.pyplot as plt

    plot_recording(tmp_path, recording(), num_ranks=2)
    assert plt.get_fignums() == []


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 4), (4, 58, 9)])
@pytest.mark.parametrize("value", [0, 7])
def test_even_and_empty_loads_can_be_drawn(tmp_path, shape, value):
    tokens = np.full(shape, float(value))
    path = plot_before_after(tmp_path / "a.png", tokens, tokens, range(shape[1]), chance=0.0)
    assert path.stat().st_size > 1000


def test_layers_that_do_not_agree_are_refused(tmp_path):
    tokens = np.ones((2, 3, 4))
    with pytest.raises(ValueError, match=r"after: tokens have shape \(2, 2, 4\); .* 3 layers"):
        plot_before_after(tmp_path / "a.png", tokens, tokens[:, :2], (0, 1, 2))
    assert list(tmp_path.iterdir()) == []


def test_points_are_the_imbalances_and_the_line_is_chance():
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    before, after = np.array([[[3, 1], [4, 0]]]), np.array([[[2, 2], [3, 1]]])
    _draw_imbalances(axes, before, after, (7, 9), 0.25)
    lines = {line.get_label(): np.asarray(line.get_ydata()).tolist() for line in axes.lines}
    assert lines["before (average 0.750)"] == [0.5, 1.0]
    assert lines["after (average 0.250)"] == [0.0, 0.5]
    assert "chance alone (average 0.250)" in axes.get_legend_handles_labels()[1]


def test_many_layers_are_cut_to_the_most_imbalanced():
    ranks = np.ones((1, 20, 2))
    chosen = [1, 2, 3, 5, 8, 13, 17, 19]
    ranks[:, chosen, 0] = 5
    held = recording(windows=1, layers=20)
    figure = _by_iteration(held.counts, ranks, held, "expert")
    titles = [axes.get_title() for axes in figure.axes if axes.images and axes.get_visible()]
    assert titles == [f"layer {3 + i}" for i in chosen]
    assert "8 most imbalanced of 20 layers" in figure.get_suptitle()


def test_a_heat_map_holds_loads_relative_to_the_mean():
    figure = _by_layer({"": np.array([[[1, 3], [6, 2]], [[1, 3], [0, 0]]])}, (3, 4), "rank")
    image = figure.axes[0].images[0].get_array()
    np.testing.assert_allclose(image, [[0.5 + 1 / 6, 1.5], [1.5, 0.5 + 1 / 6]], rtol=0.02)


def test_bars_are_of_the_most_imbalanced_layer():
    before = np.array([[[1, 1], [3, 1]], [[1, 1], [5, 3]]])
    after = np.array([[[1, 1], [2, 2]], [[1, 1], [4, 4]]])
    axes = _tokens_per_rank(before, after, (3, 4)).axes[0]
    assert "layer 4" in axes.get_title()
    assert [bar.get_height() for bar in axes.patches] == [4, 2, 3, 3]


def test_empty_iterations_are_masked_and_the_scale_is_bounded():
    relative = _relative(np.array([[0, 0], [3, 1]]))
    assert relative.mask.tolist() == [[True, True], [False, False]]
    assert relative[1].tolist() == [1.5, 0.5]
    assert _limit(_relative(np.zeros((2, 2)))) == 1.1
    assert _limit(_relative(np.eye(100) * 9)) == 16


def test_imbalances_over_time_become_a_picture(tmp_path):
    values = np.linspace(0.5, 0.1, 50)
    series = {"static": values, "online": values / 2, "oracle": values / 3}
    path = plot_over_time(tmp_path / "time.png", series, change=25, updates=[3, 30])
    assert len(np.unique(matplotlib.image.imread(path)[..., :3].reshape(-1, 3), axis=0)) > 10
    plot_over_time(tmp_path / "short.png", {"one": np.zeros(1)})
