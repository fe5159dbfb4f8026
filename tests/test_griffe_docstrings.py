"""What the API pages make of docstrings; only where the extra `docs` is installed."""

import pytest

pytest.importorskip("griffe")

from griffe_docstrings import as_markdown


def test_doctests_become_code_and_arguments_a_list():
    text = "Add.\n\na: one\n    number\nb, c: others\n\n>>> add(1, 2)\n3\n\nSee: the\nsum."
    assert as_markdown(text).split("\n\n") == [
        "Add.",
        "- **a**: one\n    number\n- **b, c**: others",
        "```python\n>>> add(1, 2)\n3\n```",
        "See: the\nsum.",
    ]
