"""The examples of docs/ do what they say, and its links lead somewhere."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import light_environment

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGES = sorted(DOCS.rglob("*.md"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("page", "blocks"), [("layer.md", 1), ("checkpoints.md", 1), ("own_model.md", 4)]
)
def test_the_examples_print_what_they_say(tmp_path, page, blocks):
    found = re.findall(r"^```python\n(.*?)^```$", (DOCS / page).read_text(), re.M | re.S)
    code = "".join(found[:blocks])
    script = tmp_path / "example.py"
    script.write_text(code)
    environment = light_environment() | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4"}
    run = subprocess.run(
        [sys.executable, script],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        cwd=tmp_path,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == re.findall(r"^print.*# (.*)$", code, re.M)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_the_relative_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        assert link.startswith("http") or (page.parent / link).exists(), link
