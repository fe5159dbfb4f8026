"""Prepare the training text of the byte-level model: Python, prose, the Bible, maths.

    python scripts/prepare_text.py --out data/text --samples jax_eplb/models/samples

For each kind it writes KIND.train.bin and KIND.heldout.bin (UTF-8, a zero byte after each
document) and manifest.json. A document goes to training or to held-out as a whole. The same sources
and the same seed give the same bytes.
"""

import argparse
import hashlib
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import maths_problems
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from text_samples import write_samples
from text_sources import (
    DOCS,
    Document,
    bible_documents,
    extra_documents,
    prose_documents,
    python_documents,
)

KINDS = {
    "python": ("PSF-2.0", "sources of the standard library of Python {version}"),
    "prose": ("PSF-2.0", "reStructuredText sources of Python's documentation"),
    "bible": ("public domain", "King James Bible, Debian packages bible-kjv and bible-kjv-text"),
    "maths": ("Apache-2.0", "word problems of scripts/maths_problems.py"),
}


def split(
    documents: Sequence[Document], kind: str, seed: int, train_bytes: int, heldout_bytes: int
) -> tuple[list[Document], list[Document]]:
    """Divide documents into training and held-out ones, both in shuffled order.

    Held-out takes documents of at most a sixth of `heldout_bytes` until it has that much; training
    takes what fits into `train_bytes`. Raises ValueError where held-out cannot be filled.
    """
    order = list(documents)
    # By text, not by a tuple: the hash of a tuple of text changes from run to run.
    random.Random(f"{kind} {seed}").shuffle(order)
    train, heldout, held, trained = [], [], 0, 0
    for document in order:
        size = len(document.text) + 1
        if held < heldout_bytes and size <= heldout_bytes // 6:
            heldout.append(document)
            held += size
        elif trained + size <= train_bytes:
            train.append(document)
            trained += size
    if held < heldout_bytes:
        raise ValueError(
            f"{kind}: its documents give {held} held-out bytes, not {heldout_bytes}; ask for fewer"
        )
    return train, heldout


def maths_split(
    seed: int, train_bytes: int, heldout_bytes: int
) -> tuple[list[Document], list[Document]]:
    """Draw training and held-out problems from two seeds; no question occurs twice."""
    taken: set[str] = set()
    sides = []
    for side, size in (("heldout", heldout_bytes), ("train", train_bytes)):
        texts = maths_problems.take_bytes(f"{side} {seed}", size, taken)
        sides.append([Document(f"{side}#{i}", text.encode()) for i, text in enumerate(texts)])
    heldout, train = sides
    return train, heldout


def write_side(path: Path, documents: Sequence[Document]) -> dict:
    """Write documents with a zero byte after each; return the file's entry in the manifest."""
    data = b"".join(document.text + b"\0" for document in documents)
    path.write_bytes(data)
    return {
        "file": path.name,
        "bytes": len(data),
        "documents": len(documents),
        "sha256": hashlib.sha256(data).hexdigest(),
    }


def read_kind(kind: str, options: argparse.Namespace) -> tuple[list[Document], list[Document]]:
    """Read one kind's sources and divide them."""
    if kind == "maths":
        return maths_split(options.seed, options.maths_bytes, options.heldout_bytes)
    documents = {
        "python": lambda: python_documents(options.python_dir),
        "prose": lambda: prose_documents(options.prose_dir),
        "bible": bible_documents,
    }[kind]()
    return split(documents, kind, options.seed, options.bytes_per_kind, options.heldout_bytes)


def describe(kind: str, extras: Sequence[Path]) -> dict:
    """Say where a kind's text comes from and under which licence."""
    licence, source = KINDS.get(kind, ("of the files named in extra", "none"))
    version = ".".join(map(str, sys.version_info[:3]))
    entry = {"licence": licence, "source": source.format(version=version)}
    return entry | ({"extra": [path.name for path in extras]} if extras else {})


def prepare(options: argparse.Namespace, console: Console) -> dict:
    """Write all text files, the samples where asked for, and the manifest; return the manifest."""
    options.out.mkdir(parents=True, exist_ok=True)
    extras: dict[str, list[Path]] = {}
    for kind, path in options.extra:
        extras.setdefault(kind, []).append(path)
    kinds = [*KINDS, *sorted(set(extras) - set(KINDS))]
    manifest: dict = {
        "seed": options.seed,
        "separator": "a zero byte after each document",
        "kinds": {},
    }
    heldouts = {}
    columns = (
        TextColumn("{task.description:28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("reading", total=len(kinds))
        for kind in kinds:
            progress.update(task, description=f"preparing {kind}")
            train, heldout = read_kind(kind, options) if kind in KINDS else ([], [])
            added = [
                document for path in extras.get(kind, ()) for document in extra_documents(path)
            ]
            if added:
                train = train + added
                random.Random(f"extra {kind} {options.seed}").shuffle(train)
            entry = describe(kind, extras.get(kind, ()))
            entry["train"] = write_side(options.out / f"{kind}.train.bin", train)
            if heldout:
                entry["heldout"] = write_side(options.out / f"{kind}.heldout.bin", heldout)
                if kind != "maths":
                    entry["heldout"]["names"] = [document.name for document in heldout]
                heldouts[kind] = heldout
            manifest["kinds"][kind] = entry
            progress.advance(task)
        progress.update(task, description="done")
    if options.samples:
        manifest["samples"] = write_samples(options.samples, heldouts, options.sample_bytes)
    text = json.dumps(manifest, indent=1, ensure_ascii=False)
    (options.out / "manifest.json").write_text(text + "\n", encoding="utf-8")
    return manifest


def print_table(manifest: dict, console: Console) -> None:
    """Print the sizes by kind."""
    table = Table(title="text, in bytes")
    for name in ("kind", "licence", "train", "documents", "held out", "documents"):
        table.add_column(name, justify="left" if name in ("kind", "licence") else "right")
    total = {"train": 0, "heldout": 0}
    for kind, entry in manifest["kinds"].items():
        cells = []
        for side in total:
            part = entry.get(side, {"bytes": 0, "documents": 0})
            total[side] += part["bytes"]
            cells += [f"{part['bytes']:,}", f"{part['documents']:,}"]
        table.add_row(kind, entry["licence"], *cells)
    table.add_section()
    table.add_row("total", "", f"{total['train']:,}", "", f"{total['heldout']:,}", "")
    console.print(table)


def extra(text: str) -> tuple[str, Path]:
    """Parse KIND=FILE."""
    kind, equals, path = text.partition("=")
    if not (equals and path and kind.isidentifier()):
        raise argparse.ArgumentTypeError(f"{text!r} is not KIND=FILE, such as drama=plays.txt")
    return kind, Path(path)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for the text and manifest.json"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the division and of the maths problems"
    )
    parser.add_argument(
        "--bytes-per-kind",
        type=int,
        default=15_000_000,
        help="most training bytes of python, prose, bible",
    )
    parser.add_argument(
        "--maths-bytes", type=int, default=8_000_000, help="training bytes of maths problems"
    )
    parser.add_argument(
        "--heldout-bytes", type=int, default=400_000, help="least held-out bytes of a kind"
    )
    parser.add_argument(
        "--python-dir", type=Path, help="Python sources (default: this Python's library)"
    )
    parser.add_argument(
        "--prose-dir", type=Path, default=DOCS, help=f"documentation sources (default: {DOCS})"
    )
    parser.add_argument(
        "--extra",
        type=extra,
        action="append",
        default=[],
        metavar="KIND=FILE",
        help="add a text file to a kind's training text, or to a new kind's; may be repeated",
    )
    parser.add_argument(
        "--samples", type=Path, help="write small held-out samples and LICENSES.md here"
    )
    parser.add_argument("--sample-bytes", type=int, default=80_000, help="bytes of a sample, about")
    parser.add_argument(
        "--json", action="store_true", help="print the manifest as JSON, and no table"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prepare the text; return the exit status."""
    options = parse(arguments)
    console = Console(stderr=options.json)
    try:
        manifest = prepare(options, console)
    except ValueError as error:
        print(f"prepare_text: {error}", file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps(manifest, ensure_ascii=False))
    else:
        print_table(manifest, console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
