"""Pseudo-inverses by iteration as one launch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from subquad.backend import Array, Like
from subquad_numpy.runtime.launch import Launch, Run, threads_for


def launch(arrays: Sequence[Any], static: Mapping[str, Any], run: Run) -> tuple[Array, ...]:
    """The output of the kernel `iterative_pinv`, by one launch."""
    from subquad_numpy.iterative_pinv.kernel import PINV_RECORD, pinv_kernel

    (a,) = arrays
    m, iterations = a.shape[-1], static["iterations"]
    made = Launch(
        pinv_kernel,
        (np.dtype(a.dtype),),
        PINV_RECORD,
        {"z": Like(a.shape, a.dtype)},
        {"m": m, "iterations": iterations},
        tasks=math.prod(a.shape[:-2]),
        threads=threads_for(4 * iterations * math.prod(a.shape) * m),
    )
    return (run(made, {"a": a})["z"],)
