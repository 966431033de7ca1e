"""How scans cut a sequence into equal runs that advance together, and join them in logarithmic depth."""

from __future__ import annotations

import math
from types import ModuleType

from subquad.backend import Array
from subquad.core.beside import place_of
from subquad.core.states import compounded, decayed


def cut_runs(xp: ModuleType, x: Array, columns: int, steps: int) -> Array:
    """Cut (batch, n, ·) into runs (batch, columns, steps, ·), padded with zeros after the last step."""
    ragged = columns * steps - x.shape[1]
    if ragged:
        zeros = xp.zeros((x.shape[0], ragged, x.shape[-1]), dtype=x.dtype, device=place_of(x))
        x = xp.concat([x, zeros], axis=1)
    return xp.reshape(x, (x.shape[0], columns, steps, x.shape[-1]))


def join_runs(xp: ModuleType, decay: Array, left: Array, initial: Array, cut: Array | None = None) -> Array:
    """The state before each run, where a run takes h to decay · h + left; log₂(columns) passes, no division.

    `decay` and `left` have the runs on axis 1; `initial`, the state before the first run, has length 1 there. Each pass
    doubles the number of runs that an entry covers (Hillis and Steele's scan). A run in which `cut` (as `decay`, last
    axes of length 1) is True takes every h to `left`, by selection: then h may be NaN, and the decay is not read.
    """
    a, b = decay[:, :-1, ...], left[:, :-1, ...]
    b = xp.concat([initial, b], axis=1)  # the initial state acts as a run before the first
    a = xp.concat([xp.zeros_like(initial), a], axis=1)
    c = None if cut is None else xp.concat([xp.zeros_like(cut[:, :1, ...]), cut[:, :-1, ...]], axis=1)
    for reach in (1 << i for i in range(math.ceil(math.log2(a.shape[1])))):
        late, early, before = a[:, reach:, ...], a[:, :-reach, ...], b[:, :-reach, ...]
        if c is not None:
            late_cut = c[:, reach:, ...]
            # values that a cut hides are replaced before they are multiplied: 0 · NaN would come back in gradients
            late = xp.where(late_cut, 0.0, late)
            early, before = xp.where(late_cut, 0.0, early), xp.where(late_cut, 0.0, before)
            c = xp.concat([c[:, :reach, ...], late_cut | c[:, :-reach, ...]], axis=1)
        b = xp.concat([b[:, :reach, ...], decayed(xp, late, before) + b[:, reach:, ...]], axis=1)
        a = xp.concat([a[:, :reach, ...], compounded(xp, early, late)], axis=1)
    return b
