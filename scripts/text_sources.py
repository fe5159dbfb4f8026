"""The documents that the training text is made of: Python, its documentation, the King James Bible.

A document is a name and its text in UTF-8; every source gives its documents in a fixed order.
"""

import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

DOCS = Path("/usr/share/doc/python3.11/html/_sources")
BIBLE_BOOKS = """Genesis|Exodus|Leviticus|Numbers|Deuteronomy|Joshua|Judges|Ruth|1 Samuel|2 Samuel
1 Kings|2 Kings|1 Chronicles|2 Chronicles|Ezra|Nehemiah|Esther|Job|Psalms|Proverbs|Ecclesiastes
The Song of Solomon|Isaiah|Jeremiah|Lamentations|Ezekiel|Daniel|Hosea|Joel|Amos|Obadiah|Jonah|Micah
Nahum|Habakkuk|Zephaniah|Haggai|Zechariah|Malachi|Matthew|Mark|Luke|John|The Acts|Romans
1 Corinthians|2 Corinthians|Galatians|Ephesians|Philippians|Colossians|1 Thessalonians
2 Thessalonians|1 Timothy|2 Timothy|Titus|Philemon|Hebrews|James|1 Peter|2 Peter|1 John|2 John
3 John|Jude|Revelation""".replace("\n", "|").split("|")
# Tests and tables: the first are no typical code, the second no code at all.
SKIPPED_FOLDERS = {"site-packages", "test", "tests", "idle_test", "encodings", "__pycache__"}
SKIPPED = re.compile(r"^(pydoc_data/topics\.py|html/entities\.py|_sysconfigdata_.*|config-.*/.*)$")
_VERSE = re.compile(r"(\d?[A-Za-z]+)(\d+:\d+) (.*)")


class Document(NamedTuple):
    """A text that is never divided between training and held-out."""

    name: str
    text: bytes


def read_documents(folder: Path, paths: list[Path]) -> list[Document]:
    """Read files as documents named by their path below `folder`.

    Files of under 200 bytes, in another encoding than UTF-8, or met before, are left out.
    """
    documents, seen = [], set()
    for path in sorted(paths):
        text = path.read_bytes().replace(b"\r\n", b"\n")
        try:
            text.decode("utf-8")
        except UnicodeDecodeError:
            continue
        # An empty __init__.py teaches nothing; a zero byte is the separator.
        if len(text) < 200 or b"\0" in text or text in seen:
            continue
        seen.add(text)
        documents.append(Document(path.relative_to(folder).as_posix(), text))
    return documents


def python_documents(folder: Path | None = None) -> list[Document]:
    """Read the sources of the standard library of the running interpreter.

    Raises ValueError where the library has no sources (some systems ship it compiled).
    """
    folder = folder or Path(sysconfig.get_path("stdlib"))
    paths = []
    for path in folder.rglob("*.py"):
        name = path.relative_to(folder)
        if SKIPPED_FOLDERS.isdisjoint(name.parts[:-1]) and not SKIPPED.search(name.as_posix()):
            paths.append(path)
    if not paths:
        raise ValueError(
            f"{folder} holds no Python sources; run with an interpreter that has its library as "
            ".py files"
        )
    return read_documents(folder, paths)


def prose_documents(folder: Path = DOCS) -> list[Document]:
    """Read the reStructuredText sources (`*.rst.txt`, or `*.rst`) of Python's documentation.

    Raises ValueError, with what to install, where there are none.
    """
    paths = [*folder.rglob("*.rst.txt"), *folder.rglob("*.rst")] if folder.is_dir() else []
    if not paths:
        raise ValueError(
            f"{folder} holds no .rst.txt files. On Debian 12: apt-get install python3.11-doc; "
            "elsewhere "
            "unpack the sources of Python's documentation and name their folder with --prose-dir"
        )
    return read_documents(folder, paths)


def parse_bible(printed: str) -> list[Document]:
    """Make a document of each book from verses printed one a line as `Ge1:1 In the beginning ...`.

    >>> parse_bible("Ge1:1 In the beginning.\\nGe1:2 And the earth.\\nEx1:1 Now these.\\n")[0].text
    b'Genesis\\n\\n1:1 In the beginning.\\n1:2 And the earth.\\n'

    Raises ValueError on a line that is no verse.
    """
    books: dict[str, list[str]] = {}
    for number, line in enumerate(printed.splitlines(), 1):
        verse = _VERSE.fullmatch(line.strip())
        if verse is None:
            raise ValueError(
                f"line {number} of the Bible is no verse: {line!r}; expected 'Ge1:1 In the ...'"
            )
        books.setdefault(verse[1], []).append(f"{verse[2]} {verse[3]}\n")
    if len(books) > len(BIBLE_BOOKS):
        raise ValueError(
            f"{len(books)} books printed, the King James Bible has {len(BIBLE_BOOKS)}: "
            f"{list(books)}"
        )
    return [
        Document(name, f"{name}\n\n{''.join(verses)}".encode())
        for name, verses in zip(BIBLE_BOOKS, books.values(), strict=False)
    ]


def bible_documents() -> list[Document]:
    """Print the King James Bible with Debian's program `bible`, one document a book.

    Raises ValueError, with what to install, where the program is missing or prints too little.
    """
    program = shutil.which("bible")
    if program is None:
        raise ValueError(
            "the program `bible` is missing. On Debian: apt-get install bible-kjv bible-kjv-text"
        )
    command = [program, "-f", "Gen1:1-Rev22:21"]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    books = parse_bible(done.stdout)
    if done.returncode or len(books) != len(BIBLE_BOOKS):
        raise ValueError(
            f"{' '.join(command)} printed {len(books)} of 66 books: {done.stderr.strip()}"
        )
    return books


def extra_documents(path: Path) -> list[Document]:
    """Read a plain text file as documents: parted at zero bytes and before lines `Question:`.

    Raises ValueError where the file is missing or no UTF-8.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; --extra takes KIND=FILE") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}; convert it first") from None
    parts = re.split(r"\0|\n\n(?=Question:)", text)
    parts = [part.strip("\n") + "\n" for part in parts if part.strip()]
    return [Document(f"{path.name}#{i}", part.encode()) for i, part in enumerate(parts)]


def psf_licence() -> str:
    """Read the licence of the running Python.

    Raises ValueError where the file is missing.
    """
    places = [
        Path(sysconfig.get_path("stdlib")) / "LICENSE.txt",
        Path(sys.base_prefix) / "LICENSE.txt",
    ]
    places += [Path(sys.base_prefix) / "LICENSE", Path("/usr/share/doc/python3.11/copyright")]
    for place in places:
        if place.is_file():
            return place.read_text(encoding="utf-8")
    raise ValueError(
        f"Python's licence is in none of {', '.join(map(str, places))}; samples need it beside them"
    )
