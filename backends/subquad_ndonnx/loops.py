"""A loop over rows as one Loop of ONNX, whatever the number of rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import spox.opset.ai.onnx.v21 as op
from spox import Var

from subquad_ndonnx.array_api import reshape
from subquad_ndonnx.graph import graph
from subquad_ndonnx.sizes import as_vector


def leaves(tree: Any) -> list[Any]:
    """The arrays of nested tuples and dicts, in order; None has none."""
    if tree is None:
        return []
    if isinstance(tree, dict):
        return [x for part in tree.values() for x in leaves(part)]
    return [x for part in tree for x in leaves(part)] if isinstance(tree, tuple | list) else [tree]


def rebuilt(tree: Any, arrays: Any) -> Any:
    """The tree with the next of `arrays` in the place of each array."""
    if tree is None:
        return None
    if isinstance(tree, dict):
        return {name: rebuilt(part, arrays) for name, part in tree.items()}
    if isinstance(tree, tuple | list):
        parts = [rebuilt(part, arrays) for part in tree]
        return type(tree)(*parts) if hasattr(tree, "_fields") else type(tree)(parts)
    return next(arrays)


def scan(step: Callable[..., Any], carry: Any, arrays: Sequence[Any]) -> tuple[Any, Any]:
    """Fold a step over the rows (axis −2) of arrays, one at a time: (last carry, outputs joined or None)."""
    starts = leaves(carry)
    after: list[Any] = []
    like = next(x for x in arrays if x is not None)

    def body(place: Var, going: Var, *variables: Var) -> list[Var]:  # the place is of shape (1,)
        parts = [graph(x, start.shape) for x, start in zip(variables, starts, strict=True)]
        rows = [None if x is None else _row(x, place) for x in arrays]
        state, out = step(rebuilt(carry, iter(parts)), *rows)
        after[:] = [state, None if out is None else out.shape]
        made = [x.unwrap_spox() for x in leaves(state)]
        return [going, *made, *([] if out is None else [out.unwrap_spox()])]

    n = like.shape[-2]
    count = op.squeeze(as_vector((n,)))
    made = op.loop(count, v_initial=[x.unwrap_spox() for x in starts], body=body)
    last = [graph(x, before.shape) for x, before in zip(made[: len(starts)], starts, strict=True)]
    state, shape = after
    if shape is None:
        return rebuilt(state, iter(last)), None
    # the outputs (..., 1, w) of the steps lie along a new first axis
    out = graph(made[-1], [n, *shape])
    rank = len(shape)
    turned = op.transpose(out.unwrap_spox(), perm=[*range(1, rank - 1), 0, rank - 1, rank])
    return rebuilt(state, iter(last)), reshape(graph(turned), (*shape[:-2], n, shape[-1]))


def _row(x: Any, place: Var) -> Any:
    # row number `place` (1,) of x, (..., 1, w)
    return graph(op.gather(x.unwrap_spox(), place, axis=x.ndim - 2), [*x.shape[:-2], 1, x.shape[-1]])


def repeated(step: Callable[[Any], Any], x: Any, times: int) -> Any:
    """x after `times` steps that keep its shape, as one Loop."""

    def body(_: Var, going: Var, before: Var) -> list[Var]:
        return [going, step(graph(before, x.shape)).unwrap_spox()]

    made = op.loop(op.const(np.int64(times)), v_initial=[x.unwrap_spox()], body=body)
    return graph(made[0], x.shape)
