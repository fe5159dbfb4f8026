"""Write the small held-out samples that the package carries, and the licences they are under."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from text_sources import Document, psf_licence

_LICENCES = """# The sample texts

Four small texts that the byte-level model has not been trained on, for demonstrations and tests.
Each file is UTF-8; a zero byte ends each document. `scripts/prepare_text.py --samples` writes them.
They are whole documents, unchanged, taken out of the works named below.

| file | origin | licence |
| --- | --- | --- |
| `python.txt` | files of Python's standard library | PSF-2.0, text below |
| `prose.txt` | source files of Python's documentation | PSF-2.0, text below; its \
code examples also 0BSD |
| `bible.txt` | King James Bible, from Debian's package bible-kjv-text | public domain \
(in the United Kingdom the Crown holds letters patent on printing it) |
| `maths.txt` | word problems drawn by `scripts/maths_problems.py` of this project | Apache-2.0 |

Documents in `python.txt`: {python}.

Documents in `prose.txt`: {prose}.

Documents in `bible.txt`: {bible}.

Python and its documentation: Copyright (c) 2001-2023 Python Software Foundation;
All Rights Reserved. Changes made to them: none beyond the choice of files and the zero byte after
each.

## Licence of Python and of its documentation

```text
{licence}
```
"""


def choose(documents: Sequence[Document], size: int) -> list[Document]:
    """Take whole documents, in order, until they hold `size` bytes; none may pass 5/4 of it.

    Documents with a copyright notice of their own stay out, so that one licence covers each sample.
    Raises ValueError where the documents do not reach 4/5 of `size`.
    """
    chosen, total = [], 0
    for document in documents:
        if total >= size:
            break
        fits = total + len(document.text) + 1 <= size * 5 // 4
        if fits and b"copyright" not in document.text.lower():
            chosen.append(document)
            total += len(document.text) + 1
    if total < size * 4 // 5:
        raise ValueError(
            f"the held-out documents give a sample of {total} bytes, not {size}; hold out more"
        )
    return chosen


def write_samples(
    folder: Path, heldouts: Mapping[str, Sequence[Document]], size: int
) -> dict[str, int]:
    """Write KIND.txt for each kind and LICENSES.md; return the bytes of each sample."""
    folder.mkdir(parents=True, exist_ok=True)
    names, sizes = {}, {}
    for kind, documents in heldouts.items():
        chosen = choose(documents, size)
        data = b"".join(document.text + b"\0" for document in chosen)
        (folder / f"{kind}.txt").write_bytes(data)
        names[kind] = ", ".join(document.name for document in chosen)
        sizes[kind] = len(data)
    text = _LICENCES.format(
        licence=psf_licence().strip(), **{k: names[k] for k in ("python", "prose", "bible")}
    )
    (folder / "LICENSES.md").write_text(text, encoding="utf-8")
    return sizes
