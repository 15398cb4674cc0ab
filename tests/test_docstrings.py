"""Every example in the documentation runs, everything public is documented, and no file is long."""

from __future__ import annotations

import ast
import doctest
import importlib
import pkgutil
from pathlib import Path

import pytest

import pyro_vae

LONGEST_FILE = 350
MODULES = ["pyro_vae", *sorted(m.name for m in pkgutil.walk_packages(pyro_vae.__path__, "pyro_vae."))]
ROOT = Path(pyro_vae.__path__[0])
FILES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py"))


def _is_overload(node: ast.AST) -> bool:
    return any(ast.unparse(d).endswith("overload") for d in getattr(node, "decorator_list", ()))


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module(name)
    monkeypatch.chdir(tmp_path)  # for the examples that write files
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    output: list[str] = []
    for example in doctest.DocTestFinder(exclude_empty=True).find(module, name):
        runner.run(example, out=output.append)
    assert runner.failures == 0, "".join(output)


@pytest.mark.parametrize("file", FILES)
def test_public_names_are_documented(file: str) -> None:
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), f"{file} has no module docstring"
    missing = [
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
        and not _is_overload(node)
        and not ast.get_docstring(node)
    ]
    assert not missing, f"{file}: no docstring on {', '.join(missing)}"


@pytest.mark.parametrize("file", FILES)
def test_no_file_is_long(file: str) -> None:
    lines = len((ROOT / file).read_text(encoding="utf-8").splitlines())
    assert lines <= LONGEST_FILE, f"{file} has {lines} lines: make it a folder with one noun a file"


def test_every_file_is_a_module() -> None:
    """A folder without ``__init__.py`` would escape the tests above."""
    modules = {"pyro_vae." + f.removesuffix(".py").replace("/", ".") for f in FILES}
    assert {m.removesuffix(".__init__") for m in modules} == set(MODULES)
