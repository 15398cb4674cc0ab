"""The README's Python runs as it stands there, block after block, in a folder of its own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"


def test_the_python_of_the_readme_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 3
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
    printed = capsys.readouterr().out
    assert "ELBO" in printed
    assert printed.count("log p(x) =") == 2
    assert "LogNormal" in printed
    assert (tmp_path / "runs/a/vae.safetensors").is_file()


def test_the_readme_names_the_commands_that_ci_runs() -> None:
    text = README.read_text(encoding="utf-8")
    assert "pip install -c constraints.txt . && pyro-vae demo" in text
    assert "pip install -c constraints.txt '.[test]' && pytest" in text
