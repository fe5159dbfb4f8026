import json
import re

import numpy as np
import pytest

from jax_eplb.serving import Request, read_requests


def read(tmp_path, *lines, vocab_size=256, max_length=20):
    path = tmp_path / "requests.jsonl"
    path.write_bytes("\n".join(lines).encode())
    return read_requests(path, vocab_size=vocab_size, max_length=max_length)


def test_text_becomes_bytes_and_ids_stay(tmp_path):
    made = read(
        tmp_path,
        '{"prompt": "aé", "output_length": 2}',
        "",
        '{"token_ids": [0, 255], "output_length": 1}',
        '{"task_id": 7, "input_ids": [5], "output_tokens": 3}',
    )
    assert [r.prompt.tolist() for r in made] == [[97, 195, 169], [0, 255], [5]]
    assert [r.output_length for r in made] == [2, 1, 3]
    assert [r.seed for r in made] == [1, 3, 4]  # the lines' numbers
    assert all(r.prompt.dtype == np.int32 for r in made)


def test_separators_of_lines_inside_a_text_do_not_end_the_line(tmp_path):
    text = "a\u2028b\x85c"
    line = json.dumps({"prompt": text, "output_length": 1}, ensure_ascii=False)
    (made,) = read(tmp_path, line + "\r", "")
    assert made.prompt.tolist() == list(text.encode())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON ("),
        ('{"prompt": "a", "output_length": 1' + "0" * 5000 + "}", "not JSON that can be read"),
        ("[1, 2]", "expected an object, found list"),
        ('{"output_length": 3}', "give a 'prompt' text or a list 'token_ids', not empty"),
        ('{"prompt": "", "output_length": 3}', "give a 'prompt' text or a list 'token_ids'"),
        ('{"token_ids": [], "output_length": 3}', "give a 'prompt' text or a list 'token_ids'"),
        ('{"token_ids": 5, "output_length": 3}', "give a 'prompt' text or a list 'token_ids'"),
        ('{"token_ids": [1, 256], "output_length": 3}', "token id 256 is not an integer of 0 to"),
        ('{"token_ids": [1, -1], "output_length": 3}', "token id -1 is not an integer of 0 to 255"),
        ('{"token_ids": [1.5], "output_length": 3}', "token id 1.5 is not an integer"),
        ('{"token_ids": [true], "output_length": 3}', "token id True is not an integer"),
        ('{"prompt": "a", "token_ids": [1], "output_length": 3}', "both a 'prompt' and token ids"),
        ('{"prompt": "\\ud800", "output_length": 3}', "'prompt' is no valid text"),
        ('{"prompt": "a"}', "'output_length' is None; give an integer of at least 1"),
        ('{"prompt": "a", "output_length": 0}', "'output_length' is 0; give an integer"),
        ('{"prompt": "a", "output_length": "3"}', "'output_length' is '3'; give an integer"),
        ('{"prompt": "a", "output_length": true}', "'output_length' is True; give an integer"),
        ('{"prompt": "abc", "output_length": 18}', "3 prompt and 18 output tokens exceed the"),
    ],
)
def test_a_faulty_line_is_named_with_its_fault(tmp_path, line, message):
    place = f"{tmp_path / 'requests.jsonl'}, line 2: "
    with pytest.raises(ValueError, match=re.escape(place + message)):
        read(tmp_path, '{"prompt": "a", "output_length": 3}', line)


def test_text_is_refused_where_tokens_are_not_bytes(tmp_path):
    line = '{"prompt": "a", "output_length": 3}'
    with pytest.raises(ValueError, match=r"line 1: 'prompt' is text, and this model's 300 tokens"):
        read(tmp_path, line, vocab_size=300)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"none\.jsonl: cannot be read \(No such file"):
        read_requests(tmp_path / "none.jsonl", vocab_size=256, max_length=9)
    with pytest.raises(ValueError, match=r"requests\.jsonl: holds no request"):
        read(tmp_path, "", "  ")
    path = tmp_path / "latin.jsonl"
    path.write_bytes('{"prompt": "é"}'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.jsonl: not UTF-8 text"):
        read_requests(path, vocab_size=256, max_length=9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], 3), "a prompt of shape (0,) and type float64; give a list of token ids, not empty"),
        (([[1]], 3), "a prompt of shape (1, 1)"),
        (([0.5], 3), "type float64"),
        (([1], 0), "output_length is 0; it must be at least 1"),
        (([1], 1, 2**31), "seed is 2147483648; use 0 to 2147483647"),
        (([1], 1, -1), "seed is -1"),
    ],
)
def test_an_impossible_request_cannot_be_made(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Request(*arguments)
