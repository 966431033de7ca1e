"""The scan of the delta rule and its gradient as launches."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np
from array_api_compat import array_namespace

from subquad.backend import Array, Like
from subquad.core.dtypes import cast
from subquad.kernels.delta_scan import outputs as outputs_of
from subquad_numpy.runtime.launch import Launch, Run
from subquad_numpy.runtime.stored import stored_word


def launch(arrays: Sequence[Any], static: Mapping[str, Any], run: Run) -> tuple[Array, ...]:
    """The outputs of the kernel `delta_scan`, by one launch."""
    from subquad_numpy.delta_scan.calls import SMALL, cut_work, dtype_of, kind_of, sizes_of
    from subquad_numpy.delta_scan.forward import FORWARD_RECORD, forward_kernel
    from subquad_numpy.runtime.threads import thread_count

    q, _, v, *_ = arrays
    xp = array_namespace(q)
    o, state = outputs_of(*arrays, **static)
    threads = 1 if math.prod(v.shape) * q.shape[-1] < SMALL else thread_count()
    tiles, tasks = cut_work(q.shape[0] * q.shape[2], v.shape[-1], dtype_of(arrays), threads)
    own = {"stored": stored_word((*arrays[:7], o)), "tiles": tiles}
    made = Launch(
        forward_kernel,
        kind_of(arrays),
        FORWARD_RECORD,
        {"o": o, "state": state},
        sizes_of(tuple(q.shape), tuple(v.shape), static) | own,
        tasks=tasks,
        threads=threads,
    )
    found = run(made, operands_of(xp, arrays, static))
    return found["o"], found["state"]


def launch_backward(
    arrays: Sequence[Any],
    static: Mapping[str, Any],
    outputs: Sequence[Array],
    grads: Sequence[Array],
    run: Run,
) -> tuple[Array | None, ...]:
    """The gradients by all inputs, by one launch; the outputs are not read."""
    from subquad_numpy.delta_scan.backward import BACKWARD_RECORD, OF_INPUTS, backward_kernel
    from subquad_numpy.delta_scan.calls import cut_time, dtype_of, kind_of, sizes_of
    from subquad_numpy.runtime.threads import thread_count

    q, _, v, *_ = arrays
    xp = array_namespace(q)
    given, threads = dict(zip(OF_INPUTS, arrays[:8], strict=True)), thread_count()
    results = {f"grad_{name}": Like(tuple(x.shape), x.dtype) for name, x in given.items() if x is not None}
    sizes = cut_time(tuple(q.shape), v.shape[-1], dtype_of(arrays), threads)
    by_arrays = (results.get(f"grad_{name}") for name in OF_INPUTS[:7])
    sizes["stored"] = stored_word((*arrays[:7], grads[0], *by_arrays))
    made = Launch(
        backward_kernel,
        kind_of(arrays),
        BACKWARD_RECORD,
        results,
        sizes_of(tuple(q.shape), tuple(v.shape), static) | sizes,
        tasks=q.shape[0] * q.shape[2],
        threads=threads,
    )
    found = run(made, operands_of(xp, arrays, static) | {"grad_o": grads[0], "grad_state": grads[1]})
    return *(None if x is None else found[f"grad_{name}"] for name, x in given.items()), None


def operands_of(xp: ModuleType, arrays: Sequence[Any], static: Mapping[str, Any]) -> dict[str, Array | None]:
    """The arrays by field; resets as bytes."""
    from subquad_numpy.delta_scan.calls import dtype_of
    from subquad_numpy.delta_scan.layout import INPUTS

    operands = dict(zip(INPUTS, arrays, strict=True))
    operands["resets"] = cast(xp, operands["resets"], xp.uint8)
    return {"numbers": xp.asarray(np.array([static["scale"]], dtype_of(arrays))), **operands}
