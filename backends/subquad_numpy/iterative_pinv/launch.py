"""Pseudo-inverses by iteration, and their gradient, as launches."""

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


def launch_backward(
    arrays: Sequence[Any], static: Mapping[str, Any], outputs: Sequence[Array], grads: Sequence[Array], run: Run
) -> tuple[Array]:
    """The gradient of the kernel `iterative_pinv`, by one launch; the output is not read."""
    from subquad_numpy.iterative_pinv.gradient import GRADIENT_RECORD, pinv_gradient_kernel

    (a,), (grad,) = arrays, grads
    m, iterations = a.shape[-1], static["iterations"]
    made = Launch(
        pinv_gradient_kernel,
        (np.dtype(a.dtype),),
        GRADIENT_RECORD,
        {"grad_a": Like(a.shape, a.dtype)},
        {"m": m, "iterations": iterations},
        tasks=math.prod(a.shape[:-2]),
        threads=threads_for(15 * iterations * math.prod(a.shape) * m),
    )
    return (run(made, {"a": a, "grad_z": grad})["grad_a"],)
