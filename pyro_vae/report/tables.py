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
    Console(file=paper, width=WIDTH).print(table)
    return "\n".join(line.rstrip() for line in paper.getvalue().split("\n")).strip("\n")
