"""The same plans on the CPU and on the default device: how many layers agree, and how fast.

Axes: W windows, L layers, E experts, S slots, P ranks.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks.balanced import balanced_imbalance
from benchmarks.loads import KINDS, SIZES, Size, draw_load, drifted
from benchmarks.setting import Setting, percent, plan_for, table_of
from benchmarks.tables import Column, Table
from benchmarks.timing import time_warm

_WINDOWS = 16
Device = Any  # jax.Device, which type checkers take for a variable


class Case(NamedTuple):
    """What is planned, and the loads, all of one shape."""

    name: str
    size: Size
    loads: list[np.ndarray]
    options: dict

    def score(self, table: np.ndarray, load: np.ndarray) -> float:
        """Imbalance in percent under the split planned for."""
        if self.options.get("split") == "balanced":
            return 100 * balanced_imbalance(table, load, self.size.ranks)
        return percent(table, load, self.size.ranks)


def devices(
    setting: Setting,
    cases: Sequence[Case] | None = None,
    compared: tuple[Device, Device] | None = None,
) -> list[Table]:
    """A row for each size and sort of plan, over all its loads."""
    title = "The same plans on two devices"
    if compared is None:
        if jax.default_backend() == "cpu":
            return [Table(title, [], [], ["Needs a GPU: the only device here is the CPU."])]
        compared = jax.devices("cpu")[0], jax.devices()[0]
    cases = _cases(setting) if cases is None else cases
    rows = [_compare(case, compared, setting.repeats) for case in setting.track(cases, "devices")]
    first, second = (f"{device.platform} {device.device_kind}" for device in compared)
    columns = [
        Column("size", "E/S/P"),
        Column("plan", "plan"),
        Column("layers", "layers", 0),
        Column("identical", "with identical tables", 0),
        Column("first_imbalance", "imbalance, first", 3),
        Column("second_imbalance", "second", 3),
        Column("first_ms", "median ms, first", 1),
        Column("second_ms", "second", 1),
    ]
    note = f"First: {first}. Second: {second}. Imbalance in percent, mean of all loads."
    return [Table(title, columns, rows, [note])]


def _cases(setting: Setting) -> list[Case]:
    cases = []
    for size, effort in itertools.product(SIZES, setting.efforts):
        loads = [draw_load(kind, setting.num_layers, size.experts) for kind in KINDS]
        cases.append(Case(effort, size, loads, {"effort": effort}))
    effort = setting.usual_effort
    for size in (SIZES[0], SIZES[-1]):
        load = draw_load(KINDS[1], setting.num_layers, size.experts)
        many = [drifted(load, windows=_WINDOWS)]
        options = {"effort": effort}
        cases.append(Case(f"{_WINDOWS} windows, {effort}", size, many, options))
        name = f"{_WINDOWS} windows, balanced, {effort}"
        cases.append(Case(name, size, many, options | {"split": "balanced"}))
    return cases


def _compare(case: Case, compared: tuple[Device, Device], repeats: int) -> dict:
    row: dict = {"size": str(case.size), "plan": case.name}
    tables: list[np.ndarray] = []
    for which, device in zip(("first", "second"), compared, strict=True):
        with jax.default_device(device):
            plans = [plan_for(case.size, load, **case.options) for load in case.loads]
            planned = functools.partial(plan_for, case.size, case.loads[0], **case.options)
            row[f"{which}_ms"] = time_warm(planned, repeats).median_ms
        tables.append(np.stack([table_of(result) for result in plans]))
        scores = [case.score(*pair) for pair in zip(tables[-1], case.loads, strict=True)]
        row[f"{which}_imbalance"] = float(np.mean(scores))
    same = (tables[0] == tables[1]).all(axis=-1)
    return row | {"layers": same.size, "identical": int(same.sum())}
