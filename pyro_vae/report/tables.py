"""Tables as plain text, for the results that print themselves."""

from __future__ import annotations

import io

from rich.console import Console
from rich.table import Table

WIDTH = 100
"""Columns of text."""


def text_of(table: Table) -> str:
    """The table as lines without trailing blanks, at most `WIDTH` wide."""
    paper = io.StringIO()
    # Else rich shows it as HTML in a notebook, beside the text.
    Console(file=paper, width=WIDTH, force_jupyter=False, color_system=None).print(table)
    return "\n".join(line.rstrip() for line in paper.getvalue().split("\n")).strip("\n")
