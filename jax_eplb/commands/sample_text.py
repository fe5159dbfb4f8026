"""Requests of the text that is embedded beside the byte model, which it was not trained on."""

from collections.abc import Sequence
from importlib import resources

import numpy as np

from jax_eplb.serving import Request

KINDS = ("python", "prose", "bible", "maths")


def sample_requests(
    half: str,
    count: int,
    *,
    prompt_bytes: int,
    output_tokens: int,
    kinds: Sequence[str] = KINDS,
    first_seed: int = 0,
) -> list[Request]:
    """Requests from one half of the embedded held-out text, the kinds in turn.

    Passages follow each other; where a half has fewer than asked for, they begin again at another
    offset.
    """
    folder = resources.files("jax_eplb.models") / "samples"
    passages = []
    for kind in kinds:
        text = (folder / f"{kind}.txt").read_bytes()
        middle = len(text) // 2
        text = text[:middle] if half == "first" else text[middle:]
        passages.append(np.frombuffer(text, np.uint8).astype(np.int32))
    requests = []
    for number in range(count):
        text = passages[number % len(kinds)]
        turns = (len(text) - prompt_bytes) // prompt_bytes
        turn, start = divmod(number // len(kinds), turns)
        offset = start * prompt_bytes + turn * 37 % prompt_bytes
        prompt = text[offset : offset + prompt_bytes]
        requests.append(Request(prompt, output_tokens, seed=first_seed + number))
    return requests
