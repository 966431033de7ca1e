"""`.. method-table::` shows the table of methods of README.md, so that it stands in one place only.

The name in the first cell of a row becomes a link to the page of that method.
"""

from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.util.docutils import SphinxDirective

README = Path(__file__).resolve().parents[2] / "README.md"
HEAD = "| method |"


def read_rows() -> list[list[str]]:
    """The cells of the table, its head first, in reStructuredText."""
    lines = iter(README.read_text(encoding="utf-8").splitlines())
    rows = [next(line for line in lines if line.startswith(HEAD))]
    next(lines)  # the rule below the head
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append(line)
    return [[cell.strip().replace("`", "``") for cell in row.strip("| ").split(" | ")] for row in rows]


class MethodTable(SphinxDirective):
    """The table of methods."""

    def run(self) -> list[nodes.Node]:
        """Write it as a list-table."""
        self.env.note_dependency(str(README))
        head, *rows = read_rows()
        text = [".. list-table::", "   :header-rows: 1", "   :class: wide", "   :widths: 17 17 13 18 35", ""]
        for first, *rest in [[cell.capitalize() for cell in head], *([link(row[0]), *row[1:]] for row in rows)]:
            text += [f"   * - {first}", *(f"     - {cell}" for cell in rest)]
        return self.parse_text_to_nodes("\n".join(text))


def link(name: str) -> str:
    """A link to the page of a method, such as of ``"favor"``."""
    shown = name.strip("`")
    page = shown.strip('"')
    return f":doc:`{shown} <methods/{page}>`"


def setup(app: Any) -> dict[str, bool]:
    app.add_directive("method-table", MethodTable)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
