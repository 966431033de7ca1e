"""Tables on a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

WIDTH = 140  # at least, so that a file or a narrow terminal gets whole rows


def show(title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table: names on the left, numbers on the right."""
    shown = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, header_style="bold")
    for i, name in enumerate(header):
        shown.add_column(name, justify="right" if i else "left", no_wrap=not i)
    for cells in rows:
        shown.add_row(*cells)
    console().print(shown)


def console() -> Console:
    """The terminal, in which a table has room."""
    return Console(width=max(Console().width, WIDTH))
