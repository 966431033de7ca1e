"""The output of rows over all keys, of their outputs over chunks of the keys, which join by their log-sum-exp."""

import math
from functools import cache
from typing import Any

import numpy as np

from subquad_numpy.codegen import inline, pointer
from subquad_numpy.codegen.compile import DONE, compiled, element
from subquad_numpy.runtime.arguments import fields

# part_step, level_step: numbers from a chunk to the next one
JOIN_RECORD = fields(
    dict.fromkeys(("n", "d", "chunks", "part_step", "level_step")), {"parts": 2, "levels": 1, "out": 2, "lse": 1}
)
INFINITY = math.inf


@inline
def join(
    parts: Any, part_step: int, levels: Any, level_step: int, chunks: int, n: int, d: int, zero: Any, out: Any,
    has_lse: bool, lse: Any,
) -> None:  # fmt: skip
    """Write the output (n, d) over all keys, and if `has_lse`, the log-sum-exp; rows that see no key have 0 and −∞."""
    for i in range(n):
        top = levels[i]
        for c in range(1, chunks):
            top = max(top, levels[c * level_step + i])
        if not top > -INFINITY:  # no key, or NaN, which comes by its own level
            top = zero
        total = zero
        for c in range(chunks):
            total += math.exp(levels[c * level_step + i] - top)
        factor = 1 / total if total != 0 else total
        for c in range(chunks):
            share, at = math.exp(levels[c * level_step + i] - top) * factor, c * part_step + i * d
            for p in range(d):
                out[i * d + p] = parts[at + p] * share + (out[i * d + p] if c > 0 else 0)
        if has_lse:
            lse[i] = top + math.log(total) if total != 0 else -INFINITY


@cache
def join_kernel(dtype: np.dtype[Any]) -> Any:
    """Compile the output and the log-sum-exp over all keys; a task is one item."""
    _, _, zero = element(dtype)

    @compiled(f"join {dtype}", JOIN_RECORD)
    def join_chunks(first: int, last: int, records: Any) -> int:
        for item in range(first, last):
            f = records[item]
            parts, levels = pointer(f.parts, zero), pointer(f.levels, zero)
            out, lse = pointer(f.out, zero), pointer(f.lse, zero)
            join(parts, f.part_step, levels, f.level_step, f.chunks, f.n, f.d, zero, out, True, lse)
        return DONE

    return join_chunks
