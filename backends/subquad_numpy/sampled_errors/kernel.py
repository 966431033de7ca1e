"""Errors at sampled rows: the unit of an item's numbers, then three sums of squares for each row, then sums over rows.

Squares of rows are in the dtype of the rows, relative to the unit, and sums over rows in float64.
"""

import math
from functools import cache
from typing import Any

import numpy as np

from subquad_numpy.block_attention.tiles import INFINITY
from subquad_numpy.codegen import absolute, at_least, cut, largest, pointer, prefetch, room, total, zeros
from subquad_numpy.codegen.compile import DONE, compiled, element
from subquad_numpy.codegen.copies import load_part
from subquad_numpy.runtime.arguments import fields

RESULTS = "error", "spread", "of_mean", "norm", "share", "keys", "count", "above"
# Rows, numbers of a row, of how many the rows are a sample, and how many have a number of effective keys; strides of
# the output from row to row, and of effective keys. `numbers` holds the square of the tolerance; `picks`, if given,
# tells which rows of the output are the sampled ones.
ERRORS_RECORD = fields(
    dict.fromkeys(("r", "d_v", "out_of", "looked", "out_row", "effective_step")),
    {"numbers": 1, "exact": 2, "mean": 2, "out": 2, "seeing": 1, "effective": 1, "picks": 1},
    dict.fromkeys(RESULTS, 0),
)


@cache
def errors_kernel(dtype: np.dtype[Any]) -> Any:
    """Compile the errors of an output; a task is an item."""
    lanes, kind, zero = element(dtype)
    word, byte = np.int32(0), np.uint8(0)

    @compiled(f"sampled errors {dtype}", ERRORS_RECORD)
    def sampled_errors(first: int, last: int, records: Any) -> int:
        f = records[0]
        r, d_v, out_of = f.r, f.d_v, f.out_of
        sizes = (r, r, lanes, 2)
        buffer = np.empty(room(sizes), kind)
        size, off, edge, factors = cut(buffer, sizes)
        for task in range(first, last):
            f = records[task]
            numbers, seeing = pointer(f.numbers, zero), pointer(f.seeing, byte)
            exact, mean, out = pointer(f.exact, zero), pointer(f.mean, zero), pointer(f.out, zero)
            effective, picks = pointer(f.effective, zero), pointer(f.picks, word)
            top = zeros(exact)
            for c in range(r):
                row = (picks[c] if f.picks != 0 else c) * f.out_row
                for p in range(0, d_v, lanes):
                    prefetch(out, row + p)  # picked rows lie apart from each other
                    x = load_part(exact, c * d_v + p, d_v - p, lanes, edge)
                    top = at_least(top, absolute(x) + x * 0.0)  # what is not finite is NaN, and left out
            unit = largest(top)
            if unit == 0:
                unit = zero + 1
            # two factors, since the inverse of a small number overflows, and that of a large one has few digits
            factors[0] = 1e20 if unit < 1e-20 else (1e-20 if unit > 1e20 else 1)
            factors[1] = 1 / (unit * factors[0])
            whole, off_whole, mean_whole, count = 0.0, 0.0, 0.0, 0
            for c in range(r):
                size[c], off[c] = 0, 0
                if seeing[c] != 0:
                    squares, offs, of_means = zeros(exact), zeros(exact), zeros(exact)
                    row = (picks[c] if f.picks != 0 else c) * f.out_row
                    for p in range(0, d_v, lanes):
                        at = c * d_v + p
                        own = load_part(exact, at, d_v - p, lanes, edge)
                        x = load_part(out, row + p, d_v - p, lanes, edge) - own
                        y = load_part(mean, at, d_v - p, lanes, edge) - own
                        own = own * factors[0] * factors[1]
                        x, y = x * factors[0] * factors[1], y * factors[0] * factors[1]
                        squares, offs, of_means = squares + own * own, offs + x * x, of_means + y * y
                    size[c], off[c] = total(squares), total(offs)
                    whole, off_whole, mean_whole = whole + size[c], off_whole + off[c], mean_whole + total(of_means)
                    count += 1
            below = whole if whole != 0 else 1.0
            share, share_of_mean = off_whole / below, mean_whole / below
            if whole == 0:
                share, share_of_mean = share * INFINITY if share > 0 else share, mean_whole
                if mean_whole > 0:
                    share_of_mean = INFINITY
            above, squares_left = 0, 0.0
            for c in range(r):
                if seeing[c] != 0:
                    fine = off[c] <= numbers[0] * size[c] and off[c] < INFINITY
                    above += 0 if fine else 1
                    left = off[c] - share * size[c]
                    squares_left += left * left
            error = math.sqrt(share) if count > 0 else math.nan
            spread = 0.0
            if r != out_of:
                rest = (1 - count / out_of) * squares_left * (count / (count - 1)) if count > 1 else math.nan
                spread = math.sqrt(rest) / (2 * (error if error != 0 else 1.0) * below)
            pointer(f.error, zero)[0], pointer(f.spread, zero)[0] = error, spread
            pointer(f.of_mean, zero)[0] = math.sqrt(share_of_mean) if count > 0 else math.nan
            pointer(f.norm, zero)[0] = unit * math.sqrt(whole)
            looked, keys = 0, 0.0
            for c in range(f.looked):
                own_keys = effective[c * f.effective_step]
                looked, keys = looked + (1 if own_keys > 0 else 0), keys + own_keys
            pointer(f.share, zero)[0] = above / count if count > 0 else math.nan
            pointer(f.keys, zero)[0] = keys / looked if looked > 0 else math.nan
            pointer(f.count, word)[0], pointer(f.above, word)[0] = count, above
        return DONE

    return sampled_errors
