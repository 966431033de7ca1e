"""The scan of outer products and its gradient as launches."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from array_api_compat import array_namespace

from subquad.backend import Array, Like
from subquad.kernels.outer_scan import Inputs
from subquad_numpy.runtime.launch import Launch, Run


def launch(arrays: Sequence[Any], static: Mapping[str, Any], run: Run) -> tuple[Array, ...]:
    """The outputs of the kernel `outer_scan`, by one launch."""
    from subquad_numpy.outer_scan.calls import SMALL, contiguous_strides, kind_of, panels_of, sizes_of
    from subquad_numpy.outer_scan.forward import FORWARD_RECORD, forward_kernel
    from subquad_numpy.runtime.threads import thread_count

    given = Inputs(*arrays)
    xp = array_namespace(given.q)
    batch, _, heads, d_v = given.v.shape
    d, dtype = given.q.shape[-1], given.v.dtype
    made = Launch(
        forward_kernel,
        kind_of(given),
        FORWARD_RECORD,
        {"o": Like(given.v.shape, dtype), "state": Like((batch, heads, d, d_v), dtype)},
        sizes_of(given, static, contiguous_strides),
        tasks=batch * heads * panels_of(d_v, dtype),
        threads=1 if math.prod(given.v.shape) * d < SMALL else thread_count(),
    )
    numbers = xp.asarray(np.array([static["scale"]]), dtype=dtype)
    found = run(made, given._asdict() | {"numbers": numbers})
    return found["o"], found["state"]
