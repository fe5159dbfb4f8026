"""Time and memory of a plan against layers, slots and ranks; each point in a process of its own.

Axes: L layers, E experts, S slots, P ranks.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.loads import NUM_LAYERS, Size
from benchmarks.setting import Setting
from benchmarks.tables import Column, Table

_ROOT = Path(__file__).parents[1]
_TIMEOUT = 900


class Point(NamedTuple):
    layers: int
    size: Size

    def __str__(self) -> str:
        return f"{self.layers} layers, {self.size}"


def _points(*sizes: tuple[int, int, int], layers: int = NUM_LAYERS) -> tuple[Point, ...]:
    return tuple(Point(layers, Size(*size)) for size in sizes)


# What each panel of the figure varies; the rest of a point stays.
AGAINST: dict[str, tuple[Point, ...]] = {
    "layers": tuple(Point(layers, Size(256, 288, 36)) for layers in (1, 8, 58, 128)),
    "slots": _points(*((256, slots, 32) for slots in (256, 288, 320, 384, 512))),
    "ranks": _points(*((256, 320, ranks) for ranks in (8, 16, 32, 64, 160))),
}
LARGE = _points(
    (64, 96, 32),
    (512, 640, 320),
    (1024, 2000, 1000),
    (1024, 2048, 1024),
)


def scaling(
    setting: Setting,
    against: dict[str, tuple[Point, ...]] = AGAINST,
    large: Sequence[Point] = LARGE,
) -> list[Table]:
    """One table of all points; a picture too where one is asked for."""
    notes: list[str] = []
    every = dict.fromkeys(point for points in (*against.values(), large) for point in points)
    measured = {}
    for point in setting.track(every, "scale"):
        measured[point] = _measure(point, setting, notes)
    rows = [
        {"layers": str(point.layers), "size": str(point.size)} | found
        for point, found in measured.items()
    ]
    if setting.figure is not None:
        draw(setting.figure, against, measured)
        notes.append(f"Drawn in {setting.figure.name}.")
    columns = [
        Column("layers", "layers"),
        Column("size", "E/S/P"),
        Column("median_ms", "median, ms", 1),
        Column("least_ms", "least, ms", 1),
        Column("compile_s", "compilation, s", 1),
        Column("memory_before_mb", "peak memory before, MB", 0),
        Column("memory_peak_mb", "peak memory, MB", 0),
        Column("imbalance", "imbalance, percent", 2),
        Column("bound", "lower bound", 2),
    ]
    return [Table("Time and memory of one plan, default effort, sigma 1", columns, rows, notes)]


def _measure(point: Point, setting: Setting, notes: list[str]) -> dict:
    command = [sys.executable, "-m", "benchmarks.scaling_point", str(point.layers)]
    command += [*map(str, point.size), "--repeats", str(setting.repeats)]
    try:
        done = subprocess.run(
            command, cwd=_ROOT, capture_output=True, text=True, timeout=_TIMEOUT, check=False
        )
    except subprocess.TimeoutExpired:
        notes.append(f"{point}: not done in {_TIMEOUT} s")
        return {}
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"ended with code {done.returncode}"]
        notes.append(f"{point}: {last[0]}")
        return {}
    return json.loads(done.stdout)


def draw(path: Path, against: dict[str, tuple[Point, ...]], measured: dict[Point, dict]) -> None:
    """Time against layers, slots and ranks: a panel each, both axes logarithmic."""
    # Slow to import, and seldom needed.
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    panels = figure.subplots(1, len(against), sharey=True, squeeze=False)[0]
    for panel, (name, points) in zip(panels, against.items(), strict=True):
        found = [point for point in points if measured[point]]
        across = [p.layers if name == "layers" else getattr(p.size, name) for p in found]
        panel.loglog(across, [measured[p]["median_ms"] for p in found], marker="o")
        panel.set_xticks(across, [str(value) for value in across])
        panel.xaxis.set_minor_locator(NullLocator())
        panel.yaxis.set_major_formatter("{x:g}")
        panel.set_xlabel(name)
        panel.set_title(_constant(name, points[0]), fontsize="medium")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("time of one plan, ms")
    figure.savefig(path, dpi=150)


def _constant(name: str, point: Point) -> str:
    size = point.size
    words = {
        "layers": f"{point.layers} layers",
        "experts": f"{size.experts} experts",
        "slots": f"{size.slots} slots",
        "ranks": f"{size.ranks} ranks",
    }
    return ", ".join(text for key, text in words.items() if key != name)
