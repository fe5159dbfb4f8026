import numpy as np
import pytest

from jax_eplb.plot.style import COLOURS
from jax_eplb.simulate import NONE, STATIC, Policy, every, online
from jax_eplb.simulate.plot import (
    gain_by_interval,
    imbalance_by_redundancy,
    imbalance_over_time,
)
from jax_eplb.simulate.simulation import Outcome


def outcome(policy: Policy, imbalance, *, num_slots=8, choice="even", moves=0.0) -> Outcome:
    """Of [W, L] imbalances; a step takes 1 + imbalance, 2 without balancing."""
    imbalance = np.asarray(imbalance, np.float64)
    steps = 1 + imbalance.mean(axis=1)
    return Outcome(
        policy=policy,
        num_slots=num_slots,
        num_ranks=2,
        replica_choice=choice,
        imbalance=imbalance,
        moves=np.zeros(imbalance.shape),
        step_seconds=steps,
        move_seconds=np.full(len(steps), moves),
        unbalanced_imbalance=np.ones(imbalance.shape),
        unbalanced_seconds=np.full(len(steps), 2.0),
        steps_per_window=1,
    )


def lines_of(figure) -> dict[str, tuple[list, list]]:
    (axes,) = figure.axes
    return {
        line.get_label(): (np.asarray(line.get_xdata()).tolist(), np.asarray(line.get_ydata()))
        for line in axes.lines
    }


def test_imbalance_over_time_is_the_mean_over_layers_by_iteration():
    outcomes = [outcome(NONE, [[1, 1], [1, 0]]), outcome(STATIC, [[0.2, 0.4], [0.0, 0.2]])]
    figure = imbalance_over_time(outcomes, (7, 8))
    lines = lines_of(figure)
    assert set(lines) == {"none (mean 0.750)", "static (mean 0.200)"}
    assert lines["static (mean 0.200)"][0] == [7, 8]
    np.testing.assert_allclose(lines["static (mean 0.200)"][1], [0.3, 0.1])
    smooth = lines_of(imbalance_over_time(outcomes, (7, 8), smooth=2))
    np.testing.assert_allclose(smooth["static (mean 0.200)"][1], [0.3, 0.2])


def test_series_differ_by_line_as_well_as_by_colour():
    policies = [NONE, STATIC, every(2), online(0.5), online(0.9), every(7), every(9)]
    figure = imbalance_over_time([outcome(p, [[0.1], [0.2]]) for p in policies], (0, 1))
    lines = figure.axes[0].lines
    assert len({line.get_color() for line in lines}) == len(lines) == len(COLOURS)
    assert len({str(line.get_linestyle()) + str(line._dash_pattern) for line in lines}) == len(
        lines
    )


def test_redundancy_shows_the_best_of_each_kind_and_the_bound():
    outcomes = [
        outcome(STATIC, [[0.5]], num_slots=6),
        outcome(STATIC, [[0.4]]),
        outcome(online(0.5), [[0.3]]),
        outcome(online(0.9), [[0.2]]),
        outcome(STATIC, [[0.1]], choice="balanced"),
    ]
    figure = imbalance_by_redundancy(outcomes, {"even": {8: 0.05, 6: 0.15}}, num_experts=6)
    lines = {name: (x, y.tolist()) for name, (x, y) in lines_of(figure).items()}
    assert lines == {
        "even, static": ([0, 2], [0.5, 0.4]),
        "even, re-planned, best of the sweep": ([2], [0.2]),
        "balanced, static": ([2], [0.1]),
        "even: no policy below": ([0, 2], [0.15, 0.05]),
    }


def test_gain_by_interval_has_the_cost_of_moves_between_its_lines():
    outcomes = [
        outcome(every(1), [[0.25]], moves=0.35),
        outcome(every(4), [[0.6]], moves=0.0),
        outcome(online(0.5, interval=4), [[0.25]], moves=0.0),
        outcome(STATIC, [[1.0]]),
    ]
    figure = gain_by_interval(outcomes)
    lines = lines_of(figure)
    np.testing.assert_allclose(lines["even, moves paid for"][1], [0.25, 0.6])
    assert lines["even, moves paid for"][0] == [1, 4]
    np.testing.assert_allclose(lines["even, static"][1], 0.0, atol=1e-9)
    (free,) = [y for name, (_, y) in lines.items() if name.startswith("_")]
    np.testing.assert_allclose(free, [0.6, 0.6])
    area = figure.axes[0].collections[0].get_paths()[0].vertices
    assert [1.0, 0.25] in area.round(6).tolist()
    assert [1.0, 0.6] in area.round(6).tolist()


@pytest.mark.slow
@pytest.mark.parametrize("policies", [[], [STATIC]])
def test_a_sweep_without_intervals_can_be_drawn(tmp_path, policies):
    outcomes = [outcome(policy, [[0.1]]) for policy in policies]
    gain_by_interval(outcomes).savefig(tmp_path / "gain.png")
    imbalance_by_redundancy(outcomes, {}, 6).savefig(tmp_path / "redundancy.png")
