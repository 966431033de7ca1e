"""The scan of outer products and its gradient as launches."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from array_api_compat import array_namespace

from subquad.backend import Array, Like
from subquad.core.dtypes import cast
from subquad.kernels.outer_scan import Inputs
from subquad_numpy.runtime.launch import Launch, Rows, Run
from subquad_numpy.runtime.stored import common


def launch(arrays: Sequence[Any], static: Mapping[str, Any], run: Run) -> tuple[Array, ...]:
    """The outputs of the kernel `outer_scan`, by one launch."""
    from subquad_numpy.outer_scan.calls import (
        SMALL,
        contiguous_strides,
        cut_work,
        dtype_of,
        kind_of,
        sizes_of,
        stored_of,
    )
    from subquad_numpy.outer_scan.forward import FORWARD_RECORD, forward_kernel
    from subquad_numpy.runtime.threads import thread_count

    given = Inputs(*arrays)
    xp = array_namespace(given.q)
    batch, _, heads, d_v = given.v.shape
    d, dtype = given.q.shape[-1], dtype_of(given)
    results = {"o": Like(given.v.shape, common(*given[:3])), "state": Like((batch, heads, d, d_v), dtype)}
    threads = 1 if math.prod(given.v.shape) * d < SMALL else thread_count()
    panels, tasks = cut_work(batch * heads, d_v, dtype, threads)
    sizes = sizes_of(given, static, contiguous_strides) | {"stored": stored_of(given, results["o"]), "panels": panels}
    made = Launch(
        forward_kernel,
        kind_of(given),
        FORWARD_RECORD,
        results,
        sizes,
        tasks=tasks,
        threads=threads,
    )
    numbers = xp.asarray(np.array([static["scale"]], dtype))
    found = run(made, given._asdict() | {"numbers": numbers})
    return found["o"], found["state"]


def launch_backward(
    arrays: Sequence[Any],
    static: Mapping[str, Any],
    outputs: Sequence[Array],
    grads: Sequence[Array],
    run: Run,
) -> tuple[Array | None, ...]:
    """The gradients by all inputs, by one launch; the outputs are not read."""
    from subquad_numpy.outer_scan.backward import BACKWARD_RECORD, backward_kernel
    from subquad_numpy.outer_scan.calls import contiguous_strides, cut_gradient, dtype_of, kind_of, sizes_of, stored_of
    from subquad_numpy.runtime.threads import thread_count

    given = Inputs(*arrays)
    xp = array_namespace(given.q)
    (batch, n, heads, d_v), (groups, d), dtype = given.v.shape, given.q.shape[-2:], dtype_of(given)
    parts, _ = cut_gradient(batch, n, groups, heads // groups, d, d_v, np.dtype(dtype).itemsize)
    results = {
        f"grad_{name}": Like(x.shape, dtype)
        for name, x in given._asdict().items()
        if x is not None and name != "resets"
    }
    results["grad_initial_state"] = Like((batch, heads, d, d_v), dtype)
    summed = {name: Rows(parts, wide=False) for name in ("grad_q", "grad_k") if parts > 1}
    if given.bonus is not None:
        summed["grad_bonus"] = Rows(batch // given.bonus.shape[0], wide=True)
    if given.skip is not None:
        results["grad_skip"] = Like((heads, d_v), dtype)
        summed["grad_skip"] = Rows(batch, wide=True)
    sizes = sizes_of(given, static, contiguous_strides) | {"parts": parts, "total": n, "total_of_maps": n}
    grad_o, grad_state = grads
    sizes["stored"] = stored_of(given, grad_o)
    strides = contiguous_strides(grad_o)
    sizes |= dict(zip(("grad_o_item", "grad_o_step", "grad_o_head"), strides, strict=False))
    made = Launch(
        backward_kernel,
        kind_of(given),
        BACKWARD_RECORD,
        results,
        sizes,
        tasks=batch * groups * parts,
        threads=thread_count(),
        zeros=frozenset(results),
        summed=summed,
    )
    numbers = xp.asarray(np.array([static["scale"]], dtype))
    found = run(made, given._asdict() | {"numbers": numbers, "grad_o": grad_o, "grad_state": grad_state})
    if given.skip is not None and given.skip.shape[1] < d_v:
        found["grad_skip"] = xp.sum(found["grad_skip"], axis=1, keepdims=True)
    return tuple(
        None if x is None or name == "resets" else cast(xp, found[f"grad_{name}"], x.dtype)
        for name, x in given._asdict().items()
    )
