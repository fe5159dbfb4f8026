"""Read recordings for the benchmark from .npz files.

Axes: T tokens, K experts chosen by each, W windows, L layers, E experts.

An array of a file is one recording: counts [W, L, E], by window in time order. An array named
`expert_ids` [T, L, K] is a trace of tokens instead: they are put in random order, which leaves a
load that does not change with time, and counted in windows. Arrays of one axis are labels.
"""

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from benchmarks.loads import Size

# Slots and ranks by the number of experts: for the even split, for the balanced split held out and
# followed online, and for both where tokens are in random order.
EVEN_SIZES = {
    32: ((40, 8), (48, 16)),
    64: ((72, 8), (80, 16), (96, 32)),
    128: ((144, 16), (160, 32)),
}
BALANCED_SIZES = {
    32: ((40, 8), (48, 8), (64, 16)),
    64: ((72, 8), (80, 8), (96, 16)),
    128: ((144, 16), (160, 32)),
}
ONLINE_SIZES = {32: ((48, 8), (64, 16)), 64: ((80, 8),), 128: ()}
SHUFFLED_SIZES = {32: ((48, 16),), 64: ((80, 16),), 128: ((144, 16),)}
# Tokens of a window of a trace.
_WINDOW_TOKENS = {32: 1024, 64: 512, 128: 128}
_TRACE = "expert_ids"
_LEAST_WINDOWS = 20  # two for each of the chunks of the online protocol


class RecordingError(Exception):
    """A file that cannot be used; the message says what would do."""


@dataclasses.dataclass(frozen=True)
class Recording:
    """Counts of tokens by expert, [W, L, E]."""

    name: str
    windows: np.ndarray
    shuffled: bool = False

    @property
    def num_experts(self) -> int:
        return self.windows.shape[2]

    @property
    def even_sizes(self) -> list[Size]:
        """Sizes of the even split's tables; none for a load that does not change."""
        sizes = () if self.shuffled else EVEN_SIZES[self.num_experts]
        return [Size(self.num_experts, *size) for size in sizes]

    @property
    def balanced_sizes(self) -> list[Size]:
        by_experts = SHUFFLED_SIZES if self.shuffled else BALANCED_SIZES
        return [Size(self.num_experts, *size) for size in by_experts[self.num_experts]]

    @property
    def online_sizes(self) -> list[Size]:
        by_experts = SHUFFLED_SIZES if self.shuffled else ONLINE_SIZES
        return [Size(self.num_experts, *size) for size in by_experts[self.num_experts]]


def read_recordings(
    paths: Iterable[str], *, least_windows: int = _LEAST_WINDOWS, any_experts: bool = False
) -> tuple[list[Recording], list[str]]:
    """Every usable recording of the files, and a note on each array that is left out.

    Usable are those with enough windows, of as many experts as the tables of sizes above know, or
    of any number with `any_experts`.

    Raises RecordingError for what is no recording, and for a file without any.
    """
    recordings: list[Recording] = []
    notes: list[str] = []
    known_experts = "any number of" if any_experts else _known_experts()
    wanted = f"{least_windows} windows or more of {known_experts} experts"
    for path in paths:
        try:
            with np.load(path) as file:
                arrays = {name: file[name] for name in file.files}
        except (OSError, ValueError, AttributeError) as error:
            raise RecordingError(
                f"--recordings {path}: no .npz file can be read there ({error}); "
                "give one that np.savez wrote, with arrays [windows, layers, experts]"
            ) from error
        found = len(recordings)
        for name, array in arrays.items():
            if array.ndim < 2:
                continue
            _check(path, name, array)
            if name == _TRACE:
                # A file may say of how many, for the last ones may never be chosen.
                num_experts = int(arrays.get("num_experts", 0))
                recording = shuffle(Path(path).stem, array, num_experts)
            else:
                recording = Recording(name, array)
            num_windows = len(recording.windows)
            if num_windows >= least_windows and (
                any_experts or recording.num_experts in EVEN_SIZES
            ):
                recordings.append(recording)
            else:
                notes.append(
                    f"{path}, array {name} left out: {num_windows} windows of "
                    f"{recording.num_experts} experts; used are {wanted}"
                )
        if len(recordings) == found:
            raise RecordingError(
                f"--recordings {path}: no array with {wanted}; "
                "give counts [windows, layers, experts]. "
                f"Arrays: {', '.join(f'{n} {list(a.shape)}' for n, a in arrays.items()) or 'none'}"
            )
    return recordings, notes


def _known_experts() -> str:
    *first, last = map(str, EVEN_SIZES)
    return f"{', '.join(first)} or {last}"


def _check(path: str, name: str, array: np.ndarray) -> None:
    axes = "[tokens, layers, choices]" if name == _TRACE else "[windows, layers, experts]"
    if array.ndim != 3 or 0 in array.shape:
        raise RecordingError(
            f"--recordings {path}, array {name}: shape {list(array.shape)}; expected {axes}, "
            "none of them 0. Reshape it, or save the file without it"
        )
    if array.dtype.kind not in ("iu" if name == _TRACE else "iuf"):
        raise RecordingError(
            f"--recordings {path}, array {name}: {array.dtype}; expected "
            f"{'ids of experts' if name == _TRACE else 'counts of tokens'} {axes}, as numbers"
        )
    wrong = ~(np.isfinite(array) & (array >= 0))
    if wrong.any():
        at = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise RecordingError(
            f"--recordings {path}, array {name}, at {list(at)}: {array[at]}; "
            "expected 0 or more. Leave out damaged windows, or put 0 there"
        )


def shuffle(name: str, expert_ids: np.ndarray, num_experts: int = 0) -> Recording:
    """A trace [T, L, K] in random order, counted in windows; tokens left over are dropped."""
    num_experts = max(num_experts, int(expert_ids.max()) + 1)
    order = np.random.default_rng(0).permutation(len(expert_ids))
    size = _WINDOW_TOKENS.get(num_experts, 1024)
    num_windows, num_layers = len(order) // size, expert_ids.shape[1]
    ids = expert_ids[order[: num_windows * size]].astype(np.int64)
    ids = ids.reshape(num_windows, size, num_layers, -1).swapaxes(1, 2)
    ids = ids.reshape(num_windows * num_layers, -1)  # [W * L, tokens * K]
    counts = np.stack([np.bincount(row, minlength=num_experts) for row in ids])
    counts = counts.reshape(num_windows, num_layers, num_experts)
    return Recording(f"{name}, shuffled", counts, shuffled=True)
