import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from tests.processes import light_environment

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def code_cells(path):
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def test_there_are_notebooks():
    assert {path.name for path in NOTEBOOKS} == {"layer.ipynb", "planner.ipynb"}


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_and_prints_the_words_committed(path, tmp_path):
    # In a process of its own: the kernel's own warnings are not this project's.
    command = ["-m", "nbconvert", "--to", "notebook", "--execute", "--output-dir", str(tmp_path)]
    environment = light_environment() | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, *command, str(path)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for now, committed in zip(code_cells(tmp_path / path.name), code_cells(path), strict=True):
        assert told(now) == told(committed)


def told(cell):
    """A cell's words, whose figures another processor may round otherwise, and what it showed."""
    text = "".join(output.get("text", "") for output in cell.outputs)  # in how many pieces, varies
    shown = [sorted(output["data"]) for output in cell.outputs if "data" in output]
    return re.findall("[A-Za-z_]+", text), shown


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_outputs_are_whole_small_and_say_nothing_of_the_machine(path):
    cells = code_cells(path)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert any("image/png" in o.get("data", {}) for cell in cells for o in cell.outputs)
    text = path.read_text()
    assert len(text) < 300_000
    assert str(ROOT) not in text
    assert "/tmp" not in text
