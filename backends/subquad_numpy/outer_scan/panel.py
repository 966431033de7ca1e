"""The walk of a panel of the state through a block of time: tiles of its rows, one after the other."""

from collections.abc import Callable
from functools import cache
from typing import Any

from subquad_numpy.codegen import inline, shifted
from subquad_numpy.outer_scan.tile import PANEL_VECTORS, TILE_ROWS, advance_tile


@cache
def advance_panel(by_channel: bool) -> Callable[..., None]:
    """The function that takes a panel through `count` steps; for its arguments see `tile.advance_tile`.

    u and out have `width` numbers for each step, and the rows of the state S are `pitch` apart. With `has_bonus` a step
    reads the state that it finds.
    """
    many_wide, one_wide, many_narrow, one_narrow = (
        advance_tile(rows, vectors, by_channel) for vectors in (PANEL_VECTORS, 1) for rows in (TILE_ROWS, 1)
    )
    many_before, one_before = (advance_tile(rows, 1, by_channel, before=True) for rows in (TILE_ROWS, 1))

    @inline
    def advance(
        keys: Any, k_pace: int, queries: Any, q_pace: int, factor: Any, keep: Any, factors: int, mode: Any, u: Any,
        out: Any, width: int, pitch: int, count: int, lanes: int, d: int, S: Any, has_bonus: bool,
    ) -> None:  # fmt: skip
        r = 0
        while r < d:
            many = d - r >= TILE_ROWS
            q, k, S_r = shifted(queries, r), shifted(keys, r), shifted(S, r * pitch)
            f, near = factor, keep
            if by_channel:
                f, near = shifted(factor, r), shifted(keep, r)
            if has_bonus:  # vector by vector, since one more tile would take long to compile
                for c in range(0, width, lanes):
                    u_c, out_c, S_c = shifted(u, c), shifted(out, c), shifted(S_r, c)
                    if many:
                        many_before(k, k_pace, q, q_pace, f, near, factors, mode, u_c, out_c, pitch, count, S_c)
                    else:
                        one_before(k, k_pace, q, q_pace, f, near, factors, mode, u_c, out_c, pitch, count, S_c)
            elif width == PANEL_VECTORS * lanes and many:
                many_wide(k, k_pace, q, q_pace, f, near, factors, mode, u, out, pitch, count, S_r)
            elif width == PANEL_VECTORS * lanes:
                one_wide(k, k_pace, q, q_pace, f, near, factors, mode, u, out, pitch, count, S_r)
            elif many:
                many_narrow(k, k_pace, q, q_pace, f, near, factors, mode, u, out, pitch, count, S_r)
            else:
                one_narrow(k, k_pace, q, q_pace, f, near, factors, mode, u, out, pitch, count, S_r)
            r += TILE_ROWS if many else 1

    return advance
