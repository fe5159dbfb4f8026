"""Tokens whose router chooses the experts that a recording says: real skew, in a layer unchanged.

Axes: W windows, L layers, T tokens, K choices of a token, E experts, D embedding width.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from benchmarks.recording_files import RecordingError, read_recordings

_SEED = 20261126
_LOGITS = 4.0  # of the first choice; the others follow in steps, all far above those not chosen
_STEP = 0.1
_NOISE = 0.02
_WINDOWS = 8  # the fewest that a recording must have


class Replay(NamedTuple):
    """What was routed in one recording, in the order of time."""

    name: str
    num_experts: int
    top_k: int
    counts: np.ndarray  # [W, L, E], to plan from
    expert_ids: np.ndarray | None  # [tokens, L, K] of a trace

    def spaced_layers(self, number: int) -> np.ndarray:
        """So many of its layers, evenly spaced."""
        return np.linspace(0, self.counts.shape[1] - 1, number).round().astype(int)

    def batch(self, layers: np.ndarray, num_tokens: int, window: int, of: int) -> np.ndarray:
        """Ids [L, T, K] of a batch in the recording's second half: the `window`-th of so many.

        A trace's tokens follow each other, and begin again where there are too few; counts are
        drawn from, in the proportions of their window.
        """
        if self.expert_ids is not None:
            later = self.expert_ids[len(self.expert_ids) // 2 :, layers]
            start = len(later) * window // of
            index = (start + np.arange(num_tokens)) % len(later)
            return later[index].swapaxes(0, 1)
        later = self.counts[len(self.counts) // 2 :]
        share = later[len(later) * window // of, layers] + 1e-9  # [L, E]
        return self._draw(share, num_tokens, window)

    def uniform(self, num_layers: int, num_tokens: int) -> np.ndarray:
        """Ids [L, T, K] that give every expert the same load, as nearly as whole tokens allow."""
        generator = np.random.default_rng(_SEED)
        chosen = np.arange(num_tokens * self.top_k).reshape(num_tokens, self.top_k)
        return np.stack(
            [
                generator.permutation(self.num_experts)[chosen % self.num_experts]
                for _ in range(num_layers)
            ]
        )

    def drawn(self, num_layers: int, num_tokens: int) -> np.ndarray:
        """Ids [L, T, K] where every expert is as likely as any other."""
        return self._draw(np.ones((num_layers, self.num_experts)), num_tokens, _WINDOWS)

    def _draw(self, share: np.ndarray, num_tokens: int, seed: int) -> np.ndarray:
        """Different experts for each token, by their shares [L, E] of the load."""
        generator = np.random.default_rng([_SEED, seed])
        noise = generator.gumbel(size=(len(share), num_tokens, self.num_experts))
        merits = np.log(share)[:, None] + noise
        return np.argpartition(-merits, self.top_k, axis=-1)[..., : self.top_k]


def read_replays(paths: list[str], top_k_of: dict[int, int]) -> Iterator[Replay]:
    """Each recording of the files; `top_k_of` gives the choices of a token by number of experts.

    An array `expert_ids` [T, L, K] is replayed token by token, in its order; counts [W, L, E] are
    drawn from. Recordings of other numbers of experts are left out. Raises RecordingError where a
    file is no recording.
    """
    for path in paths:
        recordings, _ = read_recordings([path], least_windows=_WINDOWS, any_experts=True)
        for recording in recordings:
            experts = recording.num_experts
            if experts not in top_k_of:
                continue
            if recording.shuffled:
                yield _replay_of_trace(path, experts)
            else:
                top_k = top_k_of[experts]
                yield Replay(recording.name, experts, top_k, recording.windows, None)


def read_traces(paths: list[str]) -> Iterator[Replay]:
    """The token trace, `expert_ids`, of each file.

    Raises RecordingError where a file is no recording or has no trace.
    """
    for path in paths:
        recordings, _ = read_recordings([path], least_windows=_WINDOWS, any_experts=True)
        traces = [recording for recording in recordings if recording.shuffled]
        if not traces:
            raise RecordingError(
                f"{path} has counts alone; give a trace, expert_ids [tokens, L, K]"
            )
        yield _replay_of_trace(path, traces[0].num_experts)


def _replay_of_trace(path: str, num_experts: int) -> Replay:
    with np.load(path) as file:
        ids = file["expert_ids"].astype(np.int64)
    windows = np.array_split(ids, min(len(ids), 4 * _WINDOWS))
    counts = np.stack([count_ids(window, num_experts) for window in windows])
    return Replay(Path(path).stem, num_experts, ids.shape[2], counts, ids)


def count_ids(expert_ids: np.ndarray, num_experts: int) -> np.ndarray:
    """Counts int64[L, E] of ids [T, L, K].

    >>> count_ids(np.array([[[0, 2]], [[2, 1]]]), 3).tolist()
    [[1, 1, 2]]
    """
    by_layer = expert_ids.swapaxes(0, 1).reshape(expert_ids.shape[1], -1)
    return np.stack([np.bincount(layer, minlength=num_experts) for layer in by_layer])


def routers(num_layers: int, embed: int, experts: int) -> np.ndarray:
    """Routers [L, D, E] whose columns are orthonormal, so that tokens can be made for them."""
    if experts > embed:
        raise RecordingError(f"{experts} experts need tokens at least as wide, not {embed}")
    generator = np.random.default_rng(_SEED)
    drawn = generator.normal(size=(num_layers, embed, experts))
    return np.linalg.qr(drawn)[0].astype(np.float32)


def tokens_for(
    expert_ids: Int[Array, "T K"], router: Float[Array, "D E"], key: Array
) -> Float[Array, "T D"]:
    """Tokens float32[T, D] that a router [D, E] of `routers` sends to `expert_ids`, in order.

    >>> router, ids = routers(1, 8, 4)[0], jnp.array([[2, 0], [1, 3]])
    >>> logits = tokens_for(ids, router, jax.random.key(0)) @ router
    >>> jnp.argsort(-logits, axis=-1)[..., :2].tolist()
    [[2, 0], [1, 3]]
    """
    (num_tokens, top_k), (embed, experts) = expert_ids.shape, router.shape
    values = _LOGITS - _STEP * jnp.arange(top_k, dtype=jnp.float32)
    chosen = jax.nn.one_hot(expert_ids, experts, dtype=jnp.float32)  # [T, K, E]
    logits = jnp.einsum("tke,k->te", chosen, values)
    noise = jax.random.normal(key, (num_tokens, embed), jnp.float32) * _NOISE
    return logits @ router.T + noise
