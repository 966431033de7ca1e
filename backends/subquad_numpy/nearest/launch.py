"""The nearest of m centres as one launch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from array_api_compat import array_namespace

from subquad.backend import Array, Like
from subquad.core.gather import gather_rows
from subquad.kernels.nearest import outputs as outputs_of
from subquad_numpy.nearest.calls import cut_work
from subquad_numpy.runtime.launch import Launch, Run, threads_for, to_shape


def launch(arrays: Sequence[Any], static: Mapping[str, Any], run: Run) -> tuple[Array, ...]:
    """The outputs of the kernel `nearest`, by one launch."""
    from subquad_numpy.nearest.kernel import NEAREST_RECORD, nearest_kernel

    x, centres, values, mask = arrays
    index, *sums = outputs_of(x, centres, values, key_mask=mask)
    batch, xp = tuple(index.shape[:-1]), array_namespace(x)
    sizes, parts, products = cut_work(arrays, batch)
    names = ("count", "total", "summed")[: len(sums)]
    results = {name: Like((parts, *like.shape), like.dtype) for name, like in zip(names, sums, strict=True)}
    made = Launch(
        nearest_kernel, (np.dtype(x.dtype),), NEAREST_RECORD, {"index": index} | results, sizes, batch, parts,
        threads_for(int(math.prod(batch) * products)),
    )  # fmt: skip
    found = run(made, {"x": x, "centres": centres, "values": values, "mask": mask})
    in_parts = [found[name] for name in names]
    return found["index"], *(y[0, ...] if parts == 1 else xp.sum(y, axis=0, dtype=y.dtype) for y in in_parts)


def launch_backward(
    arrays: Sequence[Any], static: Mapping[str, Any], outputs: Sequence[Array], grads: Sequence[Any], run: Run
) -> tuple[Array | None, ...]:
    """The gradients by the rows and the values: those by the sums of their clusters."""
    index, xp = outputs[0], array_namespace(arrays[0])
    found: list[Array | None] = [None] * len(arrays)
    for place, by in zip((0, 2), grads[2:], strict=False):
        own = gather_rows(xp, by, xp.maximum(index, xp.zeros_like(index)))
        found[place] = to_shape(xp, xp.where(index[..., None] < 0, 0.0, own), tuple(arrays[place].shape))
    return tuple(found)
