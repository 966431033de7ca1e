"""The linear scan and its gradient as launches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from array_api_compat import array_namespace

from subquad.backend import Array, Like
from subquad.core.dtypes import cast
from subquad_numpy.linear_scan.calls import SMALL, SMALL_GRADIENT, cut_work
from subquad_numpy.runtime.arguments import Fields
from subquad_numpy.runtime.launch import Launch, Run
from subquad_numpy.runtime.stored import common, computed, stored_word, widest


def launch(arrays: Sequence[Any], static: Mapping[str, Any], run: Run) -> tuple[Array, ...]:
    """The output of the kernel `linear_scan`, by one launch."""
    from subquad_numpy.linear_scan.kernel import SCAN_RECORD, linear_scan_kernel

    a, b, initial_state, resets = arrays
    xp, dtype = array_namespace(b), widest(a, b)
    operands = {"a": a, "b": b, "initial_state": cast(xp, initial_state, dtype), "resets": resets}
    results = {"h": Like(b.shape, common(a, b))}
    made = _launch(linear_scan_kernel, SCAN_RECORD, dtype, static, results, SMALL, stored_word((a, b, results["h"])))
    return (run(made, operands)["h"],)


def launch_backward(
    arrays: Sequence[Any],
    static: Mapping[str, Any],
    outputs: Sequence[Array],
    grads: Sequence[Array],
    run: Run,
) -> tuple[Array | None, ...]:
    """The gradients by a, b and the initial state, by one launch; b itself is not read."""
    from subquad_numpy.linear_scan.kernel import GRADIENT_RECORD, linear_scan_gradient_kernel

    (a, b, initial_state, resets), (h,), (grad_h,) = arrays, outputs, grads
    xp, dtype = array_namespace(h), computed(h.dtype)
    operands = {"a": a, "h": h, "initial_state": cast(xp, initial_state, dtype), "resets": resets, "grad_h": grad_h}
    results = {"grad_a": Like(h.shape, a.dtype), "grad_b": Like(h.shape, h.dtype if b is None else b.dtype)}
    stored = stored_word((a, h, grad_h, *results.values()))
    results["grad_initial_state"] = Like((h.shape[0], h.shape[2]), dtype)
    made = _launch(linear_scan_gradient_kernel, GRADIENT_RECORD, dtype, static, results, SMALL_GRADIENT, stored)
    found = run(made, operands)
    by_state = None if initial_state is None else cast(xp, found["grad_initial_state"], initial_state.dtype)
    return found["grad_a"], found["grad_b"], by_state, None


def _launch(
    compile: Any,  # noqa: A002
    record: Fields,
    dtype: Any,
    static: Mapping[str, Any],
    results: dict[str, Like],
    small: int,
    stored: int,
) -> Launch:
    shape = next(iter(results.values())).shape
    sizes, tasks, threads = cut_work(shape, dtype, static["reverse"], small=small)
    return Launch(compile, (dtype.name,), record, results, sizes | {"stored": stored}, tasks=tasks, threads=threads)
