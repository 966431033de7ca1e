"""A table of reStructuredText, written line by line: what is measured survives whatever comes after."""

from __future__ import annotations

from collections.abc import Iterator


def header(*columns: str) -> Iterator[str]:
    """The lines before the rows."""
    yield from (".. csv-table::", "   :class: wide", f"   :header: {_cells(columns)}", "")


def row(*cells: object) -> str:
    """One row."""
    return f"   {_cells(cells)}"


def told(problem: Exception) -> str:
    """An exception in one cell or line."""
    line = next(iter(str(problem).splitlines()), "")[:80].replace("`", "'").replace('"', "'")
    return f"``{type(problem).__name__}: {line.strip()}``"


def _cells(cells: tuple[object, ...]) -> str:
    return ", ".join(f'"{cell}"' for cell in cells)
