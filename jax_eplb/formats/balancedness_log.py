"""Balancedness from the logs of vLLM and SGLang: mean load of the ranks over the fullest one's.

vLLM, with `log_balancedness` in its EPLB config, writes from rank 0
`EPLB step: 7 for model NAME: avg_tokens=512.00, max_tokens=901, balancedness=0.5683, ...`; before
v0.11 without step and model. Tokens are summed over the MoE layers, and the step starts again at 0
with each rearrangement. SGLang, with `--expert-balancedness-report-mode server_log`, writes
`[Expert Balancedness] forward_pass_id=7 current_pass_balancedness=0.568 ...`, the mean over layers.
"""

import dataclasses
import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from jax_eplb.formats.files import check_file

_MAX_LINE = 1 << 16  # bytes; what is longer is cut, and no such line is of interest
_NUMBER = r"([0-9]{1,15}(?:\.[0-9]{1,15})?)"
_VLLM = re.compile(
    r"EPLB step: (?:(\d{1,15}) for model (.{1,1000}?): )?"
    rf"avg_tokens={_NUMBER}, max_tokens={_NUMBER}, balancedness={_NUMBER}"
)
_SGLANG = re.compile(
    rf"\[Expert Balancedness\] forward_pass_id=(\d{{1,15}}) current_pass_balancedness={_NUMBER}"
)
# Both spellings of vLLM. The profiling pass before serving starts moves nothing.
_REARRANGED = re.compile(rf"Rearranged experts\s+in {_NUMBER} s")


@dataclasses.dataclass(frozen=True, eq=False)
class Balancedness:
    """The figures of one model in a log, in the order of its lines."""

    model: str  # "" where the log does not say
    steps: np.ndarray  # int64[n], as the engine counts them; -1 where the log does not say
    balancedness: np.ndarray  # float64[n], 0 to 1
    mean_tokens: np.ndarray  # float64[n], of a rank; nan where the log does not say
    max_tokens: np.ndarray  # float64[n], of the fullest rank
    rearranged: tuple[int, ...]  # lines before each rearrangement, of any model
    seconds: tuple[float, ...]  # that each took

    @property
    def by_tokens(self) -> float:
        """Balancedness of the whole log, steps with many tokens weighing more; nan if not known."""
        total = self.max_tokens.sum()
        return float(self.mean_tokens.sum() / total) if total > 0 else float("nan")


def load_balancedness(path: str | os.PathLike) -> list[Balancedness]:
    """The figures of each model in a log; none where no line has any.

    Other lines are passed over, so a log of any length can be read. Raises ValueError where the
    path is no file.
    """
    found: dict[str, list[tuple[float, ...]]] = {}
    rearranged: dict[str, list[int]] = {}
    seconds: list[float] = []
    for line in _lines(check_file(path)):
        if match := _VLLM.search(line):
            step, model, mean, fullest, balancedness = match.groups()
            figures = (step or -1, balancedness, mean, fullest)
        elif match := _SGLANG.search(line):
            model, figures = "", (match[1], match[2], "nan", "nan")
        elif match := _REARRANGED.search(line):
            seconds.append(float(match[1]))
            for name, rows in found.items():
                rearranged[name].append(len(rows))
            continue
        else:
            continue
        rearranged.setdefault(model or "", [0] * len(seconds))
        found.setdefault(model or "", []).append(tuple(map(float, figures)))
    return [
        _series(model, rows, rearranged[model], tuple(seconds)) for model, rows in found.items()
    ]


def _series(
    model: str, rows: list[tuple[float, ...]], rearranged: list[int], seconds: tuple[float, ...]
) -> Balancedness:
    steps, balancedness, mean, fullest = np.array(rows).T
    return Balancedness(
        model, steps.astype(np.int64), balancedness, mean, fullest, tuple(rearranged), seconds
    )


def _lines(path: Path) -> Iterator[str]:
    with path.open("rb") as file:
        while line := file.readline(_MAX_LINE):
            yield line.decode("utf-8", "replace")
