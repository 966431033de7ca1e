"""The step as a launch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from subquad.backend import Array, Like
from subquad_numpy.mamba_step.calls import SMALL, scratch_of, sizes_of
from subquad_numpy.project.calls import stored_as
from subquad_numpy.runtime.launch import Launch, Run


def launch(arrays: Sequence[Any], static: Mapping[str, Any], run: Run) -> tuple[Array, ...]:
    """The outputs of the kernel `mamba_step`, by one launch."""
    from subquad_numpy.mamba_step.kernel import COUNTERS, INPUTS, RECORD, step_kernel
    from subquad_numpy.runtime.threads import thread_count

    x, in_proj, out_proj, conv, ssm = (arrays[i] for i in (0, 1, 10, 12, 13))
    dtype, sizes = np.dtype(x.dtype), sizes_of(arrays)
    threads = 1 if in_proj.shape[0] * in_proj.shape[1] < SMALL else thread_count()
    shapes = {
        "out": (x.shape[0], out_proj.shape[0]), "new_conv": conv.shape, "new_ssm": ssm.shape,
        "work": (scratch_of(sizes),), "counters": (COUNTERS * 8 // dtype.itemsize,),
    }  # fmt: skip
    made = Launch(
        step_kernel, (dtype.name, stored_as(in_proj)), RECORD, {name: Like(x, dtype) for name, x in shapes.items()},
        sizes, tasks=threads, threads=threads, zeros=frozenset({"counters"}),
    )  # fmt: skip
    found = run(made, dict(zip(INPUTS, arrays, strict=True)))
    return found["out"], found["new_conv"], found["new_ssm"]
