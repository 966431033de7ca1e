"""What the kernels are to reach, and whether they do."""

from __future__ import annotations

from collections.abc import Hashable, Iterator

from asv_benchmarks.gpu import table

Found = dict[Hashable, float]
USUAL, LONG = (8, 2048, 2048), (1, 524288, 64)  # batch, n, d; with 16 states

# key of what was measured, what it is, and the bound
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


def verdict(found: Found) -> Iterator[str]:
    """One row for each criterion."""
    yield from table.header("criterion", "wanted", "measured", "met")
    for key, what, sign, bound in CRITERIA:
        measured = found.get(key)
        met = measured is not None and (measured <= bound if sign == "≤" else measured >= bound)  # not, if it is NaN
        told = "not measured" if measured is None else f"{measured:.3g}"
        yield table.row(what, f"{sign} {bound}", told, "yes" if met else "**no**")
    yield from ("", "Races and accesses out of bounds are looked for by these two, each of which must end with 0::", "")
    yield from (f"   {SANITIZER.format(tool)}" for tool in ("racecheck", "memcheck"))
