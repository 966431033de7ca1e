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


def launch(arrays: Sequence[Any], static: Mapping[str, Any], run: Run) -> tuple[Array, ...]:
    """The outputs of the kernel `delta_scan`, by one launch."""
    from subquad_numpy.delta_scan.calls import SMALL, kind_of, sizes_of, tasks_of
    from subquad_numpy.delta_scan.forward import FORWARD_RECORD, forward_kernel
    from subquad_numpy.runtime.threads import thread_count

    q, _, v, *_ = arrays
    xp = array_namespace(q)
    o, state = outputs_of(*arrays, **static)
    threads = 1 if math.prod(v.shape) * q.shape[-1] < SMALL else thread_count()
    made = Launch(
        forward_kernel,
        kind_of(arrays),
        FORWARD_RECORD,
        {"o": o, "state": state},
        sizes_of(tuple(q.shape), tuple(v.shape), static),
        tasks=tasks_of(tuple(q.shape), v.shape[-1], np.dtype(q.dtype)),
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
    from subquad_numpy.delta_scan.calls import cut_time, kind_of, sizes_of
    from subquad_numpy.runtime.threads import thread_count

    q, _, v, *_ = arrays
    xp = array_namespace(q)
    given, threads = dict(zip(OF_INPUTS, arrays[:8], strict=True)), thread_count()
    sizes = cut_time(tuple(q.shape), v.shape[-1], np.dtype(q.dtype), threads)
    made = Launch(
        backward_kernel,
        kind_of(arrays),
        BACKWARD_RECORD,
        {f"grad_{name}": Like(tuple(x.shape), q.dtype) for name, x in given.items() if x is not None},
        sizes_of(tuple(q.shape), tuple(v.shape), static) | sizes,
        tasks=q.shape[0] * q.shape[2],
        threads=threads,
    )
    by = {name: cast(xp, x, q.dtype) for name, x in zip(("grad_o", "grad_state"), grads, strict=True)}
    found = run(made, operands_of(xp, arrays, static) | by)
    return *(None if x is None else cast(xp, found[f"grad_{name}"], x.dtype) for name, x in given.items()), None


def operands_of(xp: ModuleType, arrays: Sequence[Any], static: Mapping[str, Any]) -> dict[str, Array | None]:
    """The arrays by field, in one dtype; resets as bytes."""
    from subquad_numpy.delta_scan.layout import INPUTS

    given = dict(zip(INPUTS, arrays, strict=True))
    dtype = given["q"].dtype
    operands = {name: cast(xp, x, xp.uint8 if name == "resets" else dtype) for name, x in given.items()}
    return {"numbers": xp.asarray(np.array([static["scale"]]), dtype=dtype), **operands}
