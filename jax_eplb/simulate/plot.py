"""Plot: the simulator's pictures, one function each, which returns the figure.

Axes: W windows, L layers.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from jax_eplb.plot.style import CHANCE, COLOURS, LINES, MARKERS, legend_below, running_mean
from jax_eplb.simulate.recommend import Advice
from jax_eplb.simulate.simulation import Outcome, bound_of


def advice_figures(advice: Advice, compared: Sequence[Outcome]) -> dict[str, Figure]:
    """The three pictures of a recommendation, and of policies `compared` with it, by name."""
    recording, history = advice.recording, advice.history
    bounds: dict[str, dict[int, float]] = {}
    for outcome in advice.outcomes:
        by_slots = bounds.setdefault(outcome.replica_choice, {})
        if outcome.num_slots not in by_slots:
            by_slots[outcome.num_slots] = bound_of(
                recording,
                num_ranks=outcome.num_ranks,
                num_slots=outcome.num_slots,
                history=history,
                replica_choice=outcome.replica_choice,
            )
    size = advice.chosen.num_slots
    at_size = [outcome for outcome in advice.outcomes if outcome.num_slots == size]
    return {
        "imbalance_over_time": imbalance_over_time(compared, recording.iterations[history:]),
        "imbalance_by_redundancy": imbalance_by_redundancy(
            advice.outcomes, bounds, recording.num_experts
        ),
        "gain_by_interval": gain_by_interval(at_size),
    }


def imbalance_over_time(
    outcomes: Sequence[Outcome], iterations: Sequence[int], *, smooth: int | None = None
) -> Figure:
    """The imbalance of each window by policy, running means of `smooth` windows.

    `iterations`: of the scored windows. `smooth`: default: a twentieth of the windows.
    """
    figure, axes = _start("Imbalance over time, mean over the layers", "iteration")
    count = max(len(iterations) // 20, 1) if smooth is None else smooth
    for number, outcome in enumerate(outcomes):
        values = outcome.imbalance.mean(axis=1, dtype=np.float64)
        axes.plot(
            list(iterations),
            running_mean(values, count),
            color=COLOURS[number % len(COLOURS)],
            linestyle=LINES[number % len(LINES)],
            linewidth=1.6,
            label=f"{outcome.policy.describe()} (mean {values.mean():.3f})",
        )
    axes.set_ylabel("(max - mean) / mean")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if count > 1:
        axes.set_title(f"{axes.get_title()}; running means of {count} windows")
    return _finish(figure, axes)


def imbalance_by_redundancy(
    outcomes: Sequence[Outcome],
    bounds: Mapping[str, Mapping[int, float]],
    num_experts: int,
) -> Figure:
    """The least imbalance of each policy kind and replica choice against the spare slots.

    `bounds`: by replica choice and number of slots, what no policy has less of.
    """
    figure, axes = _start("Imbalance against redundancy", "redundant experts, S - E")
    lines: dict[str, dict[int, float]] = {}
    for outcome in outcomes:
        kind = "re-planned, best of the sweep" if outcome.policy.follows else "static"
        points = lines.setdefault(f"{outcome.replica_choice}, {kind}", {})
        spare, found = outcome.num_slots - num_experts, outcome.mean_imbalance
        points[spare] = min(points.get(spare, np.inf), found)
    for number, (name, points) in enumerate(sorted(lines.items())):
        _draw_points(axes, number, name, points)
    for choice, by_slots in bounds.items():
        points = {slots - num_experts: bound for slots, bound in by_slots.items()}
        spare = sorted(points)
        style = "--" if choice == "even" else ":"
        axes.plot(
            spare,
            [points[i] for i in spare],
            color=CHANCE,
            linestyle=style,
            label=f"{choice}: no policy below",
        )
    axes.set_ylabel("(max - mean) / mean")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return _finish(figure, axes)


def gain_by_interval(outcomes: Sequence[Outcome]) -> Figure:
    """Throughput gained against the interval of re-planning, with and without the cost of moves.

    For each interval and replica choice the setting of the sweep that gains most.
    """
    figure, axes = _start("Gain against the interval of re-planning", "windows from plan to plan")
    best: dict[str, dict[int, Outcome]] = {}
    for outcome in outcomes:
        interval = outcome.policy.interval
        if interval is not None and not outcome.policy.foresight:
            kept = best.setdefault(outcome.replica_choice, {})
            if interval not in kept or outcome.gain > kept[interval].gain:
                kept[interval] = outcome
    for number, (choice, kept) in enumerate(sorted(best.items())):
        paid = {interval: outcome.gain for interval, outcome in kept.items()}
        _draw_points(axes, number, f"{choice}, moves paid for", paid, style="-")
        free = {interval: outcome.gain_without_moves for interval, outcome in kept.items()}
        places = sorted(free)
        low, high = ([points[i] for i in places] for points in (paid, free))
        colour = COLOURS[number % len(COLOURS)]
        axes.plot(places, high, color=colour, linewidth=0.8, linestyle=":")
        axes.fill_between(
            places, low, high, color=colour, alpha=0.2, label=f"{choice}, cost of moves"
        )
    still = {o.replica_choice: o.gain for o in outcomes if not o.policy.follows}
    for number, (choice, gain) in enumerate(sorted(still.items())):
        axes.axhline(
            gain, color=COLOURS[number % len(COLOURS)], linestyle="--", label=f"{choice}, static"
        )
    if best:
        axes.set_xscale("log", base=2)
        places = sorted({interval for kept in best.values() for interval in kept})
        axes.set_xticks(places, [str(place) for place in places])
    axes.set_ylabel("throughput gained")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    return _finish(figure, axes)


def _start(title: str, label: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title)
    axes.set_xlabel(label)
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)
    return figure, axes


def _finish(figure: Figure, axes: Axes) -> Figure:
    if axes.get_legend_handles_labels()[1]:
        legend_below(axes, 2)
    return figure


def _draw_points(
    axes: Axes, number: int, name: str, points: Mapping[int, float], style: str | None = None
) -> None:
    places = sorted(points)
    axes.plot(
        places,
        [points[place] for place in places],
        color=COLOURS[number % len(COLOURS)],
        linestyle=style or LINES[number % len(LINES)],
        marker=MARKERS[number % len(MARKERS)],
        label=name,
    )
