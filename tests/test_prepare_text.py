"""The training text: whole documents on one side only, the same bytes again, licences named."""

import doctest
import hashlib
import importlib
import json
import stat
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
prepare_text = importlib.import_module("prepare_text")
samples = importlib.import_module("text_samples")
sources = importlib.import_module("text_sources")
SAMPLES = ROOT / "jax_eplb" / "models" / "samples"
KINDS = ("python", "prose", "bible", "maths")


def printed_bible() -> str:
    """Verses in the form of the program `bible`: 66 books of 20 verses."""
    lines = []
    for book in range(66):
        mark = (
            "BC"[book // 26 % 2] + chr(97 + book % 26)
            if book < 52
            else f"{book % 3 + 1}J{chr(97 + book // 3)}"
        )
        lines += [f"{mark}1:{verse} And in book {book} verse {verse}." for verse in range(1, 21)]
    return "\n".join(lines) + "\n"


@pytest.fixture
def places(tmp_path, monkeypatch):
    """Small sources of every kind: folders, and a program `bible` of our own on the path."""
    for kind, ending in (("python", ".py"), ("prose", ".rst.txt")):
        (tmp_path / kind).mkdir()
        for i in range(40):
            (tmp_path / kind / f"{i:02}{ending}").write_text(f"# {kind} {i}\n" * (20 + i))
    program = tmp_path / "bin" / "bible"
    program.parent.mkdir()
    (tmp_path / "printed").write_text(printed_bible())
    program.write_text(
        f"#!/bin/sh\nwhile read -r line; do echo \"$line\"; done < '{tmp_path}/printed'\n"
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(program.parent))
    return tmp_path


def run(places, out, *more):
    """Prepare small text with `more` arguments; return the exit status."""
    folders = ["--python-dir", str(places / "python"), "--prose-dir", str(places / "prose")]
    sizes = ["--heldout-bytes", "5000", "--maths-bytes", "20000", "--sample-bytes", "3000"]
    return prepare_text.main(["--out", str(places / out), *folders, *sizes, *more])


def documents(path: Path) -> list[bytes]:
    """Divide a file at its zero bytes."""
    data = path.read_bytes()
    assert data.endswith(b"\0")
    return data[:-1].split(b"\0")


def test_each_kind_gets_both_sides_and_no_document_is_in_both(places):
    assert run(places, "out") == 0
    for kind in KINDS:
        train = documents(places / "out" / f"{kind}.train.bin")
        heldout = documents(places / "out" / f"{kind}.heldout.bin")
        assert not set(train) & set(heldout)
        assert sum(map(len, heldout)) + len(heldout) >= 5000


def test_documents_stay_whole(places):
    run(places, "out")
    kept = [
        d for side in ("train", "heldout") for d in documents(places / "out" / f"python.{side}.bin")
    ]
    assert sorted(kept) == sorted(path.read_bytes() for path in (places / "python").glob("*.py"))


def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(places):
    run(places, "one")
    run(places, "two")
    run(places, "three", "--seed", "1")
    for path in (places / "one").iterdir():
        assert path.read_bytes() == (places / "two" / path.name).read_bytes()
    for kind in KINDS:
        name = f"{kind}.heldout.bin"
        assert (places / "one" / name).read_bytes() != (places / "three" / name).read_bytes()


def test_manifest_names_sizes_digests_and_licences(places):
    run(places, "out")
    manifest = json.loads((places / "out" / "manifest.json").read_text())
    assert list(manifest["kinds"]) == list(KINDS)
    for kind, entry in manifest["kinds"].items():
        assert entry["licence"] == prepare_text.KINDS[kind][0]
        for side in ("train", "heldout"):
            data = (places / "out" / entry[side]["file"]).read_bytes()
            assert entry[side]["bytes"] == len(data)
            assert entry[side]["documents"] == data.count(b"\0")
            assert entry[side]["sha256"] == hashlib.sha256(data).hexdigest()


def test_json_prints_the_manifest_alone(places, capsys):
    assert run(places, "out", "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((places / "out" / "manifest.json").read_text())


def test_table_reports_every_kind(places, capsys):
    run(places, "out")
    table = capsys.readouterr().out
    assert all(word in table for word in (*KINDS, "total", "PSF-2.0", "public domain"))


def test_extra_text_is_trained_on_and_never_held_out(places):
    (places / "more.txt").write_text("Question: 1?\nAnswer: 1\n\nQuestion: 2?\nAnswer: 2\n")
    run(places, "plain")
    run(places, "out", "--extra", f"maths={places / 'more.txt'}")
    train = documents(places / "out" / "maths.train.bin")
    assert {b"Question: 1?\nAnswer: 1\n", b"Question: 2?\nAnswer: 2\n"} <= set(train)
    for kind in KINDS:
        name = f"{kind}.heldout.bin"
        assert (places / "plain" / name).read_bytes() == (places / "out" / name).read_bytes()


def test_extra_text_can_start_a_kind_that_is_only_trained_on(places):
    (places / "play.txt").write_text("Enter two clowns.\n")
    run(places, "out", "--extra", f"drama={places / 'play.txt'}")
    assert documents(places / "out" / "drama.train.bin") == [b"Enter two clowns.\n"]
    assert not (places / "out" / "drama.heldout.bin").exists()


@pytest.mark.parametrize("text", ["maths", "maths=", "=file", "two words=file"])
def test_an_extra_that_is_no_pair_is_refused(text, places, capsys):
    with pytest.raises(SystemExit):
        run(places, "out", "--extra", text)
    assert "is not KIND=FILE" in capsys.readouterr().err


def test_a_missing_extra_is_named(places, capsys):
    assert run(places, "out", "--extra", "maths=nowhere.txt") == 1
    assert "nowhere.txt: no such file" in capsys.readouterr().err


def test_an_extra_in_another_encoding_is_refused_with_its_place(places, capsys):
    (places / "odd.txt").write_bytes(b"caf\xe9\n")
    assert run(places, "out", "--extra", f"prose={places / 'odd.txt'}") == 1
    assert "not UTF-8 at byte 3" in capsys.readouterr().err


def test_missing_prose_says_what_to_install(places, capsys):
    assert run(places, "out", "--prose-dir", str(places / "none")) == 1
    message = capsys.readouterr().err
    assert "apt-get install python3.11-doc" in message
    assert "--prose-dir" in message


def test_missing_bible_says_what_to_install(places, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(places))
    assert run(places, "out") == 1
    assert "apt-get install bible-kjv bible-kjv-text" in capsys.readouterr().err


def test_a_short_bible_is_refused(places, capsys):
    (places / "printed").write_text("Ge1:1 In the beginning.\n")
    assert run(places, "out") == 1
    assert "printed 1 of 66 books" in capsys.readouterr().err


def test_a_line_that_is_no_verse_is_refused():
    with pytest.raises(ValueError, match=r"line 2 of the Bible is no verse: 'Genesis 1'"):
        sources.parse_bible("Ge1:1 In the beginning.\nGenesis 1\n")


def test_books_with_numbers_in_their_marks_are_kept_apart():
    books = sources.parse_bible(printed_bible())
    assert [book.name for book in books] == sources.BIBLE_BOOKS
    assert books[60].text.startswith(b"2 Peter\n\n1:1 And in book 60 verse 1.\n1:2 ")


def test_too_little_text_to_hold_out_is_refused(places, capsys):
    assert run(places, "out", "--heldout-bytes", "900000") == 1
    assert "held-out bytes, not 900000; ask for fewer" in capsys.readouterr().err


def test_training_text_is_capped():
    texts = [sources.Document(str(i), bytes([65 + i]) * 999) for i in range(26)]
    train, heldout = prepare_text.split(texts, "any", 0, train_bytes=5000, heldout_bytes=6000)
    assert (len(train), len(heldout)) == (5, 6)


def test_python_sources_leave_out_tests_tables_and_packages():
    names = [document.name for document in sources.python_documents()]
    assert {"argparse.py", "json/decoder.py", "asyncio/queues.py"} <= set(names)
    assert not [
        name
        for name in names
        if {"test", "tests", "idle_test", "site-packages", "encodings"} & set(name.split("/"))
        or name in ("pydoc_data/topics.py", "html/entities.py")
        or name.startswith("_sysconfigdata")
    ]


def test_short_repeated_and_foreign_files_are_left_out(tmp_path):
    (tmp_path / "short.py").write_bytes(b"x = 1\n")
    (tmp_path / "a.py").write_bytes(b"a = 1\r\n" * 50)
    (tmp_path / "b.py").write_bytes(b"a = 1\n" * 50)
    (tmp_path / "latin.py").write_bytes(b"# caf\xe9\n" * 50)
    (tmp_path / "zero.py").write_bytes(b"# \0\n" * 90)
    assert sources.python_documents(tmp_path) == [sources.Document("a.py", b"a = 1\n" * 50)]


def test_an_interpreter_without_sources_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no Python sources"):
        sources.python_documents(tmp_path)


def test_samples_are_held_out_documents_with_their_licences(places):
    assert run(places, "out", "--samples", str(places / "samples")) == 0
    licences = (places / "samples" / "LICENSES.md").read_text()
    assert "PYTHON SOFTWARE FOUNDATION LICENSE" in licences
    for kind in KINDS:
        chosen = documents(places / "samples" / f"{kind}.txt")
        assert set(chosen) <= set(documents(places / "out" / f"{kind}.heldout.bin"))
        assert f"`{kind}.txt`" in licences


def test_samples_leave_out_documents_with_a_notice_of_their_own():
    texts = [
        sources.Document("own", b"# Copyright 1999 Ann\n" * 10),
        sources.Document("psf", b"x\n" * 50),
    ]
    assert samples.choose(texts, 100) == texts[1:]


def test_a_sample_that_cannot_be_filled_is_refused():
    with pytest.raises(ValueError, match="give a sample of 0 bytes, not 100"):
        samples.choose([], 100)


@pytest.mark.parametrize("kind", KINDS)
def test_committed_samples_hold_text_of_64_to_100_kilobytes(kind):
    data = (SAMPLES / f"{kind}.txt").read_bytes()
    assert 64_000 <= len(data) <= 100_000
    assert data.endswith(b"\0")
    data.decode("utf-8")


def test_committed_licences_name_every_sample():
    licences = (SAMPLES / "LICENSES.md").read_text(encoding="utf-8")
    assert "PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2" in licences
    assert "public domain" in licences
    assert all(f"`{path.name}`" in licences for path in SAMPLES.glob("*.txt"))


def test_committed_bible_has_its_verses_under_the_right_book():
    books = {text.partition(b"\n")[0]: text for text in documents(SAMPLES / "bible.txt")}
    assert b"1:1 The vision of Obadiah." in books[b"Obadiah"]
    assert b"1:1 How doth the city sit solitary" in books[b"Lamentations"]
    assert b"unto the wellbeloved Gaius" in books[b"3 John"]


def test_doctests_hold():
    result = doctest.testmod(sources)
    assert result.attempted
    assert not result.failed
