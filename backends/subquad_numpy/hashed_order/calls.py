"""Orders by buckets on NumPy arrays, compiled: see `subquad_numpy.compiled.Compiled`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from subquad.kernels.hashed_order import outputs
from subquad_numpy.runtime.arguments import Forms, Run, fix_items, fix_rows, fixed, row_step, straight
from subquad_numpy.runtime.stored import stored_word, widest

Array = np.ndarray[Any, Any]


def cut_work(arrays: Sequence[Any], static: Mapping[str, Any]) -> tuple[dict[str, int], int, float]:
    """(numbers of the argument record for contiguous rows, tasks of an item, multiply-adds of an item)."""
    x, rotations, _ = arrays
    (n, d), (rounds, _, columns) = x.shape[-2:], rotations.shape
    sizes = {"n": n, "d": d, "columns": columns, "rounds": rounds, **static, "kept": max(rounds - 1, 1), "x_row": d}
    sizes["stored"] = stored_word((x,))
    return sizes, rounds, float(rounds * n * d * columns)


def _plan(arrays: Sequence[Any], static: Mapping[str, Any], save: bool) -> Callable[..., Any]:
    """The outputs of the kernel `hashed_order`."""
    from subquad_numpy.hashed_order.kernel import ORDER_RECORD, order_kernel

    x, rotations, mask = arrays
    of_order, of_chunk = outputs(x, rotations, key_mask=mask, **static)
    numbers, tasks, products = cut_work(arrays, static)
    fixes = fix_rows(x), fix_items(rotations, 3), None if mask is None else fix_items(mask, 1)
    ready = [y if y is None else fixed(fix, y) for fix, y in zip(fixes, arrays, strict=True)]
    examples = dict(zip(("x", "rotations", "mask"), ready, strict=True))
    made = {"order": np.empty(of_order.shape, np.int32), "chunk": np.empty(of_chunk.shape, np.int32)}
    given = {**numbers, **examples, **made, "x_row": row_step(examples["x"])}
    run = Run(order_kernel(widest(x, rotations)), ORDER_RECORD, of_order.shape[:-2], tasks, products, given)

    def hashed_order(arrays: Sequence[Any], new: Callable[..., Array], threads: Any) -> tuple[tuple[Array, ...], None]:
        order, chunk = new(of_order.shape, np.int32), new(of_chunk.shape, np.int32)
        given = [y if y is None else fixed(fix, y) for fix, y in zip(fixes, arrays, strict=True)]
        run((*given, order, chunk), threads)
        return (order, chunk), None

    return hashed_order if any(fixes) else straight(hashed_order)


hashed_order = Forms(_plan)
