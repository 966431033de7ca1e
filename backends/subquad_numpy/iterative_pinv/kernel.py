"""Pseudo-inverses of small matrices by iteration; each matrix stays in one core's cache from beginning to end.

    Z ← ¼ Z (13 I − A Z (15 I − A Z (7 I − A Z))),    from Z = Aᵀ / (‖A‖₁ ‖A‖_∞)

All matrices, factors and products, lie in the panels of `codegen.matmul`, so that no product is packed to be a factor.
"""

from functools import cache
from typing import Any

import numpy as np

from subquad_numpy.codegen import aligned, apart, inline, load, pointer, shifted, store
from subquad_numpy.codegen.compile import DONE, compiled, element
from subquad_numpy.codegen.copies import clear
from subquad_numpy.codegen.matmul import PANEL_VECTORS, TILE_ROWS, Panels, multiply, panel_at, place_in, rows_at
from subquad_numpy.runtime.arguments import fields

# one record for all matrices; a and z are contiguous, (items, m, m)
PINV_RECORD = fields({"m": None, "iterations": None, "a": 0, "z": 0})


@inline
def _identity(target: Any, factor: Any, m: int, width: int, lanes: int) -> None:
    """T = factor I."""
    clear(target.data, target.rows * width)
    for i in range(m):
        target.data[place_in(target, i, i, width, lanes)] = factor


@apart
def _add_product(left: Any, right: Any, target: Any, m: int, rows: int, width: int, lanes: int) -> None:
    """T += L R, for three matrices in panels of `rows` rows."""
    for j in range(0, width, PANEL_VECTORS * lanes):
        _, columns = panel_at(j, width, lanes)
        to = rows_at(shifted(target, j * rows), columns)
        for p in range(0, m, PANEL_VECTORS * lanes):
            _, steps = panel_at(p, width, lanes)
            panel = Panels(shifted(right, j * rows + p * columns), rows)
            multiply(rows_at(shifted(left, p * rows), steps), rows, panel, min(steps, m - p), columns, lanes, to, to)


@cache
def pinv_kernel(dtype: np.dtype[Any]) -> Any:
    """Compile `invert(first, last, records)`; a task is one matrix."""
    lanes, kind, zero = element(dtype)
    one = dtype.type(1)  # a number of the language would make quotients of float64

    @compiled(f"iterative pinv {dtype}", PINV_RECORD)
    def invert(first: int, last: int, records: Any) -> int:
        f = records[0]
        m, iterations = f.m, f.iterations
        all_a, all_z = pointer(f.a, zero), pointer(f.z, zero)
        width = -(-m // lanes) * lanes
        rows = -(-width // TILE_ROWS) * TILE_ROWS
        size = rows * width
        buffer = np.empty(5 * size + rows + lanes, kind)
        # −A, Z and −A Z, then T and S for the nested factors: signs are chosen so that products are only ever added
        minus_a = aligned(buffer)
        z = shifted(minus_a, size)
        minus_az = shifted(z, size)
        t = shifted(minus_az, size)
        s = shifted(t, size)
        row_sums = shifted(s, size)
        clear(minus_a, 2 * size)
        for item in range(first, last):
            a, out = shifted(all_a, item * m * m), shifted(all_z, item * m * m)
            clear(row_sums, m)
            norm_1 = norm_inf = zero
            for j in range(m):
                column_sum = zero
                for i in range(m):
                    magnitude = abs(a[i * m + j])
                    column_sum += magnitude
                    row_sums[i] += magnitude
                norm_1 = max(norm_1, column_sum)
            for i in range(m):
                norm_inf = max(norm_inf, row_sums[i])
            norms = norm_1 * norm_inf
            if norms == 0:  # A = 0, hence Z = 0
                norms = one
            for j in range(m):
                before, columns = panel_at(j, width, lanes)
                for i in range(m):
                    place = before * rows + i * columns + j - before
                    minus_a[place] = -a[i * m + j]
                    z[place] = a[j * m + i] / norms
            for _ in range(iterations):
                clear(minus_az, size)
                _add_product(minus_a, z, minus_az, m, rows, width, lanes)
                _identity(Panels(t, rows), 7, m, width, lanes)
                for i in range(0, size, lanes):
                    store(t, i, load(t, i) + load(minus_az, i))
                _identity(Panels(s, rows), 15, m, width, lanes)
                _add_product(minus_az, t, s, m, rows, width, lanes)
                _identity(Panels(t, rows), 13, m, width, lanes)
                _add_product(minus_az, s, t, m, rows, width, lanes)
                clear(s, size)
                _add_product(z, t, s, m, rows, width, lanes)
                for i in range(0, size, lanes):
                    store(z, i, load(s, i) * 0.25)
            for j in range(m):
                before, columns = panel_at(j, width, lanes)
                for i in range(m):
                    out[i * m + j] = z[before * rows + i * columns + j - before]
        return DONE

    return invert
