"""Which clusters a panel of rows weighs one by one: runs of clusters that lie side by side.

Without groups these are all clusters that a row sees. With them, they are those of groups that a row of the panel
expands, or does not see whole, and clusters without a group.
"""

from __future__ import annotations

from typing import Any

from subquad_numpy.clustered.tiles import TILE
from subquad_numpy.codegen import merged


@merged
def append_run(firsts: Any, counts: Any, begin: int, runs: int, first: int, count: int) -> int:
    """Put `count` clusters behind the runs from number `begin` on, of at most `TILE` each; the number of runs."""
    if runs > begin and firsts[runs - 1] + counts[runs - 1] == first and counts[runs - 1] + count <= TILE:
        counts[runs - 1] += count
        return runs
    for j in range(0, count, TILE):
        firsts[runs], counts[runs] = first + j, min(TILE, count - j)
        runs += 1
    return runs


@merged
def list_clusters(
    always: int, whole: int, group: int, most: int, needed: Any, firsts: Any, counts: Any, begin: int
) -> int:
    """The runs of clusters 0 … most − 1 without those of the first `whole` groups that are not `needed`.

    They are put behind `begin` runs; the number of all runs.
    """
    runs = append_run(firsts, counts, begin, begin, 0, min(always, most))
    for g in range(whole):
        if needed[g] != 0:
            runs = append_run(firsts, counts, begin, runs, always + g * group, group)
    tail = always + whole * group
    return append_run(firsts, counts, begin, runs, tail, max(most - tail, 0))
