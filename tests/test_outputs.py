"""The file of what was generated: whole after an end at any time, and in order at last."""

import json

import numpy as np
import pytest

from jax_eplb.commands.outputs import open_outputs, read_rows
from jax_eplb.serving import Request


def request(line):
    return Request(np.array([1]), 2, seed=line)


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_are_there_at_once_and_in_order_at_the_end(tmp_path):
    path = tmp_path / "new" / "out.jsonl"
    with open_outputs(path, as_text=True, keep=False) as outputs:
        outputs.add(request(3), np.array([72, 105]))
        assert lines_of(path) == [{"line": 3, "token_ids": [72, 105], "text": "Hi"}]
        outputs.add(request(1), np.array([65, 255]))
    assert [(row["line"], row["text"]) for row in lines_of(path)] == [(1, "A�"), (3, "Hi")]
    assert [p.name for p in path.parent.iterdir()] == ["out.jsonl"]


def test_what_an_end_in_the_middle_left_is_kept_but_for_half_a_row(tmp_path):
    path = tmp_path / "out.jsonl"
    whole = json.dumps({"line": 7, "token_ids": [1]})
    path.write_text(f'{whole}\n{{"line": 9, "tok')
    assert list(read_rows(path)) == [7]
    with open_outputs(path, as_text=False, keep=True) as outputs:
        outputs.add(request(2), np.array([5]))
    assert lines_of(path) == [{"line": 2, "token_ids": [5]}, json.loads(whole)]


def test_without_keeping_the_file_begins_anew(tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_text("something else\n")
    with open_outputs(path, as_text=False, keep=False) as outputs:
        outputs.add(request(1), np.array([5]))
    assert [row["line"] for row in lines_of(path)] == [1]


@pytest.mark.parametrize("line", ["something else", "[]", '{"row": 1}', '{"line": "x"}'])
def test_a_file_of_something_else_is_refused_and_left_alone(tmp_path, line):
    path = tmp_path / "out.jsonl"
    path.write_text(f'{{"line": 4}}\n{line}\n')
    with (
        pytest.raises(ValueError, match=r"out.jsonl, line 2: not written by jax-eplb run"),
        open_outputs(path, as_text=False, keep=True),
    ):
        pass
    assert path.read_text() == f'{{"line": 4}}\n{line}\n'
