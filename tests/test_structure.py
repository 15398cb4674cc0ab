"""The architecture: imports run downwards only, and only program.py knows Pyro's effect handlers."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

import pyro_vae

ROOT = Path(pyro_vae.__path__[0])
FILES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py"))
# From the ground floor up. A room may import from those of lower floors and from itself.
FLOORS = [
    {"(files at the top)"},
    {"posterior"},
    {"model"},  # above posterior: `VAE.impute` asks it for latents
    {"evidence", "learning"},
    {"em"},  # its M-step learns, its E-step weighs particles, and log p(x) is their evidence
    {"report"},
    {"runs"},  # runs.py: a run on the disk, for the command line
    {"(the package)"},
    {"cli"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def _room(module: str) -> str:
    """The room of a dotted name such as ``pyro_vae.model.priors``."""
    parts = module.split(".")
    if len(parts) == 1:
        return "(the package)"
    if parts[1] in ("cli", "__main__"):
        return "cli"
    if parts[1] in FLOOR or (ROOT / parts[1]).is_dir():
        return parts[1]
    return "(files at the top)"


def _exists(module: str) -> bool:
    path = ROOT.joinpath(*module.split(".")[1:])
    return path.is_dir() or path.with_suffix(".py").is_file()


def _imports(tree: ast.AST, package: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import in the tree; ``from a import b`` is ``a.b`` where that is a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            name = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            for alias in node.names:
                inner = f"{name}.{alias.name}"
                is_module = _exists(inner) if name.split(".")[0] == "pyro_vae" else alias.name == "poutine"
                yield node.lineno, inner if is_module else name
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module") and node.args:
            argument = node.args[0]
            if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                yield node.lineno, importlib.util.resolve_name(argument.value, package)


def _parse(file: str) -> tuple[ast.Module, str, str]:
    """The file's tree, its dotted name and that of the package it lies in."""
    parts = ("pyro_vae", *Path(file).with_suffix("").parts)
    module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    return ast.parse((ROOT / file).read_text(encoding="utf-8")), module, ".".join(parts[:-1])


@pytest.mark.parametrize("file", FILES)
def test_imports_run_downwards(file: str) -> None:
    tree, module, package = _parse(file)
    room = _room(module)
    assert room in FLOOR, f"{file} is in a room that has no floor yet: add it to FLOORS"
    upwards = [
        f"line {line} imports {name}"
        for line, name in _imports(tree, package)
        if name.split(".")[0] == "pyro_vae" and _room(name) != room and FLOOR[_room(name)] >= FLOOR[room]
    ]
    assert not upwards, f"{file} ({room}): {'; '.join(upwards)}"


@pytest.mark.parametrize("file", [f for f in FILES if f != "program.py"])
def test_only_program_uses_poutine(file: str) -> None:
    tree, _, package = _parse(file)
    uses = [line for line, name in _imports(tree, package) if name.startswith("pyro.poutine")]
    uses += [n.lineno for n in ast.walk(tree) if isinstance(n, ast.Attribute) and ast.unparse(n) == "pyro.poutine"]
    assert not uses, f"{file} uses pyro.poutine in line {', '.join(map(str, uses))}; ask program.py for what is needed"


def test_no_files_import_each_other_in_a_circle() -> None:
    """Imports for types alone count as well: a reader follows them like any other."""
    graph: dict[str, set[str]] = {}
    for file in FILES:
        tree, module, package = _parse(file)
        if _room(module) != "(the package)":
            graph[module] = {name for _, name in _imports(tree, package) if name.startswith("pyro_vae.")} - {module}
    waiting = dict(graph)
    while ready := [module for module, needs in waiting.items() if not needs & waiting.keys()]:
        for module in ready:
            del waiting[module]
    assert not waiting, f"these files import each other: {', '.join(sorted(waiting))}"
