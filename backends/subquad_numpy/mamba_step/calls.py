"""The compiled step on NumPy arrays, as `subquad_numpy.compiled.Compiled` describes it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np

from subquad_numpy.project.calls import stored_as
from subquad_numpy.runtime.arguments import Forms, Run, fix_items, fixed
from subquad_numpy.runtime.threads import thread_count

Array = np.ndarray[Any, Any]
MOST_ROWS = 16  # sequences; with more, products by the library are as fast
MATRICES = (1, 5, 6, 10)  # places of the matrices, which may have half precision, and then all have it
SMALL = 1 << 18  # weights of a call: below that, waking a second thread costs more than it saves


def _plan_step(arrays: Sequence[Any], static: Mapping[str, Any], save: bool) -> Callable[..., Any]:
    """`mamba_step`: the output, and the states after the step."""
    x, in_proj, out_proj, conv, ssm = (arrays[i] for i in (0, 1, 10, 12, 13))
    dtype, shapes = x.dtype, ((x.shape[0], out_proj.shape[0]), conv.shape, ssm.shape)
    fix = [None if a is None else fix_items(a, a.ndim) for a in arrays]
    must_fix, is_small = any(f is not None for f in fix), in_proj.size < SMALL
    sizes = sizes_of(arrays)
    scratch = scratch_of(sizes)
    runs: dict[int, Run] = {}

    def step(arrays: Sequence[Any], new: Callable[..., Array], threads: Any) -> tuple[tuple[Array, ...], None]:
        outputs = tuple([new(shape, dtype) for shape in shapes])
        count = 1 if is_small else thread_count(threads)
        run = runs.get(count)
        if run is None:
            from subquad_numpy.mamba_step.kernel import COUNTERS, RECORD, step_kernel

            kernel = step_kernel(dtype.name, stored_as(in_proj))
            run = runs[count] = Run(kernel, RECORD, (), count, math.inf, sizes)
            assert COUNTERS == 8
        given = list(map(fixed, fix, arrays)) if must_fix else arrays
        run((*given, *outputs, np.empty(scratch, dtype), np.zeros(8, np.int64)), count)
        return outputs, None

    return step


step = Forms(_plan_step)


def sizes_of(arrays: Sequence[Any]) -> dict[str, int]:
    """The numbers of an argument record."""
    x, in_proj, taps, dt_proj, A_log = (arrays[i] for i in (0, 1, 3, 6, 8))
    return {
        "batch": x.shape[0], "d_model": in_proj.shape[1], "d_inner": dt_proj.shape[0], "d_state": A_log.shape[1],
        "dt_rank": dt_proj.shape[1], "width": taps.shape[1], "give_way": give_way(),
    }  # fmt: skip


def scratch_of(sizes: Mapping[str, int]) -> int:
    """Numbers of scratch of a call: u and z before the convolution; u, later y; C · h; Δ; and delta, B, C."""
    return sizes["batch"] * (5 * sizes["d_inner"] + sizes["dt_rank"] + 2 * sizes["d_state"])


@cache
def give_way() -> int:
    """The address of the operating system's function that yields to other threads; 0 where there is none."""
    import ctypes

    try:
        return int(ctypes.cast(ctypes.CDLL(None).sched_yield, ctypes.c_void_p).value or 0)
    except (OSError, AttributeError, TypeError):
        return 0
