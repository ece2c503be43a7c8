"""The shape of the house: imports run downwards, public names exist, the documentation names what there is."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

import efficientai_toolkit

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "efficientai_toolkit"
# From the roof down. Rooms of one storey may not import each other.
STOREYS = [
    ["__main__", "cli"],
    ["recipes"],
    ["continual", "search"],
    ["runs"],
    ["learners"],
    ["backbones", "adapters"],
    ["tasks"],
    ["nn", "optimizers"],
    ["checkpoint", "config", "devices", "logging", "pretrained"],
    ["files", "intervals", "precision", "settings", "yaml_file"],
    ["errors"],
]
# Within a storey: who may use whom.
SIBLINGS = {("adapters", "backbones"), ("nn", "optimizers"), ("config", "devices"), ("__main__", "cli")}
LEVEL = {room: level for level, rooms in enumerate(STOREYS) for room in rooms}


def room_of(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    package = ["efficientai_toolkit", *path.relative_to(PACKAGE).parts[:-1]]
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            names = [node.module] if node.module else [alias.name for alias in node.names]
            rooms |= {([*base, *name.split(".")])[1] for name in names if len(base) + len(name.split(".")) > 1}
    return rooms


SOURCES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.name != "__init__.py")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_downwards(path):
    room = room_of(path)
    assert room in LEVEL, f"the room {room!r} is on no storey"
    for other in imported_rooms(path) - {room, "__version__"}:
        allowed = LEVEL[room] < LEVEL[other] or (room, other) in SIBLINGS
        assert allowed, f"{room} must not import {other}: imports run downwards"


def imported_modules(path: Path) -> set[Path]:
    """Files of the package that `path` imports, within functions too, but for what only type checkers read."""
    tree, found = ast.parse(path.read_text(encoding="utf-8")), set()
    guards = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)]
    unread = {id(node) for guard in guards for node in ast.walk(guard)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or not node.level or id(node) in unread:
            continue
        base = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
        for alias in node.names:
            places = (base / f"{alias.name}.py", base / alias.name / "__init__.py")
            places += (base.with_suffix(".py"), base / "__init__.py")
            found |= {next((place for place in places if place.is_file()), path)}
    return found - {path}


def test_imports_make_no_circle():
    graph = {path: imported_modules(path) for path in PACKAGE.rglob("*.py")}
    assert graph[PACKAGE / "adapters" / "select.py"] >= {PACKAGE / "adapters" / "base.py", PACKAGE / "errors.py"}
    order = graphlib.TopologicalSorter(graph).static_order()  # a CycleError names the files
    assert set(order) == set(graph)


@pytest.mark.parametrize("name", efficientai_toolkit.__all__)
def test_every_public_name_can_be_imported(name):
    assert getattr(efficientai_toolkit, name) is not None


def test_the_root_imports_nothing_heavy():
    code = (
        "import sys, efficientai_toolkit; "
        "heavy = {'mlx', 'numpy', 'matplotlib', 'pydantic', 'typer', 'rich', 'yaml'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_ci_runs_the_commands_of_the_readme():
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = [line for line in script.splitlines() if line.startswith("(command -v uv")]
    assert len(lines) == 2
    for line in lines:
        assert line in readme, f"the README does not have the line {line!r}"


def test_ci_runs_the_examples_of_the_readme():
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = [line.split("  #")[0].strip() for line in readme.splitlines() if line.startswith("uv run python examples/")]
    assert len(lines) == len(list((ROOT / "examples").glob("*.py")))
    for line in lines:
        assert line in script, f".ci/run does not have the line {line!r}"


def test_the_api_page_and_the_stub_are_current():
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        import build_api
    finally:
        sys.path.pop(0)
    written = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert written == build_api.build(), "run `uv run python docs/build_api.py`"
    stub = (PACKAGE / "__init__.pyi").read_text(encoding="utf-8")
    assert stub == build_api.build_stub(), "run `uv run python docs/build_api.py`"
    assert (PACKAGE / "py.typed").is_file()
