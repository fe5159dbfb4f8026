"""Requests: a prompt and how many tokens to write; read from JSON lines."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """One prompt, int32[length], and the number of tokens to write after it."""

    prompt: np.ndarray
    output_length: int
    seed: int = 0  # of its sampling; unused where the temperature is 0

    def __post_init__(self):
        prompt = np.asarray(self.prompt)
        if prompt.ndim != 1 or not prompt.size or not np.issubdtype(prompt.dtype, np.integer):
            raise ValueError(
                f"a prompt of shape {prompt.shape} and type {prompt.dtype}; give a list of token "
                "ids, not empty"
            )
        if self.output_length < 1:
            raise ValueError(f"output_length is {self.output_length}; it must be at least 1")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed is {self.seed}; use 0 to {2**31 - 1}")
        object.__setattr__(self, "prompt", prompt.astype(np.int32))  # frozen

    @classmethod
    def from_text(cls, text: str, output_length: int, seed: int = 0) -> "Request":
        """A request to a byte-level model.

        >>> Request.from_text("Hi", 4).prompt.tolist()
        [72, 105]
        """
        return cls(np.frombuffer(text.encode(), np.uint8), output_length, seed)


def read_requests(path: str | os.PathLike, *, vocab_size: int, max_length: int) -> list[Request]:
    """Read one JSON object a line: `prompt` (text, as bytes) or `token_ids`, and `output_length`.

    TensorRT-LLM's names `input_ids` and `output_tokens` are understood too. Empty lines are
    skipped. A request's seed is the number of its line. Raises ValueError naming file, line and
    fault.
    """
    try:
        # Not splitlines: JSON allows other separators of lines inside its strings.
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason})") from None
    requests = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            place = f"{path}, line {number}"
            requests.append(_parse(line, place, number, vocab_size, max_length))
    if not requests:
        raise ValueError(f"{path}: holds no request; write one JSON object a line")
    return requests


def _parse(line: str, place: str, number: int, vocab_size: int, max_length: int) -> Request:
    try:
        values = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: not JSON ({error.msg} at column {error.colno})") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, deep nesting
        raise ValueError(f"{place}: not JSON that can be read ({error})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{place}: expected an object, found {type(values).__name__}")
    prompt = _prompt(values, place, vocab_size)
    length = values.get("output_length", values.get("output_tokens"))
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        raise ValueError(f"{place}: 'output_length' is {length!r}; give an integer of at least 1")
    if len(prompt) + length > max_length:
        raise ValueError(
            f"{place}: {len(prompt)} prompt and {length} output tokens exceed the model's "
            f"{max_length}; shorten one of them"
        )
    return Request(prompt, length, seed=number)


def _prompt(values: dict[str, Any], place: str, vocab_size: int) -> np.ndarray:
    text = values.get("prompt")
    ids = values.get("token_ids", values.get("input_ids"))
    if text is not None and ids is not None:
        raise ValueError(f"{place}: both a 'prompt' and token ids; give one of them")
    if isinstance(text, str):
        if vocab_size != 256:
            raise ValueError(
                f"{place}: 'prompt' is text, and this model's {vocab_size} tokens are not bytes; "
                "give 'token_ids'"
            )
        try:
            ids = list(text.encode())
        except UnicodeEncodeError as error:
            raise ValueError(f"{place}: 'prompt' is no valid text ({error.reason})") from None
    if not isinstance(ids, list) or not ids:
        raise ValueError(f"{place}: give a 'prompt' text or a list 'token_ids', not empty")
    for i in ids:
        if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < vocab_size:
            raise ValueError(f"{place}: token id {i!r} is not an integer of 0 to {vocab_size - 1}")
    return np.array(ids, np.int32)
