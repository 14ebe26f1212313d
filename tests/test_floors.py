"""Imports go down only: launch -> optimizers -> engine -> (layout, collectives, backends) -> kernels."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A room may import from itself and from rooms with a smaller number. Rooms of one floor do not know each other.
FLOORS = {"launch": 7, "oput_dist": 6, "planning": 5, "wrappers": 4, "optimizers": 4, "curvature": 3, "engine": 2}
FLOORS |= {"layout": 1, "collectives": 1, "backends": 1, "matrix": 1, "kernels": 0}


def modules(root: Path) -> Iterator[tuple[str, Path]]:
    """Module name and file of everything in oput_dist, kernels (known as oput_dist.kernels) and launch."""
    for folder, package in (("oput_dist", "oput_dist"), ("kernels", "oput_dist.kernels"), ("launch", "launch")):
        for path in sorted((root / folder).rglob("*.py")):
            inside = path.relative_to(root / folder).with_suffix("").parts
            if folder == "oput_dist" and inside[0] == "kernels":
                continue  # the symbolic link
            yield ".".join([package, *(part for part in inside if part != "__init__")]), path


def room(module: str) -> str | None:
    """The room that a module is in: its folder; ``oput_dist`` for the package's own face; None for other libraries."""
    parts = module.split(".")
    if parts[0] == "launch":
        return "launch"
    if parts[0] != "oput_dist":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in FLOORS else "oput_dist"


def imports(module: str, path: Path) -> Iterator[tuple[int, str]]:
    """Line and absolute name of every import in a file, also of those inside functions and under TYPE_CHECKING."""
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield node.lineno, f"{origin}.{alias.name}"


def violations(root: Path) -> list[str]:
    found = []
    for module, path in modules(root):
        here = room(module)
        assert here is not None
        for line, name in imports(module, path):
            there = room(name)
            if there not in (None, here) and not FLOORS[there] < FLOORS[here]:
                found.append(f"{path.relative_to(root)}:{line}: {here} must not import {name}")
    return found


def test_imports_run_down_the_floors() -> None:
    rooms = {room(module) for module, _ in modules(ROOT)}
    assert rooms == set(FLOORS)  # every room was looked at
    assert violations(ROOT) == []


@pytest.mark.parametrize(
    ("where", "line"),
    [
        ("kernels/new.py", "from oput_dist.backends import choose"),
        ("oput_dist/layout/new.py", "from ..collectives import packed_sum"),
        ("oput_dist/backends/new.py", "import oput_dist.layout"),
        ("oput_dist/engine/new.py", "def f():\n    from oput_dist.optimizers.lamb import Lamb"),
        ("oput_dist/optimizers/new.py", "from launch import train"),
        ("oput_dist/optimizers/new.py", "import oput_dist as oput"),
        ("oput_dist/engine/__init__.py", "from ..optimizers import Lamb"),
    ],
)
def test_a_step_up_is_found(tmp_path: Path, where: str, line: str) -> None:
    target = tmp_path / where
    target.parent.mkdir(parents=True)
    target.write_text(line)
    assert len(violations(tmp_path)) == 1


@pytest.mark.parametrize(
    ("where", "line"),
    [
        ("oput_dist/engine/new.py", "from ..layout import layout_of"),
        ("oput_dist/layout/new.py", "from .base import Layout\nimport torch"),
        ("oput_dist/__init__.py", "from .optimizers import Lamb"),
        ("launch/train.py", "import oput_dist as oput"),
    ],
)
def test_a_step_down_is_allowed(tmp_path: Path, where: str, line: str) -> None:
    target = tmp_path / where
    target.parent.mkdir(parents=True)
    target.write_text(line)
    assert violations(tmp_path) == []
