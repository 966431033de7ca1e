"""Tables of the report, line by line, so that a later crash loses nothing; and the criteria of the report."""

from __future__ import annotations

from collections.abc import Hashable, Iterator

Found = dict[Hashable, float]
USUAL, LONG = (8, 2048, 2048), (1, 524288, 64)  # batch, n, d; with 16 states

# (key of the measurement, its description, sign, bound)
CRITERIA: list[tuple[Hashable, str, str, float]] = [
    (("forward", "bfloat16", USUAL), "forward pass over its floor, (8, 2048, 2048, 16), bfloat16", "≤", 2),
    (("backward", "bfloat16", USUAL), "backward over forward pass, the same", "≤", 3.5),
    ("loop", "PyTorch's loop over the forward pass, (8, 2048, 2048, 16), float32", "≥", 20),
    (("forward", "bfloat16", LONG), "forward pass over its floor, (1, 524288, 64, 16), bfloat16", "≤", 4),
    (("forward", "float32", LONG), "the same, float32", "≤", 4),
    ("error", "worst error of an instantiation, as part of what is allowed", "≤", 1),
    ("unchecked", "instantiations not checked", "≤", 0),
]
SANITIZER = "compute-sanitizer --tool {} --error-exitcode 1 python -m asv_benchmarks.gpu --sanitize"


def header(*columns: str) -> Iterator[str]:
    """The lines of a table before its rows."""
    yield from (".. csv-table::", "   :class: wide", f"   :header: {_cells(columns)}", "")


def row(*cells: object) -> str:
    """The line of one row."""
    return f"   {_cells(cells)}"


def told(problem: Exception) -> str:
    """The text of an exception, for one cell or line."""
    line = next(iter(str(problem).splitlines()), "")[:80].replace("`", "'").replace('"', "'")
    return f"``{type(problem).__name__}: {line.strip()}``"


def verdict(found: Found) -> Iterator[str]:
    """The lines of a table with one row for each criterion."""
    yield from header("criterion", "wanted", "measured", "met")
    for key, what, sign, bound in CRITERIA:
        measured = found.get(key)
        met = measured is not None and (measured <= bound if sign == "≤" else measured >= bound)  # False for NaN
        number = "not measured" if measured is None else f"{measured:.3g}"
        yield row(what, f"{sign} {bound}", number, "yes" if met else "**no**")
    yield from ("", "Races and accesses out of bounds are looked for by these two, each of which must end with 0::", "")
    yield from (f"   {SANITIZER.format(tool)}" for tool in ("racecheck", "memcheck"))


def _cells(cells: tuple[object, ...]) -> str:
    return ", ".join(f'"{cell}"' for cell in cells)
