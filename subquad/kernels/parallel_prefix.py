"""How scans cut a sequence into equal runs that advance together, and join them in logarithmic depth."""

from __future__ import annotations

import math
from types import ModuleType

from subquad.backend import Array
from subquad.core.beside import place_of
from subquad.core.states import compounded, decayed


def run_sizes(n: int, longest: int) -> tuple[int, int]:
    """(columns, steps): the number of runs that cover n steps, and their equal length, at most `longest`; n ≥ 1."""
    columns = -(-n // longest)
    steps = -(-n // columns)
    return -(-n // steps), steps


def cut_runs(xp: ModuleType, x: Array, columns: int, steps: int) -> Array:
    """Cut (batch, n, ·) into runs (batch, columns, steps, ·), padded with zeros after the last step."""
    ragged = columns * steps - x.shape[1]
    if ragged:
        zeros = xp.zeros((x.shape[0], ragged, x.shape[-1]), dtype=x.dtype, device=place_of(x))
        x = xp.concat([x, zeros], axis=1)
    return xp.reshape(x, (x.shape[0], columns, steps, x.shape[-1]))


def join_runs(xp: ModuleType, decay: Array, left: Array, initial: Array) -> Array:
    """The state before each run, where a run takes h to decay · h + left; log₂(columns) passes, no division.

    `decay` and `left` have the runs on axis 1; `initial`, the state before the first run, has length 1 there. Each pass
    doubles the number of runs that an entry covers (Hillis and Steele's scan).
    """
    a, b = decay[:, :-1, ...], left[:, :-1, ...]
    b = xp.concat([initial, b], axis=1)  # the initial state acts as a run before the first
    a = xp.concat([xp.zeros_like(initial), a], axis=1)
    for reach in (1 << i for i in range(math.ceil(math.log2(a.shape[1])))):
        late, early = a[:, reach:, ...], a[:, :-reach, ...]
        b = xp.concat([b[:, :reach, ...], decayed(xp, late, b[:, :-reach, ...]) + b[:, reach:, ...]], axis=1)
        a = xp.concat([a[:, :reach, ...], compounded(xp, early, late)], axis=1)
    return b
