"""docs/cli.md has every command and option of the parser, and no other."""

import argparse
import re
from pathlib import Path

import pytest

from jax_eplb.cli import build_parser
from jax_eplb.commands.inputs import add_recording_options

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "cli.md").read_text()
(SUBPARSERS,) = (a for a in build_parser()._actions if a.dest == "command")
COMMANDS: dict[str, argparse.ArgumentParser] = SUBPARSERS.choices


def sections() -> dict[str, str]:
    """The page's text by its headings."""
    parts = re.split(r"^## (.+)$", PAGE, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def named(section: str) -> set[str]:
    """The options in the first cells of a section's tables."""
    cells = re.findall(r"^\| (`-.*?) \|", section, re.MULTILINE)
    return {option for cell in cells for option in re.findall(r"`(--?[\w-]+)", cell)}


def options_of(parser: argparse.ArgumentParser) -> set[str]:
    return {o for action in parser._actions for o in action.option_strings} - {"-h", "--help"}


def recording_options() -> set[str]:
    parser = argparse.ArgumentParser()
    add_recording_options(parser)
    return options_of(parser)


def test_every_command_has_a_section_and_a_row():
    assert set(sections()) == {"Recordings"} | {f"jax-eplb {name}" for name in COMMANDS}
    rows = re.findall(r"^\| \[(\w+)\]\(#jax-eplb-(\w+)\)", PAGE, re.MULTILINE)
    assert {name for name, anchor in rows if name == anchor} == set(COMMANDS)


def test_the_options_of_recordings_are_those_that_commands_share():
    assert named(sections()["Recordings"]) == recording_options()
    sharing = {name for name, each in COMMANDS.items() if "--iter-start" in options_of(each)}
    first = sections()["Recordings"].split(" take a recording")[0]
    assert set(re.findall(r"`(\w+)`", first)) == sharing


@pytest.mark.parametrize("command", COMMANDS)
def test_a_section_has_the_options_of_its_command(command):
    options = options_of(COMMANDS[command])
    if "--iter-start" in options:
        options -= recording_options()
    assert named(sections()[f"jax-eplb {command}"]) == options
