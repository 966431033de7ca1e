"""The state that keys leave, in attention through exponential features, by one fused kernel.

    S = Σ_j exp(x[j]) v[j]ᵀ,  s = Σ_j exp(x[j]),  both over exp(shift)

in the letters of `blocks`. This is one half of FAVOR+; `attend` is the other. With W = q̃ᵀ, S / s is the softmax
attention of a small number of queries q̃, one half of Nyström attention. A task is one chunk of rows, for up to `most`
of the features. The shift grows from block to block; sums over earlier blocks are then faded.
"""

from functools import cache
from typing import Any, NamedTuple

import numpy as np

from subquad_numpy.codegen import at_least, copy, cut, inline, load, pointer, room, shifted, spread, store
from subquad_numpy.codegen.compile import DONE, compiled, element
from subquad_numpy.codegen.copies import clear
from subquad_numpy.codegen.matmul import TILE_ROWS, Matrix, Panels, into_panels, multiply, padded, rows_at, turned
from subquad_numpy.codegen.side_by_side import exp_negative
from subquad_numpy.codegen.stored import load_stored_part, stored_as
from subquad_numpy.codegen.vector_math import LEAST
from subquad_numpy.features.blocks import (
    HEAD,
    KEYS,
    OF_KEYS,
    VALUES,
    Scratch,
    Side,
    ask_row,
    key_exponents,
    load_center,
    pack_keys,
    sizes_of,
    store_rows,
    visible_rows,
    widths_of,
)
from subquad_numpy.features.phi import ELU, MAPS, log_of, times_value
from subquad_numpy.runtime.arguments import fields

ROWS = 16 * TILE_ROWS  # rows of a block: their exponents for 256 features take 128 kB

# `most` is the maximum number of features of a task. shift, kv and k_sum point to the sums of the first chunk; the next
# chunk's follow `chunk_step` features later.
SUMMARIZE_RECORD = fields(HEAD, OF_KEYS, {"most": None, "shift": 2, "kv": 2, "k_sum": 2, "chunk_step": None})


class Sums(NamedTuple):
    """The sums over keys in scratch memory, and what the sums of a block of rows need there."""

    shift: Any
    k_sum: Any
    kv: Any  # (m, d_out)
    new: Any  # the shift with a block
    block_sum: Any
    block_kv: Any
    phi_k: Any  # a `Matrix` of ROWS rows
    panels: Any  # of values
    places: Any  # of the rows of a block


@inline
def sum_rows(
    k: Any, k_as: int, v: Any, v_as: int, d_v: int, mask: Any, has_mask: bool, row: int, stop: int, keys: Any, m: int,
    sums: Any, scratch: Any, lanes: int, phi: int,
) -> None:  # fmt: skip
    """Write the sums over the keys from `row` to `stop`, for m features; k and v are a `Matrix` each."""
    shift, k_sum, new, block_sum, x, stride = (
        sums.shift, sums.k_sum, sums.new, sums.block_sum, sums.phi_k.data, sums.phi_k.row,
    )  # fmt: skip
    width, height, _, _, d_out = widths_of(m, keys.d, d_v, lanes)
    for i in range(stride):
        shift[i] = -float("inf")
    begun = False
    while True:
        count, row = visible_rows(mask, has_mask, row, stop, ROWS, sums.places)
        if count == 0:
            break
        key_exponents(k, k_as, sums.places, count, keys, sums.phi_k, scratch, lanes, phi)
        for r in range(count):
            for j in range(0, d_v, lanes):
                value = load_stored_part(v.data, v_as, sums.places[r] * v.row + j, d_v - j, lanes, scratch.edge)
                into_panels(sums.panels, r, j, d_out, value, lanes)
        # the new shift is the maximum of the old one and of the block's exponents, for each feature
        copy(shift, width, new)
        for r in range(0, count, 4):  # a maximum waits for the one before: four rows in one step
            last = count - 1 - r
            for i in range(0, width, lanes):
                place = r * stride + i
                a, b = log_of(load(x, place), phi), log_of(load(x, place + min(1, last) * stride), phi)
                c = log_of(load(x, place + min(2, last) * stride), phi)
                d = log_of(load(x, place + min(3, last) * stride), phi)
                store(new, i, at_least(load(new, i), at_least(at_least(a, b), at_least(c, d))))
        clear(block_sum, width)
        for r in range(count):
            if row + r < stop:  # rows of the next block are asked for meanwhile
                ask_row(k.data, k_as, (row + r) * k.row, keys.d, lanes)
                ask_row(v.data, v_as, (row + r) * v.row, d_v, lanes)
            for i in range(0, width, lanes):
                y = load(x, r * stride + i)
                (e,) = exp_negative((log_of(y, phi) - at_least(load(new, i), LEAST(y)),))
                e = times_value(e, y, phi)
                store(x, r * stride + i, e)
                store(block_sum, i, load(block_sum, i) + e)
        target = sums.block_kv if begun else sums.kv
        zero_row = rows_at(scratch.nothing, 0)
        multiply(turned(sums.phi_k), height, sums.panels, count, d_out, lanes, zero_row, rows_at(target, d_out))
        if begun:
            for i in range(0, width, lanes):
                y = load(new, i)
                (fade,) = exp_negative((load(shift, i) - at_least(y, LEAST(y)),))  # held in `shift` until the loops end
                store(k_sum, i, load(k_sum, i) * fade + load(block_sum, i))
                store(shift, i, fade)
            for i in range(m):
                fade = spread(shift, i)
                for j in range(0, d_out, lanes):
                    place = i * d_out + j
                    store(sums.kv, place, load(sums.kv, place) * fade + load(sums.block_kv, place))
        else:
            copy(block_sum, width, k_sum)
        copy(new, width, shift)
        begun = True
    if not begun:
        clear(k_sum, width)
        clear(sums.kv, height * d_out)


@cache
def summarize_kernel(dtype: np.dtype[Any], phi_name: str) -> Any:
    """Compile the sums over keys; among the tasks of an item the chunk varies fastest, then the range of features."""
    lanes, kind, zero = element(dtype)
    phi = MAPS[phi_name].number

    @compiled(f"summarize {dtype} {phi_name}", SUMMARIZE_RECORD)
    def summarize(first: int, last: int, frames: Any) -> int:
        f = frames[0]
        n, d, all_m, d_v, chunks, chunk = sizes_of(f)
        k_as, v_as = stored_as(f.stored, KEYS), stored_as(f.stored, VALUES)
        most, parts = f.most, -(-all_m // f.most)
        depth = d + 1  # the last number of a key is −h|k|²
        widest, _, stride, d_in, d_out = widths_of(min(all_m, most), d, d_v, lanes)
        sizes = (
            *(lanes, stride, stride, stride, stride, max(stride, d_out), d_in),
            *(stride * d_out, stride * d_out, depth * widest, ROWS * d_out, ROWS * stride, ROWS * depth),
        )
        buffer, places = np.empty(room(sizes), kind), np.empty(ROWS, np.int64)
        edge, shift, new, k_sum, block_sum, nothing, center, kv, block_kv, packed, values, x, rows = cut(buffer, sizes)
        clear(nothing, max(stride, d_out))
        clear(x, ROWS * stride)
        clear(center, d_in)
        directions, numerator = Panels(packed, depth), rows_at(kv, d_out)
        sums = Sums(
            shift, k_sum, kv, new, block_sum, block_kv, rows_at(x, stride), Panels(values, ROWS), places,
        )  # fmt: skip
        scratch = Scratch(rows, nothing, edge)

        packed_W = packed_from = -1  # which directions `packed` holds: often those of the task before
        for task in range(first, last):
            f = frames[task // (chunks * parts)]
            k, v, numbers = pointer(f.x, zero), pointer(f.v, zero), pointer(f.numbers, zero)
            k_row, v_row, mask = f.x_row, f.v_row, pointer(f.mask, np.uint8(0))
            begin = task // chunks % parts * most
            m = min(most, all_m - begin)
            load_center(f, d, lanes, center, zero)
            if phi != ELU and (packed_W != f.W or packed_from != begin):
                packed_W, packed_from = f.W, begin
                W = shifted(pointer(f.W, zero), begin * f.W_column)
                pack_keys(Matrix(W, f.W_row, f.W_column), d, m, numbers[0], lanes, directions)
            keys = Side(d, center, numbers, directions, padded(m, lanes))
            row = task % chunks * chunk
            sum_rows(
                rows_at(k, k_row), k_as, rows_at(v, v_row), v_as, d_v, mask, f.mask != 0, row, min(n, row + chunk),
                keys, m, sums, scratch, lanes, phi,
            )  # fmt: skip

            place = task % chunks * f.chunk_step + begin
            copy(shift, m, shifted(pointer(f.shift, zero), place))
            copy(k_sum, m, shifted(pointer(f.k_sum, zero), place))
            store_rows(shifted(pointer(f.kv, zero), place * d_v), m, d_v, numerator, lanes, edge)
        return DONE

    return summarize
