"""Means of segments of rows as a launch."""

from __future__ import annotations

import math

import numpy as np

from subquad.backend import Array, Like
from subquad_numpy.runtime.launch import Launch, Run, threads_for
from subquad_numpy.segment_means.calls import cut_work


def launch_means(x: Array, m: int, run: Run, *, finite: bool = False) -> Array:
    """The means (..., m, d) of segments of rows (..., n, d); `finite`: means that are not finite become 0."""
    from subquad_numpy.segment_means.kernel import MEANS_RECORD, means_kernel

    sizes, batch = cut_work(x, m, finite=finite), tuple(x.shape[:-2])
    results = {"out": Like((*batch, m, x.shape[-1]), x.dtype)}
    made = Launch(
        means_kernel, (np.dtype(x.dtype),), MEANS_RECORD, results, sizes, batch, sizes["tasks"],
        threads_for(math.prod(x.shape)),
    )  # fmt: skip
    return run(made, {"x": x})["out"]
