"""`.. library-table::` shows docs/libraries.json, which docs/libraries.py writes: library × function, and why not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.util.docutils import SphinxDirective

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "docs" / "libraries.json"
Content = dict[str, Any]


def mark(cell: Content, tolerance: float) -> str:
    """✓ for right numbers, an error where it raises; anything else would be wrong, and is shown as it is."""
    if "raises" in cell:
        return "–"
    return "✓" if cell["error"] <= tolerance else f"**{cell['error']}**"


def backend_lines(name: str) -> int:
    """Lines of the backend of a library, 0 if it has none."""
    own = {"longdouble": "numpy", "ml_dtypes": "numpy"}.get(name, name.partition(",")[0])
    files = sorted((ROOT / "backends" / f"subquad_{own}").rglob("*.py"))
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in files)


def lines(content: Content) -> Iterator[str]:
    """The table and the reasons, in reStructuredText."""
    functions = list(dict.fromkeys(name for row in content.values() for name in row["functions"]))
    yield from [".. list-table::", "   :header-rows: 1", "   :class: wide", ""]
    for i, name in enumerate(["", *content]):
        yield f"   {'* -' if i == 0 else '  -'} {name}"
    for function in functions:
        yield f"   * - {function}"
        for row in content.values():
            yield f"     - {mark(row['functions'][function], row['tolerance'])}"
    for title, value in (
        ("version", lambda name: content[name]["version"]),
        ("dtype", lambda name: content[name]["dtype"]),
        ("largest error", lambda name: max(x.get("error", 0.0) for x in content[name]["functions"].values())),
        ("lines of the backend", lambda name: backend_lines(name) or "none"),
    ):
        yield f"   * - *{title}*"
        for name in content:
            yield f"     - {value(name)}"
    yield ""
    for name, row in content.items():
        reasons: dict[str, list[str]] = {}
        for function, cell in row["functions"].items():
            if "raises" in cell:
                reasons.setdefault(cell["raises"], []).append(function)
        if row["note"] or reasons:
            yield f"{name}"
            yield f"   {row['note'] or 'What raises:'}"
            yield ""
            for reason, where in reasons.items():
                yield f"   - {', '.join(where)}: ``{reason.replace('`', chr(39))}``"
            yield ""


class LibraryTable(SphinxDirective):
    """The table of libraries."""

    def run(self) -> list[nodes.Node]:
        self.env.note_dependency(str(FILE))
        return self.parse_text_to_nodes("\n".join(lines(json.loads(FILE.read_text(encoding="utf-8")))))


def setup(app: Any) -> dict[str, bool]:
    app.add_directive("library-table", LibraryTable)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
