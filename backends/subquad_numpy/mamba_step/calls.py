"""The compiled step on NumPy arrays, as `subquad_numpy.compiled.Compiled` describes it."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np

from subquad_numpy.mamba_step.layout import (
    A_LOG,
    CONV,
    DT_PROJ,
    IN_PROJ,
    INPUTS,
    MATRICES,
    OUT_PROJ,
    PHASES,
    SSM,
    TAPS,
    layers_of,
    record_of,
    scratch_of,
)  # fmt: skip
from subquad_numpy.project.calls import stored_as
from subquad_numpy.runtime.arguments import Forms, Run, fix_items, fixed
from subquad_numpy.runtime.threads import thread_count

Array = np.ndarray[Any, Any]
MOST_ROWS = 32  # sequences; with more, the products of some libraries are faster
OF_BLOCK, FIRST_MATRIX = len(INPUTS), 1 + IN_PROJ  # arrays of a block in a call; the place of a matrix
SMALL = 1 << 18  # weights of a call: below that, waking a second thread costs more than it saves


def _plan_step(arrays: Sequence[Any], static: Mapping[str, Any], save: bool) -> Callable[..., Any]:
    """`mamba_step`: the output, and the states after the step of each block."""
    x, layers = arrays[0], layers_of(arrays)
    dtype, shape = x.dtype, (x.shape[0], layers[0][OUT_PROJ].shape[0])
    shapes = [layer[i].shape for layer in layers for i in (CONV, SSM)]
    fix = [None if a is None else fix_items(a, a.ndim) for a in arrays]
    must_fix, sizes = any(f is not None for f in fix), sizes_of(arrays, static)
    is_small, numbers, counters = is_small_step(arrays), scratch_of(sizes), 2 * PHASES * len(layers)
    runs: dict[int, Run] = {}

    def step(arrays: Sequence[Any], new: Callable[..., Array], threads: Any) -> tuple[tuple[Array, ...], None]:
        out, states = new(shape, dtype), [new(shape, dtype) for shape in shapes]
        parts = 1 if is_small else thread_count(threads)
        run = runs.get(parts)
        if run is None:
            from subquad_numpy.mamba_step.kernel import step_kernel

            kernel = step_kernel(dtype.name, stored_as(layers[0][IN_PROJ]))
            run = runs[parts] = Run(kernel, record_of(len(layers)), (), parts, math.inf, sizes)
        given = list(map(fixed, fix, arrays)) if must_fix else arrays
        all_arrays = [np.empty(numbers, dtype), np.zeros(counters, np.int64), given[0], out]
        for i in range(len(layers)):
            all_arrays += given[1 + i * OF_BLOCK : 1 + (i + 1) * OF_BLOCK]
            all_arrays += states[2 * i : 2 * i + 2]
        run(all_arrays, parts)
        return (out, *states), None

    return step


step = Forms(_plan_step)


def is_matrix(place: int) -> bool:
    """Whether the array at a place of a call may be stored in half precision."""
    return place > 0 and (place - 1) % OF_BLOCK in MATRICES


def is_small_step(arrays: Sequence[Any]) -> bool:
    """Whether one thread is faster."""
    return sum(layer[IN_PROJ].shape[0] * layer[IN_PROJ].shape[1] for layer in layers_of(arrays)) < SMALL


def sizes_of(arrays: Sequence[Any], static: Mapping[str, Any]) -> dict[str, int]:
    """The numbers of an argument record."""
    layers = layers_of(arrays)
    in_proj, taps, dt_proj, A_log = (layers[0][i] for i in (IN_PROJ, TAPS, DT_PROJ, A_LOG))
    return {
        "layers": len(layers), "batch": arrays[0].shape[0], "d_model": in_proj.shape[1], "d_inner": dt_proj.shape[0],
        "d_state": A_log.shape[1], "dt_rank": dt_proj.shape[1], "width": taps.shape[1],
        "eps": int(np.float64(static["eps"]).view(np.int64)), "give_way": give_way(),
    }  # fmt: skip


@cache
def give_way() -> int:
    """The address of the operating system's function that yields to other threads; 0 where there is none."""
    try:
        return int(ctypes.cast(ctypes.CDLL(None).sched_yield, ctypes.c_void_p).value or 0)
    except (OSError, AttributeError, TypeError):
        return 0
