"""Two things that read well in a docstring and that reStructuredText takes for something else.

Runs before numpydoc.
"""

import re
from typing import Any

INITIAL = re.compile(r"^(\.\. \[\w+\] )([A-Z]\. )")


def keep_formulas(_app: Any, _what: str, _name: str, _obj: Any, _options: Any, lines: list[str]) -> None:
    """Make the indented lines above the first section a literal block: as a quotation they would be joined."""
    head = next((i - 1 for i, line in enumerate(lines) if line and set(line) == {"-"}), len(lines))
    inside = False
    out: list[str] = []
    for i, line in enumerate(lines):
        indented = line.startswith("    ")
        if i < head and indented and not inside and i and not lines[i - 1].strip():
            out += ["::", ""]
        inside = indented or (inside and not line.strip())
        out.append(line)
    lines[:] = out


def keep_initials(_app: Any, _what: str, _name: str, _obj: Any, _options: Any, lines: list[str]) -> None:
    """Let a reference begin with the initial of an author: "A. Gu" would be item A of a list."""
    lines[:] = [INITIAL.sub(r"\1\\\2", line) for line in lines]


def setup(app: Any) -> dict[str, bool]:
    for keep in (keep_formulas, keep_initials):
        app.connect("autodoc-process-docstring", keep, priority=400)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
