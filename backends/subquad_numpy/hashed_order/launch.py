"""Orders by buckets as one launch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from subquad.backend import Array
from subquad.kernels.hashed_order import outputs
from subquad_numpy.hashed_order.calls import cut_work
from subquad_numpy.runtime.launch import Launch, Run, threads_for
from subquad_numpy.runtime.stored import widest


def launch(arrays: Sequence[Any], static: Mapping[str, Any], run: Run) -> tuple[Array, ...]:
    """The outputs of the kernel `hashed_order`, by one launch."""
    from subquad_numpy.hashed_order.kernel import ORDER_RECORD, order_kernel

    x, rotations, mask = arrays
    order, chunk = outputs(x, rotations, key_mask=mask, **static)
    sizes, tasks, products = cut_work(arrays, static)
    batch = tuple(order.shape[:-2])
    made = Launch(
        order_kernel, (widest(x, rotations),), ORDER_RECORD, {"order": order, "chunk": chunk}, sizes, batch, tasks,
        threads_for(int(math.prod(batch) * products)),
    )  # fmt: skip
    found = run(made, {"x": x, "rotations": rotations, "mask": mask})
    return found["order"], found["chunk"]
