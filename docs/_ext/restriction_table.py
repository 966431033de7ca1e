"""`.. restriction-table::` shows which method takes which restriction of a call, as the classes themselves say."""

from typing import Any

from docutils import nodes
from sphinx.util.docutils import SphinxDirective

import subquad
from subquad.attention.restrictions import NAMES


class RestrictionTable(SphinxDirective):
    """A row for each method, a column for each restriction."""

    def run(self) -> list[nodes.Node]:
        """Write it as a list-table."""
        columns = [name for name in NAMES if not is_of_exact_alone(name)]
        others = [name for name in NAMES if is_of_exact_alone(name)]
        head = ["Method", *(f"``{name}``" for name in columns), ", ".join(f"``{name}``" for name in others)]
        rows = [head]
        for name, cls in subquad.METHODS.items():
            taken = [cls.restrictions.issuperset({x}) for x in columns] + [cls.restrictions.issuperset(others)]
            rows.append([f":doc:`methods/{name}`", *("yes" if x else "–" for x in taken)])
        text = [".. list-table::", "   :header-rows: 1", "   :class: wide", ""]
        for row in rows:
            text += [f"   {'*' if i == 0 else ' '} - {cell}" for i, cell in enumerate(row)]
        return self.parse_text_to_nodes("\n".join(text))


def is_of_exact_alone(name: str) -> bool:
    """Whether no method but exact attention takes a restriction."""
    return [method for method, cls in subquad.METHODS.items() if name in cls.restrictions] == ["exact"]


def setup(app: Any) -> dict[str, bool]:
    app.add_directive("restriction-table", RestrictionTable)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
