"""The compiled scan of outer products on NumPy arrays, and its gradient: see `subquad_numpy.compiled.Compiled`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from subquad.kernels.outer_scan import Inputs
from subquad_numpy.runtime.arguments import Forms, Run, fix_elements, fix_items, fix_rows, fixed
from subquad_numpy.runtime.threads import thread_count

Array = np.ndarray[Any, Any]
SMALL = 1 << 18  # multiply-adds of a call, about 20 µs: below that, waking a second thread costs more than it saves
WHOLE_ROWS = ("q", "k", "v", "g")  # inputs whose last axis is read in vectors; time, heads and items may be strided
WHOLE = {"bonus": 2, "initial_state": 3}  # inputs of which an item must be contiguous: so many axes


def _plan_scan(arrays: Sequence[Any], static: Mapping[str, Any], save: bool) -> Callable[..., Any]:
    """`outer_scan`: o and the last state."""
    from subquad_numpy.outer_scan.forward import FORWARD_RECORD, forward_kernel

    given = Inputs(*arrays)
    (batch, n, heads, d_v), d, dtype = given.v.shape, given.q.shape[-1], given.v.dtype
    fix = [None if x is None else fix_for(name, x) for name, x in given._asdict().items()]
    tasks = batch * heads * panels_of(d_v, dtype)
    numbers = np.array([static["scale"]], dtype)
    is_small = batch * n * heads * d * d_v < SMALL
    runs: list[Run] = []

    def scan(arrays: Sequence[Any], new: Callable[..., Array], threads: Any) -> tuple[tuple[Array, Array], None]:
        o, state = new((batch, n, heads, d_v), dtype), new((batch, heads, d, d_v), dtype)
        mine = [None if x is None else fixed(f, x) for f, x in zip(fix, arrays, strict=True)]
        if not runs:
            sizes = sizes_of(Inputs(*mine), static, strides_of)
            runs.append(Run(forward_kernel(*kind_of(given)), FORWARD_RECORD, (), tasks, math.inf, sizes))
        runs[0]((*mine, numbers, o, state), 1 if is_small else thread_count(threads))
        return (o, state), None

    return scan


scan = Forms(_plan_scan)


def fix_for(name: str, x: Array) -> Any:
    """The fix after which the kernels can read an input like x: see `runtime.arguments`."""
    if name in WHOLE_ROWS:
        return fix_rows(x)
    return fix_items(x, WHOLE[name] if name == "bonus" else x.ndim) if name in WHOLE else fix_elements(x)


def kind_of(given: Inputs) -> tuple[str, bool, bool]:
    """What the kernels are specialised for: (dtype, is there a decay for each channel, is there a bonus)."""
    return np.dtype(given.v.dtype).name, given.g is not None and given.g.shape[-1] > 1, given.bonus is not None


def panels_of(d_v: int, dtype: Any) -> int:
    """The number of panels of columns of the state of one head."""
    from subquad_numpy.codegen import lanes_of
    from subquad_numpy.outer_scan.tile import PANEL_VECTORS

    return -(-d_v // (PANEL_VECTORS * lanes_of(np.dtype(dtype))))


def strides_of(x: Array) -> tuple[int, ...]:
    """The strides of an array in elements; axes of length 1 have stride 0, and so an item that all share."""
    return tuple(0 if size == 1 else stride // x.itemsize for size, stride in zip(x.shape, x.strides, strict=True))


def contiguous_strides(x: Any) -> tuple[int, ...]:
    """The strides in elements of a contiguous array of the shape of x."""
    return tuple(0 if size == 1 else math.prod(x.shape[i + 1 :]) for i, size in enumerate(x.shape))


def sizes_of(p: Inputs, static: Mapping[str, Any], strides: Callable[[Any], tuple[int, ...]]) -> dict[str, int]:
    """The numbers of an argument record; an input that is None has none."""
    batch, n, heads, d_v = p.v.shape
    sizes = {"batch": batch, "n": n, "groups": p.q.shape[2], "heads": heads, "d": p.q.shape[3], "d_v": d_v}
    sizes["reverse"] = int(static["reverse"])
    axes = ("item", "step", "head")
    for name in ("q", "k", "v", "g", "weight"):
        x = getattr(p, name)
        if x is not None:
            sizes |= {f"{name}_{axis}": stride for axis, stride in zip(axes, strides(x), strict=False)}
    if p.bonus is not None:
        sizes["bonus_item"] = strides(p.bonus)[0]
    if p.skip is not None:
        sizes["skip_head"], sizes["skip_column"] = strides(p.skip)
    if p.resets is not None:
        sizes["resets_item"], sizes["resets_step"] = strides(p.resets)
    return sizes
