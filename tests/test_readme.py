"""What the README shows is what happens."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import light_environment

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()


@pytest.mark.slow
def test_the_example_prints_what_it_says(tmp_path):
    (code,) = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    script = tmp_path / "example.py"
    script.write_text(code)
    environment = light_environment()
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    printed = [line.split(":")[1].strip() for line in run.stdout.splitlines()]
    assert printed == re.findall(r"^print.*# (.*)$", code, re.MULTILINE)


def test_every_command_of_the_table_exists():
    from jax_eplb.cli import build_parser

    named = set(re.findall(r"^\| `jax-eplb (\w+)", README, re.MULTILINE))
    (commands,) = (a.choices for a in build_parser()._actions if a.dest == "command")
    assert named == set(commands or ())


def test_the_relative_links_lead_somewhere():
    root = Path(__file__).resolve().parents[1]
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", README)
    assert links
    for link in links:
        assert (root / link).exists(), link
