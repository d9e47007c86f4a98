"""Lines and tables for people, JSON for machines: what all programs here print with."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

WIDTH = 160
"""Where there is no terminal to ask."""


def out() -> Console:
    return Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)


def err() -> Console:
    return Console(stderr=True, width=None if sys.stderr.isatty() else WIDTH, highlight=False)


def say(text: str) -> None:
    """A line on standard output, in which nothing is taken for markup, and which no width cuts."""
    out().print(text, markup=False, soft_wrap=True)


def complain(text: str) -> None:
    """A line on standard error."""
    err().print(text, markup=False, soft_wrap=True)


def counted(number: int, noun: str) -> str:
    """Such as 1 row, 2,000 rows."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def print_json(content: object) -> None:
    sys.stdout.write(json.dumps(content, ensure_ascii=False, indent=2) + "\n")


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str | Text]]) -> None:
    """A table on standard output, in which brackets are brackets."""
    shown = Table(title=title, title_justify="left")
    for column in columns:
        shown.add_column(column, overflow="fold")
    for row in rows:
        shown.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
    out().print(shown)
