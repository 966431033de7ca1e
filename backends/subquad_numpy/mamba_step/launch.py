"""The step as a launch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from subquad.backend import Array, Like
from subquad_numpy.mamba_step.calls import is_small_step, sizes_of
from subquad_numpy.mamba_step.layout import (
    CONV,
    IN_PROJ,
    INPUTS,
    OUT_PROJ,
    PHASES,
    SSM,
    layers_of,
    record_of,
    scratch_of,
)
from subquad_numpy.project.calls import stored_as
from subquad_numpy.runtime.launch import Launch, Run


def launch(arrays: Sequence[Any], static: Mapping[str, Any], run: Run) -> tuple[Array, ...]:
    """The outputs of the kernel `mamba_step`, by one launch."""
    from subquad_numpy.mamba_step.kernel import step_kernel
    from subquad_numpy.runtime.threads import thread_count

    x, layers = arrays[0], layers_of(arrays)
    dtype, sizes = np.dtype(x.dtype), sizes_of(arrays, static)
    threads = 1 if is_small_step(arrays) else thread_count()
    shapes = {"out": (x.shape[0], layers[0][OUT_PROJ].shape[0])}
    for i, layer in enumerate(layers):
        shapes |= {f"new_conv {i}": layer[CONV].shape, f"new_ssm {i}": layer[SSM].shape}
    # counters of 64 bits, in numbers of the dtype
    scratch = {"work": (scratch_of(sizes),), "counters": (2 * PHASES * len(layers) * 8 // dtype.itemsize,)}
    results = {name: Like(tuple(shape), dtype) for name, shape in (shapes | scratch).items()}
    made = Launch(
        step_kernel, (dtype.name, stored_as(layers[0][IN_PROJ])), record_of(len(layers)), results, sizes,
        tasks=threads, threads=threads, zeros=frozenset({"counters"}),
    )  # fmt: skip
    operands = {f"{name} {i}": a for i, layer in enumerate(layers) for name, a in zip(INPUTS, layer, strict=True)}
    found = run(made, {"x": x} | operands)
    return tuple(found[name] for name in shapes)
