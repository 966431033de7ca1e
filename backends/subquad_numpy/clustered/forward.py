"""The forward pass of clustered attention."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np

from subquad_numpy.block_attention.tiles import INFINITY, is_finite, whole_tile
from subquad_numpy.clustered.members import add_values, ask_for_part, has_bad, weigh_members
from subquad_numpy.clustered.runs import append_run, list_clusters
from subquad_numpy.clustered.selection import choose, collect, find_bound, find_bound_of_share, room_for, search
from subquad_numpy.clustered.tiles import ARRAYS, ROWS, SIZES, TILE, last_cluster, leave_near, pack_queries, weigh
from subquad_numpy.codegen import (
    at_least,
    cut,
    load,
    pointer,
    room,
    shifted,
    store,
    total,
    zeros,
)
from subquad_numpy.codegen.compile import DONE, compiled, element
from subquad_numpy.codegen.copies import clear, turn
from subquad_numpy.codegen.listed_rows import add_listed, multiply_listed
from subquad_numpy.codegen.matmul import PANEL_VECTORS, TILE_ROWS, Panels, multiply, padded, rows_at, turned
from subquad_numpy.codegen.stored import round_row, rows_of
from subquad_numpy.codegen.vector_math import LEAST, exp_negative
from subquad_numpy.runtime.arguments import fields
from subquad_numpy.runtime.stored import AS_COMPUTED

FORWARD_RECORD = fields(SIZES, ARRAYS, {"out": 2, "lse": 1})


@cache
def clustered_attention_kernel(dtype: np.dtype[Any]) -> Any:
    """Compile the output and the log-sum-exp of rows; a task is a block of rows."""
    lanes, kind, zero = element(dtype)
    panel = PANEL_VECTORS * lanes
    word = np.int32(0)
    whole_keys = -(-TILE // TILE_ROWS) * TILE_ROWS

    @compiled(f"clustered attention {dtype}", FORWARD_RECORD)
    def forward(first: int, last: int, records: Any) -> int:
        f = records[0]
        d, d_v, n, clusters, size, groups = f.d, f.d_v, f.n, f.clusters, f.size, f.groups
        widest, entries = max(f.opened, f.expanded), f.clusters + f.groups
        high_v, wide_v, wide_s = padded(d_v, TILE_ROWS), padded(d_v, lanes), padded(size, lanes)
        every = f.always + f.opened
        sizes = (
            *(
                d * panel,
                f.bands * panel,
                (padded(entries, TILE_ROWS) + TILE_ROWS) * panel,
                panel,
                groups * panel,
            ),
            *(entries, panel, panel, whole_keys * max(padded(d + f.bands, TILE_ROWS), high_v)),
            max(high_v, wide_v) * panel,
            *(ROWS * wide_v, ROWS, ROWS, wide_s, TILE_ROWS * wide_s, wide_s, d * size + lanes, size * d_v + wide_v),
            panel * room_for(widest, lanes),
            *(whole_keys, panel, panel, ROWS * lanes, ROWS * d),
        )
        buffer = np.empty(room(sizes), kind)
        (
            packed, squares, x, bounds, shut, logs, stops, nothing, own, sums, acc, top, seen, here, e, apart, own_k,
            own_v, values, fine, poison, totals, of_members, own_q,
        ) = cut(buffer, sizes)  # fmt: skip
        left, starts, names = (
            np.zeros(entries, np.int32),
            np.empty(clusters + 1, np.int32),
            np.empty(widest + f.always + 1, np.int32),
        )
        lists = np.empty(room((ROWS * every, ROWS * every)), np.int32)
        opened, of_row = cut(lists, (ROWS * every, ROWS * every))
        opens, collected = np.empty(ROWS, np.int32), np.empty(panel, np.int32)
        numbers_of = np.empty(panel * room_for(widest, lanes), np.int32)
        keys_of, at_of, ids = np.empty(entries, np.int32), np.zeros(entries, np.int32), np.empty(entries, np.int32)
        needed = np.empty(groups, np.int32)
        firsts, runs_of = (
            np.empty(entries // TILE + groups + 4, np.int32),
            np.empty(entries // TILE + groups + 4, np.int32),
        )
        clear(nothing, panel)
        for s in range(wide_s):
            here[s] = s
        for task in range(first, last):
            f = records[task // f.tasks]
            row = task % f.tasks * ROWS
            count = min(ROWS, n - row)
            k, v, numbers = pointer(f.k, zero), pointer(f.v, zero), pointer(f.numbers, zero)
            q, _ = rows_of(pointer(f.q, zero), f.stored, row * d, d, count, d, lanes, own_q)
            out, lse = pointer(f.out, zero), pointer(f.lse, zero)
            counts, stop = pointer(f.counts, word), pointer(f.stop, word)
            order, place = pointer(f.order, word), pointer(f.place, word)
            before_out, before_lse = pointer(f.before_out, zero), pointer(f.before_lse, zero)
            scale, share = numbers[0], numbers[1]
            for c in range(clusters):
                keys_of[c], starts[c] = counts[c], 0
            for g in range(groups):
                keys_of[clusters + g] = 0
                for c in range(f.always + g * f.group, f.always + (g + 1) * f.group):
                    keys_of[clusters + g] += counts[c]
            for c in range(entries):
                logs[c] = math.log(keys_of[c]) if keys_of[c] > 0 else -INFINITY
            starts[clusters] = 0
            for base in range(0, count, panel):
                many_rows = min(panel, count - base)
                most, least = 0, clusters
                for c in range(panel):
                    limit = min(stop[row + base + c], clusters) if c < many_rows else 0
                    stops[c] = limit
                    most, least = max(most, limit), min(least, limit) if c < many_rows else least
                pack_queries(q, base, many_rows, d, f.bands, panel, lanes, scale, packed, squares)
                # groups first, then clusters, of which the rows of the panel weigh some
                whole = max(0, min(groups, (most - f.always) // f.group))
                runs = append_run(firsts, runs_of, 0, 0, 0, whole)
                behind, length = runs, 0
                for depth in range(2 if whole > 0 else 1):
                    is_group, begin, at = depth == 0 and whole > 0, length, 0 if depth == 0 and whole > 0 else behind
                    if not is_group:
                        runs = list_clusters(f.always, whole, f.group, most, needed, firsts, runs_of, behind)
                    for r in range(at, runs):
                        weigh(
                            f, is_group, firsts[r], runs_of[r], whole, panel, lanes, zero, packed, squares, logs, stops,
                            shut, nothing, own, shifted(x, length * panel),
                        )  # fmt: skip
                        for t in range(runs_of[r]):
                            ids[length + t] = firsts[r] + t
                            at_of[firsts[r] + t + (clusters if is_group else 0)] = length + t + 1
                        length += runs_of[r]
                    if f.place != 0:
                        leave_near(f, is_group, row + base, many_rows, panel, word, keys_of, at_of, left, x)
                    for t in range(begin, length):
                        at_of[ids[t] + (clusters if is_group else 0)] = 0
                    kept = 0 if is_group else min(f.always, most)
                    wanted = f.expanded if is_group else f.opened
                    mine = shifted(x, begin * panel)
                    if wanted > 0:
                        if is_group or share == -INFINITY:
                            find_bound(kept, length - begin, wanted, panel, lanes, mine, bounds)
                        else:
                            find_bound_of_share(
                                share, begin, begin + kept, length, panel, lanes, x, shifted(before_lse, row + base),
                                many_rows if f.before_lse != 0 else 0, totals, bounds,
                            )  # fmt: skip
                        collect(kept, length - begin, wanted, panel, lanes, mine, bounds, collected, values, numbers_of)
                    if is_group:
                        for g in range(whole):
                            needed[g] = 0
                            for column in range(0, panel, lanes):
                                store(shut, g * panel + column, zeros(x) - 1.0)
                    for c in range(many_rows):
                        limit, many = int(stops[c]), 0
                        if not is_group:
                            many = min(f.always, limit)
                            for t in range(many):
                                names[t] = t
                        if wanted > 0 and collected[c] <= room_for(wanted, lanes):
                            many += choose(c, collected[c], wanted, lanes, here, values, numbers_of, names, many)
                        elif wanted > 0:
                            many += search(c, kept, length - begin, wanted, panel, mine, bounds, values, names, many)
                        if is_group:
                            sees = max(0, (limit - f.always) // f.group)
                            for g in range(sees, whole):
                                shut[g * panel + c] = 0
                                needed[g] = 1 if g == sees else needed[g]
                        for i in range(many):
                            mine[names[i] * panel + c] = -INFINITY
                            if is_group:
                                shut[names[i] * panel + c], needed[names[i]] = 0, 1
                            else:
                                opened[(base + c) * every + i] = ids[begin + names[i]]
                                starts[ids[begin + names[i]] + 1] += 1
                        if not is_group:
                            opens[base + c] = many
                for column in range(0, panel, lanes):
                    best = LEAST(zeros(x))
                    for t in range(length):
                        best = at_least(best, load(x, t * panel + column))
                    along = zeros(x)
                    for t in range(length):
                        weight = exp_negative(load(x, t * panel + column) - best)
                        store(x, t * panel + column, weight)
                        along = along + weight
                    store(shifted(top, base), column, best)
                    store(shifted(seen, base), column, along)
                    store(poison, column, zeros(x))
                clear(sums, high_v * panel)
                done = 0
                for i in range(runs):
                    is_group, j, many = i < behind, firsts[i], runs_of[i]
                    mean_values = pointer(f.group_values if is_group else f.mean_values, zero)
                    rows = groups if is_group else clusters
                    b = whole_tile(mean_values, AS_COMPUTED, d_v, nothing, False, j, many, d_v, rows, True, lanes, own)
                    if last_cluster(f, is_group, j + many - 1) >= least and not is_finite(b, 0, many, d_v, lanes):
                        # 0 · NaN is NaN: values that are not finite are 0 here, and reach rows by `poison`
                        for t in range(many):
                            fine[t] = 1 if is_finite(b, t, 1, d_v, lanes) else 0
                            for p in range(high_v):
                                own[t * high_v + p] = b.data[t * b.row + p] if fine[t] != 0 and p < d_v else 0
                            if fine[t] == 0:
                                for c in range(panel):
                                    if stops[c] > last_cluster(f, is_group, j + t):
                                        poison[c] = math.nan
                        b = rows_at(own, high_v)
                    multiply(
                        turned(b), high_v, Panels(shifted(x, done * panel), many), many, panel, lanes,
                        rows_at(sums, panel), rows_at(sums, panel),
                    )  # fmt: skip
                    done += many
                for p in range(wide_v):
                    for column in range(0, panel, lanes):
                        own_sum = load(sums, p * panel + column) + load(poison, column) if p < d_v else zeros(x)
                        store(sums, p * panel + column, own_sum)
                for column in range(0, many_rows, lanes):
                    for p in range(0, wide_v, lanes):
                        source, target = shifted(sums, p * panel + column), shifted(acc, (base + column) * wide_v + p)
                        turn(source, source, panel, target, target, wide_v)
            clear(of_members, count * lanes)
            # rows by the clusters that they opened
            for c in range(clusters):
                starts[c + 1] += starts[c]
            for r in range(count):
                for i in range(opens[r]):
                    c = opened[r * every + i]
                    of_row[starts[c]] = r
                    starts[c] += 1
            begin = 0
            for c in range(clusters):
                end = starts[c]
                if end == begin:
                    continue
                keys, rows_v, many = shifted(k, c * d * size), shifted(v, c * size * d_v), counts[c]
                if c == clusters - 1:  # vectors read beyond the last row
                    for i in range(d * size):
                        own_k[i] = keys[i]
                    for i in range(size * d_v):
                        own_v[i] = rows_v[i]
                    keys, rows_v = own_k, own_v
                if f.place != 0:
                    for s in range(size):
                        apart[s] = order[c * size + s]
                reach = float(f.reach) if f.place != 0 else -1.0
                careful = f.place != 0 and has_bad(rows_v, many, d_v)
                ahead = c + 1  # the next cluster that is read
                while ahead < clusters - 1 and starts[ahead] == end:
                    ahead += 1
                tiles = -(-(end - begin) // TILE_ROWS)
                for i in range(begin, end, TILE_ROWS):
                    together = min(TILE_ROWS, end - i)
                    ask_for_part(k, ahead * d * size, d * size, (i - begin) // TILE_ROWS, tiles, lanes)
                    ask_for_part(v, ahead * size * d_v, size * d_v, (i - begin) // TILE_ROWS, tiles, lanes)
                    these = shifted(of_row, i)
                    multiply_listed(q, d, these, together, keys, size, d, wide_s, lanes, nothing, e, wide_s)
                    weigh_members(
                        e, wide_s, together, these, scale, size, many, wide_v, lanes, apart, place, row, reach, here,
                        top, seen, of_members, acc,
                    )  # fmt: skip
                    for t in range(together if careful else 0):
                        own_at = place[row + these[t]]
                        for s in range(many):
                            if e[t * wide_s + s] != 0 or abs(apart[s] - own_at) > f.reach:
                                add_values(
                                    shifted(e, t * wide_s + s), 1, shifted(rows_v, s * d_v), d_v, wide_v, lanes,
                                    shifted(acc, these[t] * wide_v),
                                )  # fmt: skip
                    if not careful:
                        add_listed(e, wide_s, these, together, rows_v, d_v, many, wide_v, lanes, nothing, acc, wide_v)
                begin = end
            for r in range(count):
                found = seen[r] + total(load(of_members, r * lanes))
                level = top[r] + math.log(found) if found != 0 else -INFINITY
                factor = 1 / found if found != 0 else found
                share, joins = found, False  # `found` may be NaN
                if f.before_lse != 0 and before_lse[row + r] != -INFINITY:  # join the output over other keys
                    joins = True
                    both = max(level, before_lse[row + r])
                    old = math.exp(before_lse[row + r] - both)
                    new = math.exp(level - both) if found != 0 else old * 0
                    share, factor, level = old / (old + new), factor * new / (old + new), both + math.log(old + new)
                mine, given = shifted(acc, r * wide_v), shifted(before_out, (row + r) * d_v)
                whole = d_v // lanes * lanes if found != 0 else 0
                for p in range(0, whole, lanes):
                    value = load(mine, p) * factor
                    if joins:
                        value = value + load(given, p) * share
                    store(mine, p, value)
                for p in range(whole, d_v):
                    value = mine[p] * factor if found != 0 else found
                    if joins:
                        value += given[p] * share
                    mine[p] = value
                round_row(out, f.stored, (row + r) * d_v, d_v, lanes, mine)
                lse[row + r] = level
        return DONE

    return forward
