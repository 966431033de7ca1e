"""The gradient of pseudo-inverses by iteration, matrix by matrix in one core's cache.

    Z' = ¼ Z R,    R = 13 I − P S,    S = 15 I − P T,    T = 7 I − P,    P = A Z

The iterates Z are kept. From the last step to the first, with G by Z',

    dR = ¼ Zᵀ G,    dS = −Pᵀ dR,    dT = −Pᵀ dS,    dP = −dR Sᵀ − dS Tᵀ − dT
    dA += dP Zᵀ,    dZ = ¼ G Rᵀ + Aᵀ dP

and then through Z = Aᵀ / (‖A‖₁ ‖A‖_∞), where equal maxima share the gradient.
"""

from functools import cache
from typing import Any

import numpy as np

from subquad_numpy.codegen import apart, cut, inline, load, pointer, room, shifted, store
from subquad_numpy.codegen.compile import DONE, compiled, element
from subquad_numpy.codegen.copies import clear
from subquad_numpy.codegen.matmul import TILE_ROWS, Panels, into_panels, multiply, pack, padded, rows_at, turned
from subquad_numpy.runtime.arguments import fields

# one record for all matrices; all arrays are contiguous, (items, m, m)
GRADIENT_RECORD = fields({"m": None, "iterations": None, "a": 0, "grad_z": 0, "grad_a": 0})


@apart
def _add_product(
    left: Any, right: Any, is_turned: bool, scale: Any, target: Any, panels: Any, m: int, lanes: int
) -> None:
    """T += scale · L R, or scale · L Rᵀ; R and T have rows of m rounded up to whole vectors."""
    width = padded(m, lanes)
    block, to = Panels(panels, m), rows_at(target, width)
    if is_turned:
        pack(turned(rows_at(right, width)), m, m, scale, lanes, block)
    else:
        for p in range(m):
            for j in range(0, width, lanes):
                into_panels(block, p, j, width, load(right, p * width + j) * scale, lanes)
    multiply(left, padded(m, TILE_ROWS), block, m, width, lanes, to, to)


@inline
def _identity_less(diagonal: Any, x: Any, target: Any, m: int, size: int, width: int, lanes: int) -> None:
    """T = diagonal · I − X."""
    for i in range(0, size, lanes):
        store(target, i, -load(x, i))
    for i in range(m):
        target[i * width + i] += diagonal


@inline
def _identity(diagonal: Any, target: Any, m: int, size: int, width: int) -> None:
    clear(target, size)
    for i in range(m):
        target[i * width + i] = diagonal


@cache
def pinv_gradient_kernel(dtype: np.dtype[Any]) -> Any:
    """Compile `differentiate(first, last, records)`; a task is one matrix."""
    lanes, kind, zero = element(dtype)
    one, quarter = dtype.type(1), dtype.type(0.25)
    seven, thirteen, fifteen = dtype.type(7), dtype.type(13), dtype.type(15)

    @compiled(f"gradient of iterative pinv {dtype}", GRADIENT_RECORD)
    def differentiate(first: int, last: int, records: Any) -> int:
        f = records[0]
        m, iterations = f.m, f.iterations
        all_a, all_grad_z, all_grad_a = pointer(f.a, zero), pointer(f.grad_z, zero), pointer(f.grad_a, zero)
        width = padded(m, lanes)
        size = padded(m, TILE_ROWS) * width
        sizes = (
            *(size, (iterations + 1) * size, size, size, size, size, size, size, size, size, size),
            *(m * width, width, width),
        )
        buffer = np.empty(room(sizes), kind)
        a, all_z, p, t, s, r, by_a, by_z, by_r, by_s, by_p, panels, columns, rows = cut(buffer, sizes)
        by_t = t  # T is read for the last time before dT is written
        for item in range(first, last):
            given = shifted(all_a, item * m * m)
            grad_z, grad_a = shifted(all_grad_z, item * m * m), shifted(all_grad_a, item * m * m)
            clear(a, size)
            clear(all_z, size)
            clear(by_z, size)
            clear(by_a, size)
            clear(columns, width)
            clear(rows, width)
            for i in range(m):
                for j in range(m):
                    value = given[i * m + j]
                    a[i * width + j] = value
                    by_z[i * width + j] = grad_z[i * m + j]
                    columns[j] += abs(value)
                    rows[i] += abs(value)
            norm_1 = norm_inf = zero
            for i in range(m):
                norm_1, norm_inf = max(norm_1, columns[i]), max(norm_inf, rows[i])
            norms = norm_1 * norm_inf
            if norms == 0:  # A = 0, hence Z = 0, whatever A changes to: the norms count as infinite
                for i in range(m * m):
                    grad_a[i] = 0
                continue
            for i in range(m):
                for j in range(m):
                    all_z[i * width + j] = a[j * width + i] / norms

            for step in range(2 * iterations):
                back = step >= iterations
                at = 2 * iterations - 1 - step if back else step
                z = shifted(all_z, at * size)
                clear(p, size)
                _add_product(rows_at(a, width), z, False, one, p, panels, m, lanes)
                _identity_less(seven, p, t, m, size, width, lanes)
                _identity(fifteen, s, m, size, width)
                _add_product(rows_at(p, width), t, False, -one, s, panels, m, lanes)
                _identity(thirteen, r, m, size, width)
                _add_product(rows_at(p, width), s, False, -one, r, panels, m, lanes)
                if not back:
                    following = shifted(all_z, (at + 1) * size)
                    clear(following, size)
                    _add_product(rows_at(z, width), r, False, quarter, following, panels, m, lanes)
                    continue
                clear(by_r, size)
                clear(by_s, size)
                clear(by_p, size)
                _add_product(turned(rows_at(z, width)), by_z, False, quarter, by_r, panels, m, lanes)
                _add_product(turned(rows_at(p, width)), by_r, False, -one, by_s, panels, m, lanes)
                _add_product(rows_at(by_r, width), s, True, -one, by_p, panels, m, lanes)
                _add_product(rows_at(by_s, width), t, True, -one, by_p, panels, m, lanes)
                clear(by_t, size)
                _add_product(turned(rows_at(p, width)), by_s, False, -one, by_t, panels, m, lanes)
                for i in range(0, size, lanes):
                    store(by_p, i, load(by_p, i) - load(by_t, i))
                _add_product(rows_at(by_p, width), z, True, one, by_a, panels, m, lanes)
                clear(s, size)
                _add_product(rows_at(by_z, width), r, True, quarter, s, panels, m, lanes)
                _add_product(turned(rows_at(a, width)), by_p, False, one, s, panels, m, lanes)
                for i in range(0, size, lanes):
                    store(by_z, i, load(s, i))

            along, count_1, count_inf = zero, zero, zero
            for i in range(m):
                count_1 += one if columns[i] == norm_1 else zero
                count_inf += one if rows[i] == norm_inf else zero
                for j in range(m):
                    along += by_z[i * width + j] * all_z[i * width + j]
            by_norms = -along / norms
            for i in range(m):
                for j in range(m):
                    by_size = zero
                    if columns[j] == norm_1:
                        by_size += by_norms * norm_inf / count_1
                    if rows[i] == norm_inf:
                        by_size += by_norms * norm_1 / count_inf
                    if a[i * width + j] < 0:
                        by_size = -by_size
                    elif a[i * width + j] == 0:
                        by_size = zero
                    grad_a[i * m + j] = by_a[i * width + j] + by_z[j * width + i] / norms + by_size
        return DONE

    return differentiate
