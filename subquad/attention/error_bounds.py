"""The error of a rung on sampled rows, and the bound by which `Auto` chooses.

    R² = Σ_i w[i] e[i] / Σ_i w[i] ‖o[i]‖²,    e[i] = ‖ô[i] − o[i]‖²,    sampled i that see a key
    U² = R² + ESCAPED max_i (w[i] − 1) e[i] / Σ_i w[i] ‖o[i]‖²
    U ≥ U′ opened′ / opened,    of the rungs before that differ in a smaller number of opened clusters alone (0 is 1)

w[i] is the number of rows for which row i stands. R errs where a few rows carry the error: on trained heads, one row of
2048 may carry four fifths of it. Three things guard against that.

- Rows of which a method knows that they are its worst (`bare_rows`) are a stratum of their own: all of them, or as many
  as a quarter of the sample.
- The largest error found counts ESCAPED times more, as if as many rows like it had escaped the sample. Of rows of which
  nine are expected in a sample, it holds none or one with a probability of 10 e⁻⁹ = 0.1 %.
- A row that a rung gets wrong is often wrong in the next rung too, and neither shows it if the row was not sampled. So
  a bound does not fall faster than the number of opened clusters grows.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from subquad.attention.call import AttentionCall
from subquad.attention.method import Method
from subquad.attention.sampled_rows import Sample
from subquad.backend import Array
from subquad.core.beside import namespace_of
from subquad.core.dtypes import cast
from subquad.core.host import floats_of, to_host
from subquad.kernels.sampled_errors import row_squares, unit_of
from subquad.kernels.visibility import alignment
from subquad.random import draw_rows

ESCAPED = 8  # times that the largest error found is counted once more
BARE = 4  # a stratum of bare rows has at most one of so many sampled rows
Host = np.ndarray[Any, Any]


class Drawn(NamedTuple):
    """Sampled rows, ascending, and the number of rows for which each of them stands."""

    numbers: Host  # int32 (r,)
    weights: Host  # float64 (r,)


class Bounded(NamedTuple):
    """The estimated error and its bound, float64 (..., heads); infinite where no sampled row sees a key."""

    error: Host
    bound: Host


def draw(call: AttentionCall, methods: Iterable[Method], rows: int, seed: int) -> Drawn:
    """The rows of a call at which these methods are judged: `rows` of them, or all; none before the first key."""
    n = call.q.shape[-2]
    _, early = alignment(n, call.k.shape[-2]) if call.causal else (0, 0)
    early = min(early, n)
    bare = {row for x in methods if hasattr(x, "bare_rows") for row in x.bare_rows(call)}
    worst = np.array(sorted(bare) if rows >= BARE else [], dtype=np.int32)
    others = n - early - len(worst)
    of_worst = draw_rows(0, len(worst), max(rows // BARE, rows - others), seed)
    of_others = draw_rows(early, early + others, rows - len(of_worst), seed)  # counted without the worst
    passed = np.searchsorted(worst - np.arange(len(worst)), of_others, side="right")
    numbers = np.concatenate([worst[of_worst], of_others + passed.astype(np.int32)])
    strata = (len(worst), len(of_worst)), (others, len(of_others))
    weights = np.concatenate([np.full(count, size / max(count, 1)) for size, count in strata])
    order = np.argsort(numbers)
    return Drawn(numbers[order], weights[order])


def bounded(known: Sample, weights: Host, out: Array) -> Bounded:
    """The error and its bound of an output (..., heads, r, d_v) at the rows of a sample, from this output alone."""
    xp, exact = namespace_of(known.exact), known.exact
    unit = unit_of(xp, exact)
    parts = (cast(xp, out, exact.dtype) - exact) / unit, exact / unit
    off, size = (np.asarray(floats_of(row_squares(xp, x, known.seeing)), dtype=float) * weights for x in parts)
    return bounded_by(off, size, weights, to_host(xp.any(known.seeing, axis=-1), bool))


def bounded_by(off: Host, size: Host, weights: Host, sees: Host) -> Bounded:
    """The error and its bound by w e and w ‖o‖² of the sampled rows, (..., heads, r), if any `sees` a key."""
    total, found = size.sum(axis=-1), off.sum(axis=-1)
    escaped = ESCAPED * (off - off / weights).max(axis=-1)

    def root(part: Host) -> Host:
        share = np.where(total > 0, part / np.where(total > 0, total, 1.0), np.where(part == 0, 0.0, math.inf))
        return np.where(sees & ~np.isnan(share), share, math.inf) ** 0.5

    return Bounded(root(found), root(found + escaped))


def carried(method: Method, bound: Host, before: Iterable[tuple[Method, Host]]) -> Host:
    """The bound of a rung, by those of the rungs before it too."""
    for other, theirs in before:
        if family(other) == family(method) and other.opened < method.opened:  # type: ignore[attr-defined]
            bound = np.maximum(bound, theirs * (max(other.opened, 1) / method.opened))  # type: ignore[attr-defined]
    return bound


def family(method: Any) -> Any:
    """What methods have in common that differ in `opened` alone; the method itself if it has no such option."""
    fields = {field.name for field in dataclasses.fields(method)}
    return replace(method, opened=0) if "opened" in fields else method
