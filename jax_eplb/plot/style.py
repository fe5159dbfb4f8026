"""Style: what all pictures share, without a display and without pyplot's global state.

Series differ by colour (Okabe and Ito's palette, which can be told apart with any common form of
colour blindness) and by line style or marker, so they stay apart in grey print.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

BEFORE, AFTER, CHANCE = "#D55E00", "#0072B2", "#666666"  # the last for what none can be below
COLOURS = (BEFORE, AFTER, "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)), (0, (8, 2)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_DPI = 110


def save_figures(directory: str | os.PathLike, figures: Mapping[str, Figure]) -> list[Path]:
    """Write each figure as `name.png` into a directory, made if need be; the files, in order."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    files = []
    for name, figure in figures.items():
        files.append(directory / f"{name}.png")
        figure.savefig(files[-1], dpi=_DPI)
    return files


def running_mean(values: np.ndarray, count: int) -> np.ndarray:
    """Of the last `count` values, fewer at the start.

    >>> running_mean(np.array([1.0, 3.0, 5.0]), 2).tolist()
    [1.0, 2.0, 4.0]
    """
    total = np.concatenate([np.zeros(1), np.cumsum(values)])
    end = np.arange(1, len(values) + 1)
    used = np.minimum(end, count)
    return (total[end] - total[end - used]) / used


def label_ticks(axis, labels: Sequence[int], most: int) -> None:
    """Name positions 0, 1, ... by layer id or iteration, at most so many of them."""
    axis.set_major_locator(MaxNLocator(most, integer=True, min_n_ticks=1))

    def name(position, _):
        index = round(position)
        return str(labels[index]) if 0 <= index < len(labels) else ""

    axis.set_major_formatter(FuncFormatter(name))


def legend_below(axes: Axes, columns: int) -> None:
    """Under the frame, since points and lines may be anywhere in it."""
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=columns, frameon=False)
