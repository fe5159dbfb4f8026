"""An extension of griffe for the API pages: this project's docstrings as Markdown.

Doctests become blocks of code; lines such as "name: what it is", with what belongs to them indented
below, become a list.
"""

import re
from typing import Any

import griffe  # pyright: ignore[reportMissingImports]  (of the extra `docs`)

_ARGUMENT = re.compile(r"^(`?[\w.]+`?(?:, `?[\w.]+`?)*): ")


class Docstrings(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(text: str) -> str:
    """The docstring, paragraph by paragraph."""
    return "\n\n".join(_paragraph(each) for each in re.split(r"\n{2,}", text.strip()))


def _paragraph(text: str) -> str:
    if text.startswith(">>> "):
        return f"```python\n{text}\n```"
    lines = text.split("\n")
    if all(_ARGUMENT.match(line) or line.startswith("    ") for line in lines):
        return "\n".join(_ARGUMENT.sub(r"- **\1**: ", line) for line in lines)
    return text
