"""A decoder small enough to compile in a second, its weights made from a seed."""

import contextlib
import functools
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from jax_eplb.models import DecoderConfig, parameters
from jax_eplb.models.weights import SavedDecoder
from jax_eplb.serving import Request

CONFIG = DecoderConfig(
    vocab_size=256,
    embed_dim=16,
    num_layers=3,
    num_dense_layers=1,
    num_heads=2,
    head_dim=8,
    dense_hidden_dim=24,
    num_experts=16,
    experts_per_token=3,
    expert_hidden_dim=8,
    shared_hidden_dim=8,
    max_length=64,
)


@functools.cache
def tiny_decoder(seed: int = 0) -> SavedDecoder:
    """Normal matrices of scale 1 / √rows, norms of ones; in numpy, which compiles nothing."""
    generator = np.random.default_rng(seed)

    def make(shape):
        scale = 1.0 if len(shape) < 2 else shape[-2] ** -0.5
        drawn = np.ones(shape) if len(shape) < 2 else generator.standard_normal(shape)
        return (drawn * scale).astype(np.float32)

    shapes = parameters.shapes(CONFIG)
    return SavedDecoder(CONFIG, jax.tree.map(make, shapes, is_leaf=parameters.is_shape), {})


def random_requests(lengths: Sequence[tuple[int, int]], seed: int = 0) -> list[Request]:
    """A request of random tokens for each (prompt length, output length)."""
    generator = np.random.default_rng(seed)
    return [
        Request(generator.integers(0, CONFIG.vocab_size, prompt), output, seed=number)
        for number, (prompt, output) in enumerate(lengths)
    ]


@contextlib.contextmanager
def counted_compilations() -> Iterator[list[str]]:
    """Every program that XLA compiles inside the block, of whatever function, adds to the list."""
    compiled = []

    def note(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(str(kwargs.get("fun_name", event)))

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        yield compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
