"""A byte-level decoder small enough to compile in a second, and requests to it."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from jax_eplb.models.weights import SavedDecoder
from jax_eplb.serving import Request
from tests.small_decoder import SMALL, drawn_on_host

CONFIG = dataclasses.replace(
    SMALL, vocab_size=256, num_experts=16, experts_per_token=3, max_length=64
)


def tiny_decoder() -> SavedDecoder:
    """A byte-level decoder as it would be loaded from a file."""
    return SavedDecoder(CONFIG, drawn_on_host(CONFIG), {})


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
