"""The file of what was generated: a line for each request as soon as it is finished."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import numpy as np

from jax_eplb.formats.files import replacing
from jax_eplb.serving import Request


class Outputs:
    """One JSON object a request: its line in the requests' file, the token ids, and text if bytes.

    Whoever ends the program, at any time, leaves whole lines but for the last.
    """

    def __init__(self, file: TextIO, as_text: bool):
        self._file, self._as_text = file, as_text

    def add(self, request: Request, tokens: np.ndarray) -> None:
        """Write a finished request down, so that it is on the disk when this returns."""
        row = {"line": request.seed, "token_ids": tokens.tolist()}
        if self._as_text:
            row["text"] = tokens.astype(np.uint8).tobytes().decode(errors="replace")
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()


@contextlib.contextmanager
def open_outputs(path: Path, *, as_text: bool, keep: bool) -> Iterator[Outputs]:
    """Write to a file, after what it has if that is to be kept; in the requests' order at the end.

    Raises OSError where it cannot be written, ValueError where what is to be kept is damaged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _replace(path, read_rows(path) if keep else {})
    with path.open("a", encoding="utf-8") as file:
        yield Outputs(file, as_text)
    _replace(path, read_rows(path))


def read_rows(path: Path) -> dict[int, str]:
    """The rows of a file by the line of their request; a last one that was cut off is left out.

    An absent file has none. Raises ValueError that names the line which is none of these rows.
    """
    if not path.exists():
        return {}
    *lines, _ = path.read_text(encoding="utf-8").split("\n")
    rows = {}
    for number, line in enumerate(lines, 1):
        try:
            rows[int(json.loads(line)["line"])] = line
        except (ValueError, TypeError, KeyError):
            raise ValueError(
                f"{path}, line {number}: not written by jax-eplb run; give another file, or leave "
                "--resume out to begin a new one"
            ) from None
    return rows


def _replace(path: Path, rows: dict[int, str]) -> None:
    with replacing(path) as file:
        file.writelines(f"{rows[line]}\n".encode() for line in sorted(rows))
