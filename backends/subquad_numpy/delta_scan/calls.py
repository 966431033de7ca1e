"""The compiled scan of the delta rule on NumPy arrays, and its gradient: see `subquad_numpy.compiled.Compiled`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from subquad_numpy.runtime.arguments import Forms, Run, fix_items, fixed
from subquad_numpy.runtime.stored import common, stored_word, widest
from subquad_numpy.runtime.threads import thread_count

Array = np.ndarray[Any, Any]
SMALL = 1 << 18  # numbers of states of a call, about 30 µs: below that, waking a second thread costs more than it saves
SHARED = 0.1  # what the tiles of a task share, of the time of a tile
STATES = 512 << 10  # bytes of the states of a tile of time, half of a second-level cache
CHECKPOINTS = 32 << 20  # bytes of checkpoints of all threads up to which one level of them is enough


def _plan_scan(arrays: Sequence[Any], static: Mapping[str, Any], save: bool) -> Callable[..., Any]:
    """`delta_scan`: outputs and last states."""
    q, _, v, *_ = arrays
    shape, dtype, out_dtype, (batch, _, heads, d) = v.shape, dtype_of(arrays), common(*arrays[:3]), q.shape
    shape_of_state = (batch, heads, d, shape[-1])
    fix = [None if x is None else fix_items(x, x.ndim) for x in arrays[:8]]
    numbers = np.asarray([static["scale"]], dtype)
    sizes = sizes_of(q.shape, v.shape, static)
    is_small = math.prod(shape) * d < SMALL
    runs: dict[int, Run] = {}  # by the number of threads, on which the size of a task depends

    def scan(arrays: Sequence[Any], new: Callable[..., Array], threads: Any) -> tuple[tuple[Array, Array], None]:
        o, state = new(shape, out_dtype), new(shape_of_state, dtype)
        count = 1 if is_small else thread_count(threads)
        run = runs.get(count)
        if run is None:  # the first call loads LLVM
            from subquad_numpy.delta_scan.forward import FORWARD_RECORD, forward_kernel

            tiles, tasks = cut_work(batch * heads, shape[-1], dtype, count)
            own = {"stored": stored_word((*arrays[:7], o)), "tiles": tiles}
            run = runs[count] = Run(forward_kernel(*kind_of(arrays)), FORWARD_RECORD, (), tasks, math.inf, sizes | own)
        given = [*map(fixed_or_none, fix, arrays[:8]), as_bytes(arrays[8])]
        run((numbers, *given, o, state), count)
        return (o, state), None

    return scan


scan = Forms(_plan_scan)


def fixed_or_none(fix: Any, x: Array | None) -> Array | None:
    """The array, fixed where needed; None for None."""
    return None if x is None else fixed(fix, x)


def as_bytes(resets: Array | None) -> Array | None:
    """The marks as contiguous bytes; None for None."""
    return None if resets is None else np.ascontiguousarray(resets).view(np.uint8)


def kind_of(arrays: Sequence[Any]) -> tuple[str, str, bool]:
    """What the kernels are specialised for: the dtype, whose decays g holds, and whether the form is general."""
    _, _, _, g, beta, *_ = arrays
    gate = "none" if g is None else "head" if g.shape[-1] == 1 else "channel"
    return dtype_of(arrays).name, gate, beta is None


def dtype_of(arrays: Sequence[Any]) -> np.dtype[Any]:
    """The dtype that the kernels compute in."""
    return widest(*arrays[:8])


def sizes_of(q: tuple[int, ...], v: tuple[int, ...], static: Mapping[str, Any]) -> dict[str, int]:
    """The numbers of the argument record, from the shapes of q and v."""
    _, n, heads, d = q
    return {"n": n, "heads": heads, "d": d, "d_v": v[-1], "reverse": int(static["reverse"])}


def cut_work(heads: int, d_v: int, dtype: Any, threads: int) -> tuple[int, int]:
    """(tiles of columns that a task has, tasks) of a scan of so many heads: what takes the threads least time.

    The tiles of a task share its decays, and rows that are widened.
    """
    from subquad_numpy.codegen import lanes_of

    tiles = -(-d_v // (2 * lanes_of(np.dtype(dtype))))

    def time_of(of_task: int) -> float:
        return -(-heads * -(-tiles // of_task) // threads) * (of_task + SHARED)

    of_task = min(range(max(tiles, 1), 0, -1), key=time_of)
    return of_task, heads * -(-tiles // of_task)


def scan_backward(
    arrays: Sequence[Array | None], static: Mapping[str, Any], saved: None, outputs: Sequence[Array],
    grads: Sequence[Array | None], need: Sequence[bool], *, threads: int | None = None,
) -> tuple[Array | None, ...] | None:  # fmt: skip
    """The gradients of `scan`. States are computed again from checkpoints, so memory grows as √n."""
    from subquad_numpy.delta_scan.backward import BACKWARD_RECORD, backward_kernel

    q, _, v, *_ = arrays
    assert q is not None
    assert v is not None
    dtype = dtype_of(arrays)
    given = [None if x is None else np.ascontiguousarray(x) for x in arrays[:8]]
    by = [None if x is None else np.ascontiguousarray(x) for x in grads]
    found = [None if x is None or not wanted else np.empty(x.shape, x.dtype)
             for x, wanted in zip(arrays[:8], need, strict=False)]  # fmt: skip
    count = thread_count(threads)
    sizes = sizes_of(q.shape, v.shape, static) | cut_time(q.shape, v.shape[-1], dtype, count)
    sizes["stored"] = stored_word((*arrays[:7], by[0], *found))
    tasks = q.shape[0] * q.shape[2]
    run = Run(backward_kernel(*kind_of(arrays)), BACKWARD_RECORD, (), tasks, math.inf, sizes)
    run((np.asarray([static["scale"]], dtype), *given, as_bytes(arrays[8]), *by, *found), count)
    return (*found, None)


def cut_time(q: tuple[int, ...], d_v: int, dtype: Any, threads: int) -> dict[str, int]:
    """The steps of a tile, whose states stay in a core's cache, and the tiles of a segment; see `backward`."""
    from subquad_numpy.codegen import lanes_of

    batch, n, heads, d = q
    width = 2 * lanes_of(dtype)
    state = d * -(-d_v // width) * width * np.dtype(dtype).itemsize
    tile = max(4, min(64, STATES // state, n))
    tiles = -(-n // tile)
    fits = tiles * state * min(threads, batch * heads) <= CHECKPOINTS
    return {"tile": tile, "segment": tiles if fits else math.isqrt(tiles - 1) + 1}
