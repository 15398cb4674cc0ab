"""The story in ``notebooks/``: each runs from a clean kernel, and what is stored is what a reader should see."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import nbclient
import nbformat
import pytest

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).parents[1] / "notebooks"
FILES = sorted(path.name for path in FOLDER.glob("*.ipynb"))
SECONDS, BYTES = 300, 1_000_000
"""About a minute on two cores, more on a busy machine; and what a repository should hold of one notebook."""

PATHS = re.compile(r"/(?:home|Users|root|tmp|work|usr|opt|mnt|var)/\w|[A-Za-z]:\\Users\\|ipykernel_\d|site-packages")


def _read(name: str) -> Any:
    return nbformat.read(FOLDER / name, as_version=4)


def _code(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]


def _noise(notebook: Any) -> list[str]:
    """What cells wrote to stderr: warnings, progress."""
    return [o.text for cell in _code(notebook) for o in cell.outputs if o.output_type == "stream" and o.name == "stderr"]


def _texts(value: Any) -> list[str]:
    """Every text in a notebook but the pictures, whose letters may spell anything."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [text for key, part in value.items() if not key.startswith("image/") for text in _texts(part)]
    return [text for part in value for text in _texts(part)] if isinstance(value, list) else []


def test_the_story_has_its_nine_parts_in_order() -> None:
    assert [name.split("_")[0] for name in FILES] == [str(number) for number in range(1, 10)]


@pytest.mark.parametrize("name", FILES)
def test_runs_from_a_clean_kernel(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # The kernel inherits these: tqdm, which Pyro imports, warns where ipywidgets (an extra) are missing.
    monkeypatch.setenv("PYTHONWARNINGS", "ignore:IProgress not found")
    notebook = _read(name)
    for cell in _code(notebook):
        cell.outputs, cell.execution_count = [], None
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=SECONDS, kernel_name="python3", resources=resources).execute()
    assert all(cell.execution_count for cell in _code(notebook))
    assert not _noise(notebook)


@pytest.mark.parametrize("name", FILES)
def test_outputs_were_kept(name: str) -> None:
    notebook = _read(name)
    counts = [cell.execution_count for cell in _code(notebook)]
    assert counts == list(range(1, len(counts) + 1)), "run it from a clean kernel, from top to bottom, before it is stored"
    outputs = [output for cell in _code(notebook) for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not any(output.output_type == "error" for output in outputs)
    assert (FOLDER / name).stat().st_size < BYTES


@pytest.mark.parametrize("name", FILES)
def test_what_is_stored_names_no_machine_and_holds_no_warnings(name: str) -> None:
    notebook = _read(name)
    assert not _noise(notebook)
    found = [text[max(0, m.start() - 40) : m.end() + 40] for text in _texts(notebook) for m in PATHS.finditer(text)]
    assert not found
    assert notebook.metadata.kernelspec.name == "python3"
    assert not any("execution" in cell.metadata for cell in notebook.cells), "strip the cells' times of execution"


@pytest.mark.parametrize("name", FILES)
def test_links_lead_to_notebooks_that_exist(name: str) -> None:
    text = "\n".join(cell.source for cell in _read(name).cells if cell.cell_type == "markdown")
    lost = [link for link in re.findall(r"\]\(([^)#:]+\.ipynb)", text) if not (FOLDER / link).is_file()]
    assert not lost
