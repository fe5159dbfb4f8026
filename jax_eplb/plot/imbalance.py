"""Pictures of how uneven the ranks are: by layer, over time, and against what it costs.

Axes: W windows (iterations), L layers, P ranks.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from jax_eplb import metrics
from jax_eplb.plot.heat_maps import fill_by_layer, map_height
from jax_eplb.plot.style import (
    AFTER,
    BEFORE,
    CHANCE,
    COLOURS,
    MARKERS,
    label_ticks,
    legend_below,
    running_mean,
)


def before_after(
    before: np.ndarray,
    after: np.ndarray,
    layer_ids: Sequence[int],
    chance: float | np.ndarray | None = None,
) -> Figure:
    """The imbalance of each layer before and after, and the ranks' loads on one scale.

    `before` and `after` are tokens, [W, L, P]; they may be of different iterations. `chance`, one
    figure or one for each layer, float64[L], is the imbalance that chance alone would leave.
    Raises ValueError where the layers do not agree.
    """
    for name, tokens in (("before", before), ("after", after)):
        if tokens.ndim != 3 or tokens.shape[1] != len(layer_ids):
            raise ValueError(
                f"{name}: tokens have shape {tokens.shape}; expected "
                f"[iterations, {len(layer_ids)} layers, ranks]"
            )
    heights = (4, map_height(len(layer_ids)))
    figure = Figure(figsize=(10, sum(heights)), layout="constrained")
    upper, lower = figure.subfigures(2, 1, squeeze=False, height_ratios=heights)[:, 0]
    _draw_dumbbells(upper.subplots(), before, after, layer_ids, chance)
    fill_by_layer(lower, {"before": before, "after": after}, layer_ids, "rank")
    return figure


def tokens_per_rank(
    before: np.ndarray, after: np.ndarray | None, layer_ids: Sequence[int]
) -> Figure:
    """Bars of the layer that was most imbalanced before, averaged over iterations.

    `before`, and `after` where there is one, are tokens, [W, L, P].
    """
    layer = int(metrics.summarize(before).imbalance.argmax())
    series = {"before": before} if after is None else {"before": before, "after": after}
    num_ranks = before.shape[-1]
    figure = Figure(figsize=(min(14, 5 + 0.15 * num_ranks), 4.2), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(series)
    for i, (label, tokens) in enumerate(series.items()):
        place = np.arange(num_ranks) - 0.4 + width * (i + 0.5)
        height = tokens[:, layer].mean(axis=0)
        axes.bar(place, height, width, color=(BEFORE, AFTER)[i], label=label)
    mean = before[:, layer].mean()
    axes.axhline(mean, color="black", linewidth=1, linestyle="--", label=f"mean ({mean:,.1f})")
    axes.set_title(f"Tokens of each rank, layer {layer_ids[layer]} (the most imbalanced)")
    axes.set_xlabel("rank")
    axes.set_ylabel("tokens per iteration")
    axes.set_xlim(-0.6, num_ranks - 0.4)
    axes.xaxis.set_major_locator(MaxNLocator(16, integer=True))
    legend_below(axes, 3)
    return figure


def imbalance_by_iteration(
    series: Mapping[str, np.ndarray],
    *,
    change: int | None = None,
    updates: Sequence[int] = (),
    smooth: int = 20,
) -> Figure:
    """Imbalances, float[W] by name, over the iterations: each one, and a running mean.

    `change`: an iteration to mark with a line; `updates`: iterations to mark on the axis.
    """
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    axes = figure.subplots()
    for number, (name, values) in enumerate(series.items()):
        values, colour = np.asarray(values, np.float64), COLOURS[number % len(COLOURS)]
        axes.plot(values, color=colour, linewidth=0.5, alpha=0.25)
        mean = running_mean(values, smooth)
        axes.plot(mean, color=colour, linewidth=1.6, label=f"{name} (mean {values.mean():.3f})")
    if change is not None:
        axes.axvline(change, color="black", linestyle="--", linewidth=1, label="other text")
    if len(updates):
        axes.plot(
            updates,
            np.zeros(len(updates)),
            "|",
            color="black",
            markersize=7,
            label=f"a layer changes ({len(updates)} times)",
            clip_on=False,
        )
    axes.set_title(f"Imbalance over time, mean over the layers; thick: mean of {smooth} iterations")
    axes.set_xlabel("iteration")
    axes.margins(x=0)
    _finish(axes, 3)
    return figure


def imbalance_by(
    name: str,
    series: Mapping[str, Mapping[float, float]],
    *,
    title: str,
    chance: float | None = None,
) -> Figure:
    """Imbalances against some quantity of this name, one line for each series.

    A series is {quantity: imbalance}; `chance`, the imbalance that chance alone would leave.
    """
    figure = Figure(figsize=(7, 3.8), layout="constrained")
    axes = figure.subplots()
    for number, (label, points) in enumerate(series.items()):
        places = sorted(points)
        axes.plot(
            places,
            [points[place] for place in places],
            marker=MARKERS[number % len(MARKERS)],
            color=COLOURS[(number + 1) % len(COLOURS)],  # the first is for what was before
            label=label,
        )
    if chance is not None:
        axes.axhline(chance, color=CHANCE, linestyle="--", label="chance alone")
    axes.set_title(title)
    axes.set_xlabel(name)
    _finish(axes, 2)
    return figure


def _finish(axes: Axes, columns: int) -> None:
    axes.set_ylabel("(max - mean) / mean")
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)
    legend_below(axes, columns)


def _draw_dumbbells(
    axes: Axes,
    before: np.ndarray,
    after: np.ndarray,
    layer_ids: Sequence[int],
    chance: float | np.ndarray | None,
) -> None:
    """One dumbbell per layer: where its imbalance was, and where it is."""
    place = np.arange(len(layer_ids))
    high, low = metrics.summarize(before), metrics.summarize(after)
    axes.vlines(place, low.imbalance, high.imbalance, color="0.8", zorder=1)
    for table, label, colour, marker in ((high, "before", BEFORE, "o"), (low, "after", AFTER, "s")):
        text = f"{label} (average {table.average.imbalance:.3f})"
        axes.plot(place, table.imbalance, marker, color=colour, label=text)
    if chance is not None:
        floor = np.broadcast_to(chance, place.shape)
        edges = np.append(place - 0.5, place[-1] + 0.5)
        text = f"chance alone (average {floor.mean():.3f})"
        axes.stairs(floor, edges, baseline=None, color=CHANCE, linestyle="--", label=text)
    axes.set_title("Imbalance of the ranks by layer")
    axes.set_xlabel("layer")
    axes.set_xlim(-0.5, len(layer_ids) - 0.5)
    _finish(axes, 3)
    if axes.get_ylim()[1] <= 0:
        axes.set_ylim(top=1)
    label_ticks(axes.xaxis, layer_ids, most=20)
