"""Imports point one way: a module knows only what stands below it."""

import ast
from pathlib import Path

import pytest

import jax_eplb

ROOT = Path(jax_eplb.__file__).parent
FOUNDATION = {"tables", "placement", "load", "split", "metrics", "mesh"}
LAYER = {"tables", "placement", "load", "mesh", "kernels", "routing", "moving", "moe", "checkpoint"}
# A part of the package, and all the parts that it may import; itself goes without saying.
MAY_IMPORT = {
    "homes": set(),
    "linear_algebra": set(),
    "tables": {"homes", "linear_algebra"},
    "placement": {"tables"},
    "mesh": set(),
    "load": {"tables", "placement"},
    "split": {"linear_algebra", "tables", "placement", "load"},
    "metrics": {"tables", "placement", "load", "split"},
    "kernels": set(),
    "planner": FOUNDATION - {"mesh"} | {"linear_algebra"},
    "routing": FOUNDATION - {"mesh"} | {"kernels"},
    "moving": {"tables", "placement", "mesh"},
    "moe": FOUNDATION | {"kernels", "routing", "moving"},
    "online": FOUNDATION | {"planner", "kernels", "routing", "moving"},
    "checkpoint": FOUNDATION | {"moving"},
    "formats": FOUNDATION - {"mesh"},
    "models": FOUNDATION | LAYER,
    "report": FOUNDATION | {"planner", "formats"},
    "plot": FOUNDATION | {"planner", "formats", "report"},
    "simulate": FOUNDATION | {"planner", "formats", "online", "report", "plot"},
    "report_page": FOUNDATION | {"report", "plot", "simulate"},
    "serving": FOUNDATION | LAYER | {"planner", "formats", "online", "models"},
}
# These two may import everything but each other's callers.
TOP = {"__init__", "__main__", "cli", "commands"}


def part_of(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported_parts(path):
    """The parts of the package that a module imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide their direction"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    own = [name.split(".") for name in found if name.split(".")[0] == "jax_eplb"]
    return {name[1] if len(name) > 1 else "__init__" for name in own}


MODULES = sorted(ROOT.rglob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_what_stands_below_it(path):
    part = part_of(path)
    if part in TOP:
        if part != "__main__" and part != "cli":
            assert not imported_parts(path) & {"cli", "__main__"}
        return
    assert part in MAY_IMPORT, f"say in this test what {part} may import"
    assert imported_parts(path) - {part} <= MAY_IMPORT[part]


def test_planner_and_layer_do_not_know_each_other():
    reach = {part: set(below) for part, below in MAY_IMPORT.items()}
    for part in ("planner", "moe"):
        while True:
            further = set().union(*(reach[below] for below in reach[part])) - reach[part]
            if not further:
                break
            reach[part] |= further
    assert not reach["planner"] & {"moe", "kernels", "models", "serving"}
    assert not reach["moe"] & {"planner", "online", "models", "serving", "formats"}


def test_the_order_has_no_circle():
    left = {part: set(below) for part, below in MAY_IMPORT.items()}
    while left:
        free = [part for part, below in left.items() if not below & set(left)]
        assert free, f"a circle among {sorted(left)}"
        for part in free:
            del left[part]
