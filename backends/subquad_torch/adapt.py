"""Any native kernel under PyTorch, in each of the ways in which PyTorch calls it.

A call takes one of these ways:

    eager, no gradient recorded         a plain function: PyTorch's dispatcher would cost more than a small call
    eager, gradient recorded            `recorded.Recorded`, an `autograd.Function`
    compilers, recorders, meta device   the `operators`, whose first argument names the kernel, and whose text `static`
                                        holds its keywords
    `torch.func`, forward mode          the generic form, which PyTorch differentiates or transforms itself

The operators have no autograd formula of their own: `Recorded` calls them. Only with this arrangement do eager mode,
double backward, `torch.compile(fullgraph=True)` forward and backward, and `torch.export` all work.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from subquad.backend import Accepts, Call, Override
from subquad_torch import operators
from subquad_torch.conditions import is_recorded, not_plain
from subquad_torch.keywords import encode
from subquad_torch.native import Arrays, Native, Static, keep, kernel_of
from subquad_torch.recorded import Recorded, meets_operator

Reason = Callable[[Call], str | None]

HALF = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def override(
    native: Native,
    name: str,
    accepts: Accepts,
    *,
    widened: bool = False,
    as_stored: Callable[[int], bool] | None = None,
) -> Override:
    """The override of a native kernel; if `widened`, tensors of half precision are converted to float32 first.

    Those are not of whose places `as_stored` is true.
    """
    keep(native, on_cuda="cuda" in accepts.devices)
    # states of PyTorch in which the override may run: without a gradient it must not hide from recording
    under = {"tracing"} | ({"watched"} if native.watched else set())
    under |= {"recorded"} if native.backward or native.constant else set()
    halves = [dtype for word, dtype in HALF.items() if widened and word in accepts.dtypes]
    masked = "key_mask" in kernel_of(native.kernel).options

    def run(*arrays: Tensor | None, **static: Any) -> Any:
        if masked:
            arrays = (*arrays, static.pop("key_mask", None))
        if halves:
            arrays = tuple(
                x.float() if x is not None and x.dtype in halves and not (as_stored and as_stored(i)) else x
                for i, x in enumerate(arrays)
            )
        if native.constant:
            arrays = tuple(None if x is None else x.detach() for x in arrays)
        if native.backward is not None and is_recorded(arrays):
            if torch.compiler.is_compiling():
                outputs = Recorded.apply(native.kernel, encode(static), *_distinct(arrays))
            else:
                outputs = Recorded.apply(native.kernel, static, *arrays)
        else:
            outputs = _call(native, arrays, static)
        return outputs[0] if len(outputs) == 1 else outputs

    also = first_of(not_plain, accepts.also)
    return Override(native.kernel, name, run, replace(accepts, under=frozenset(under), also=also))


def first_of(*reasons: Reason | None) -> Reason:
    """A reason that is the first one found by the given ones."""
    given = [reason for reason in reasons if reason is not None]

    def also(call: Call) -> str | None:
        for reason in given:
            found = reason(call)
            if found is not None:
                return found
        return None

    return also


def _distinct(arrays: Arrays) -> Arrays:
    """The arrays, with views for repeated tensors: compilers take no tensor at two places of a function."""
    found: list[Tensor | None] = []
    for x in arrays:
        again = x is not None and any(x is y for y in found)
        found.append(x.view_as(x) if x is not None and again else x)
    return found


def _call(native: Native, arrays: Arrays, static: Static) -> tuple[Tensor, ...]:
    """The outputs of a kernel, where nothing is recorded."""
    if meets_operator(arrays):
        return operators.forward(native.kernel, arrays, static)
    return native.forward(arrays, static)[0]
