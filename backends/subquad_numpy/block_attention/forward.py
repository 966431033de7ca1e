"""The forward pass of block attention: online softmax over the tiles of keys that a block of rows reads."""

import math
from functools import cache
from typing import Any

import numpy as np

from subquad_numpy.block_attention.sampled import Ahead, weigh
from subquad_numpy.block_attention.tiles import (
    ARRAYS,
    INFINITY,
    KEYS,
    REACHES,
    ROWS,
    SIZES,
    Limits,
    at,
    hide,
    is_finite,
    load_limits,
    load_reach,
    multiply_seen,
    pack_rows,
    seeing_half,
    seen_by_all,
    seen_keys,
    seen_part,
    task_rows,
    visible_keys,
    whole_tile,
)
from subquad_numpy.block_attention.visible_sums import add_visible, sum_values, write_means
from subquad_numpy.codegen import (
    at_least,
    cut,
    load,
    pointer,
    replace_where_zero,
    room,
    shifted,
    store,
    where_negative,
    zeros,
)
from subquad_numpy.codegen.compile import DONE, compiled, element
from subquad_numpy.codegen.copies import clear, turn
from subquad_numpy.codegen.matmul import (
    PANEL_VECTORS,
    TILE_ROWS,
    padded,
    panel_at,
    rows_at,
    turned,
)
from subquad_numpy.codegen.segments import add_means
from subquad_numpy.codegen.side_by_side import exp_negative
from subquad_numpy.codegen.split_halves import add_halves, keep_halves
from subquad_numpy.codegen.stored import round_row, stored_as
from subquad_numpy.codegen.vector_math import LEAST
from subquad_numpy.runtime.arguments import Fields, fields
from subquad_numpy.runtime.stored import AS_COMPUTED

# halves: the lower halves of `out` and of the output before, where `keeps` says that out takes upper halves alone. For
# rows that read all keys of an interval: `effective`, (Σ exp x)² / Σ exp(2 x), and the mean of the values they see. For
# rows that read the same whole segments of keys: `key_means`, zero at first, of the segments of all keys
# `picks`: which rows of q are the n rows of the call, if they are not all
RESULTS: Fields = {"before_out": 2, "before_lse": 1, "out": 2, "halves": 2, "lse": 1, "effective": 1, "mean": 2}
FORWARD_RECORD = fields(SIZES, {"keeps": None, "segments": None}, ARRAYS, RESULTS, {"key_means": 2, "picks": 1})


@cache
def block_attention_kernel(dtype: np.dtype[Any]) -> Any:
    """Compile the output and the log-sum-exp of rows; a task is a block of rows, or a part of one."""
    lanes, kind, zero = element(dtype)
    panel = PANEL_VECTORS * lanes
    word, byte, line = np.int32(0), np.uint8(0), 64 // np.dtype(dtype).itemsize
    keys = -(-KEYS // TILE_ROWS) * TILE_ROWS

    @compiled(f"block attention {dtype}", FORWARD_RECORD)
    def forward(first: int, last: int, records: Any) -> int:
        f = records[0]
        d, d_v, n_kv, size, listed = f.d, f.d_v, f.n_kv, f.size, f.listed
        width = padded(f.rows, panel)
        high_v, wide_v = padded(d_v, TILE_ROWS), padded(d_v, lanes)
        tall_v, averaged = max(high_v, wide_v), 1 if f.mean != 0 else 0
        sizes = (
            *(width, width, width, f.rounds * width, d * width, keys * panel, tall_v * width, high_v * panel),
            *(width, width, width, panel, panel, keys, keys * padded(d, TILE_ROWS), keys * high_v),
            *(width, width, width * d, lanes * wide_v),
            *(width, averaged * (keys + 1) * wide_v, averaged * (keys + 1), averaged * (keys + 1)),
            *(averaged * (width + width // lanes) * wide_v, width + width // lanes, lanes, width // lanes * REACHES),
        )
        buffer = np.empty(room(sizes), kind)
        cuts = cut(buffer, sizes)
        before, stop, avoid, met, q, x, total, part = cuts[:8]
        top, seen, poison, nothing, faded, fine, own_k, own_v = cuts[8:16]
        factors, shares, wide, rows = cuts[16:20]
        twice, upto, shown_upto, cut_keys, sums_seen, counts, edge, reach = cuts[20:]
        q_as, k_as = stored_as(f.stored, 0), stored_as(f.stored, 1)
        v_as, out_as = stored_as(f.stored, 2), stored_as(f.stored, 3)
        limits = Limits(before, stop, avoid, met)
        clear(nothing, panel)
        for task in range(first, last):
            item, tile = task // f.tiles, task % f.tiles
            if f.items != 0:  # of causal rows, the last ones take longest, and threads end together if these come first
                item, tile = task % f.items, f.tiles - 1 - task // f.items
            f = records[item]
            block, row, count = task_rows(tile, f.n, size, f.rows, listed)
            if count == 0:
                continue
            k, v, numbers = pointer(f.k, zero), pointer(f.v, zero), pointer(f.numbers, zero)
            blocks, out, lse = pointer(f.blocks, word), pointer(f.out, zero), pointer(f.lse, zero)
            order_q, order_k = pointer(f.order_q, word), pointer(f.order_k, word)
            effective, mean = pointer(f.effective, zero), pointer(f.mean, zero)
            before_out, before_lse = pointer(f.before_out, zero), pointer(f.before_lse, zero)
            halves = pointer(f.halves, zero)
            used = padded(count, lanes)
            low, high, inner_low, inner_high = load_limits(f, row, count, width, word, limits)
            load_reach(limits, n_kv, used, lanes, reach)
            picks = f.picks if f.picks != 0 else f.order_q
            pack_rows(
                pointer(f.q, zero), q_as, f.q_row, pointer(picks, word), picks != 0, row, count, d, used, numbers[0], q,
                lanes, wide,
            )  # fmt: skip
            clear(total, tall_v * used)
            for i in range(0, used, lanes):
                store(top, i, LEAST(zeros(top)))
                store(seen, i, zeros(seen))
                store(poison, i, zeros(poison))
                store(twice, i, zeros(twice))
            clear(sums_seen, averaged * (width + width // lanes) * wide_v)
            clear(counts, width + width // lanes)
            is_alone = f.tiles == 1 and listed == 0 and f.place == 0 and f.order_k == 0
            every = f.place == 0 and f.order_k == 0 and f.avoid == 0 and f.rounds == 0
            for entry in range(max(listed, 1)):
                begin, end = (low // ROWS * ROWS, high) if f.place == 0 else (0, n_kv)
                if listed > 0:
                    number = blocks[block * listed + entry]
                    begin, end = number * size, min((number + 1) * size, n_kv)
                    if number < 0:
                        end = begin
                for j in range(begin, end, KEYS):
                    many = min(KEYS, end - j)
                    if f.place == 0 and f.order_k == 0 and (j >= high or j + many <= low):
                        continue
                    shown = visible_keys(f, j, many, byte)
                    if shown == 0:
                        continue
                    is_plain = every and shown == many  # but for the intervals of rows
                    is_whole = is_plain and j >= inner_low and j + many <= inner_high
                    has_order = f.order_k != 0
                    a = whole_tile(k, k_as, f.k_row, order_k, has_order, j, many, d, n_kv, False, lanes, own_k)
                    if f.key_means != 0 and tile == 0:
                        here, until = max(j, low), min(j + many, high)
                        add_means(
                            shifted(a.data, -j * a.row), AS_COMPUTED, a.row, n_kv, d, f.segments, here, until,
                            pointer(f.key_means, zero), lanes, edge,
                        )  # fmt: skip
                    b = whole_tile(v, v_as, f.v_row, order_k, has_order, j, many, d_v, n_kv, True, lanes, own_v)
                    # a sum that is finite has no values that are not, and is at hand
                    is_bad = not is_whole
                    if f.mean != 0:
                        sum_values(
                            f, b, j, many, is_plain, limits, reach, count, lanes, byte, upto, shown_upto, cut_keys, edge
                        )  # fmt: skip
                        is_bad = is_bad and not is_finite(rows_at(upto, wide_v), many, 1, wide_v, lanes)
                    is_bad = is_bad and not is_finite(b, 0, many, d_v, lanes)
                    if is_bad:  # 0 · NaN is NaN: values that are not finite are 0 here, and reach rows by `poison`
                        for t in range(many):
                            fine[t] = 1 if is_finite(b, t, 1, d_v, lanes) else 0
                            for p in range(high_v):
                                own_v[t * high_v + p] = b.data[t * b.row + p] if fine[t] != 0 and p < d_v else 0
                        b = rows_at(own_v, high_v)
                        if f.mean != 0:
                            sum_values(
                                f, b, j, many, is_plain, limits, reach, count, lanes, byte, upto, shown_upto, cut_keys,
                                edge,
                            )  # fmt: skip
                    if f.mean != 0:
                        add_visible(
                            f, j, many, limits, reach, count, lanes, upto, shown_upto, sums_seen, counts
                        )  # fmt: skip
                    # few rows read all keys from memory; more rows find them in a cache
                    asks = f.effective != 0 or (is_alone and j + KEYS < end)
                    active, done = 0, 0  # vectors of rows that see a key of the tile
                    for i in range(0, used if asks else 0, lanes):
                        _, until = seen_keys(f, reach, i, lanes, j, many)
                        active += 1 if until > 0 else 0
                    for start in range(0, used, panel):
                        step = min(panel, used - start)
                        base, columns, near, seeing = start, step, 0, many
                        if not is_whole:
                            base, columns, near, seeing = seen_part(f, reach, start, step, lanes, j, many)
                            if columns == 0:
                                continue
                        keys_part = rows_at(shifted(a.data, near * a.row), a.row)
                        values_part = rows_at(shifted(b.data, near * b.row), b.row)
                        half = -1 if is_whole else seeing_half(f, reach, base, lanes, j + near, seeing)
                        multiply_seen(
                            keys_part, padded(seeing, TILE_ROWS), shifted(q, start * d + base - start), step, d,
                            columns, half, lanes, nothing, x,
                        )  # fmt: skip
                        for column in range(0, columns, lanes):
                            i = base + column
                            whole = seeing if is_whole else 0  # keys that all rows of the vector see
                            if is_plain and not is_whole:
                                whole = seen_by_all(reach, i, lanes, j + near, seeing)
                            if whole < seeing:
                                hide(
                                    f, j + near + whole, seeing - whole, i, width, limits, word, byte, column,
                                    shifted(x, whole * columns), columns,
                                )  # fmt: skip
                            if is_bad:
                                for t in range(seeing):
                                    if fine[near + t] == 0:
                                        logit = load(x, t * columns + column)
                                        gone = where_negative(logit - LEAST(logit), zeros(x), zeros(x) + math.nan)
                                        store(poison, i, load(poison, i) + gone)
                            old = load(top, i)
                            new = old
                            for t in range(0, seeing - 1, 2):  # a maximum waits for the one before: two in one step
                                one, other = load(x, t * columns + column), load(x, (t + 1) * columns + column)
                                new = at_least(new, at_least(one, other))
                            if seeing % 2 != 0:
                                new = at_least(new, load(x, (seeing - 1) * columns + column))
                            (fade,) = exp_negative((old - new,))
                            store(top, i, new)
                            store(faded, column, fade)
                            if asks:
                                here = j + KEYS + done * -(-KEYS // active)
                                weigh(
                                    shifted(x, column), columns, seeing, new, fade, shifted(seen, i), shifted(twice, i),
                                    active, Ahead(k, k_as, here * f.k_row, f.k_row, d),
                                    Ahead(v, v_as, here * f.v_row, f.v_row, d_v), line,
                                )  # fmt: skip
                                done += 1
                                continue
                            along = load(seen, i) * fade
                            for t in range(seeing):
                                (e,) = exp_negative((load(x, t * columns + column) - new,))
                                store(x, t * columns + column, e)
                                along = along + e
                            store(seen, i, along)
                        if half >= 0:
                            clear(part, high_v * columns)
                        multiply_seen(
                            turned(values_part), high_v, x, columns, seeing, columns, half, lanes, nothing, part
                        )  # fmt: skip
                        sums = shifted(total, start * tall_v + base - start)
                        for column in range(0, columns, lanes):
                            fade = load(faded, column)
                            for p in range(high_v):
                                at_p = p * step + column
                                store(sums, at_p, load(sums, at_p) * fade + load(part, p * columns + column))
            for i in range(0, used, lanes):
                found = load(seen, i)
                store(factors, i, replace_where_zero(found, (zeros(seen) + 1.0) / found, found))
            for c in range(count if f.lse != 0 else 0):
                found, mine = seen[c], at(order_q, f.order_q != 0, row + c)
                level = top[c] + math.log(found) if found != 0 else -INFINITY
                shares[c] = -1
                if f.before_lse != 0 and before_lse[mine] != -INFINITY:  # join the output over other keys
                    both = max(level, before_lse[mine])
                    old = math.exp(before_lse[mine] - both)
                    new = math.exp(level - both) if found != 0 else old * 0
                    shares[c], factors[c] = old / (old + new), factors[c] * new / (old + new)
                    level = both + math.log(old + new)
                lse[mine] = level
                if f.effective != 0:
                    effective[mine] = found * found / twice[c] if found != 0 else 0
            if f.mean != 0:
                write_means(f, row, count, lanes, order_q, sums_seen, counts, poison, mean, edge)
            for base in range(0, used, lanes):
                start, columns = panel_at(base, used, lanes)
                sums = shifted(total, start * tall_v + base - start)
                factor, gone = load(factors, base), load(poison, base)
                for p in range(d_v):
                    store(sums, p * columns, load(sums, p * columns) * factor + gone)
                for p in range(0, d_v, lanes):
                    source, target = shifted(sums, p * columns), shifted(rows, p)
                    turn(source, source, columns, target, target, wide_v)
                for c in range(base, min(base + lanes, count)):
                    own, mine = shifted(rows, (c - base) * wide_v), at(order_q, f.order_q != 0, row + c)
                    if f.before_lse != 0 and not shares[c] < 0:  # a share may be NaN
                        if f.halves != 0:
                            add_halves(out, halves, mine * d_v, d_v, lanes, shares[c], own)
                        for p in range(d_v if f.halves == 0 else 0):
                            own[p] += before_out[mine * d_v + p] * shares[c]
                    if f.keeps != 0:
                        keep_halves(out, halves, mine * d_v, d_v, lanes, own)
                    else:
                        round_row(out, out_as, mine * d_v, d_v, lanes, own)
        return DONE

    return forward
