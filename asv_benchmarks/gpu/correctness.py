"""Errors of every instantiation of the kernels against the float64 kernel, which the tests check."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from asv_benchmarks.gpu import table
from asv_benchmarks.gpu.inputs import NO_BFLOAT16, OPTIONS, has_bfloat16, inputs
from asv_benchmarks.gpu.table import Found
from subquad.kernels.selective_scan import Inputs
from subquad_cupy.compile import compiled
from subquad_cupy.device import CupyDevice
from subquad_cupy.selective_scan.calls import scan_backward, scan_forward

# ex2.approx is good to 2 units in the last place, and a state multiplies a dozen; half precision rounds the outputs
ALLOWED = {"float32": 4e-6, "float16": 2e-3, "bfloat16": 2e-2}
FORMS = [(), ("B", "C"), ("B",), ("C",)]  # which of B and C are constant
STATES = (16, 1, 2, 4, 8, 32, 64, 128, 256)
WHOLE, SPLIT = 200, 777  # steps of a sequence that the kernels take in one piece, and in three pieces

Case = tuple[tuple[str, ...], int, str]


def correctness(found: Found, deadline: float) -> Iterator[str]:
    """The lines of a table of errors: the maximum over outputs and over gradients, relative to their largest values."""
    dtypes = [name for name in ALLOWED if name != "bfloat16" or has_bfloat16()]
    cases = list(itertools.product(FORMS, STATES, dtypes))
    compile_ahead([*cases, *itertools.product(FORMS, STATES, ["float64"])])
    yield from table.header("B, C", "data type", "states", "worst error of an output", "worst error of a gradient")
    if "bfloat16" not in dtypes:
        yield table.row("all", "bfloat16", NO_BFLOAT16, "", "")
    found["unchecked"], found["error"] = len(FORMS) * len(STATES) * len(ALLOWED), 0.0
    for case in cases:
        if time.perf_counter() > deadline:
            yield from ("", f"The last {found['unchecked']:.0f} are left out: the time was up.")
            return
        form, d_state, dtype = case
        errors = [max(pair) for pair in zip(*(errors_of(layer(case, n)) for n in (WHOLE, SPLIT)), strict=True)]
        found["unchecked"] -= 1
        found["error"] = max(found["error"], max(errors) / ALLOWED[dtype])
        named = " and ".join(form) + " constant" if form else "of each step"
        yield table.row(named, dtype, d_state, f"{max(errors[:2]):.1e}", f"{max(errors[2:]):.1e}")


def sanitized() -> Iterator[str]:
    """Run kernels of every form once, for compute-sanitizer.

    Each array is a separate allocation: in a pool, memory beyond an array often belongs to another array, and an access
    out of bounds would not be noticed.
    """
    import cupy

    cupy.cuda.set_allocator(None)
    dtypes = ["float32", "bfloat16"] if has_bfloat16() else ["float32"]
    cases = list(itertools.product(FORMS, (3, 16, 256), dtypes))
    compile_ahead(cases)
    for case in cases:
        for n in (WHOLE, SPLIT):
            solve(layer(case, n))
    cupy.cuda.get_current_stream().synchronize()
    yield f"{2 * len(cases)} forward and backward passes ran"


def compile_ahead(cases: list[Case]) -> None:
    """Compile the kernels that the cases launch on all cores, since one after the other takes minutes."""
    import cupy

    device, index = Recorder(), cupy.cuda.Device().id
    for case, n in itertools.product(cases, (WHOLE, SPLIT)):
        solve(layer(case, n), device)
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda kernel: compiled(kernel, index), sorted(device.kernels)))


class Recorder(CupyDevice):
    """A device that records the names of kernels instead of launching them."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: set[str] = set()

    def launch(self, kernel: str, blocks: int, arguments: np.ndarray) -> None:
        self.kernels.add(kernel)


def errors_of(arrays: Inputs) -> list[float]:
    """The relative errors of each output and gradient."""
    exact = Inputs(*(None if x is None else x.astype("float64") for x in arrays))
    return [relative_error(got, want) for got, want in zip(solve(arrays), solve(exact), strict=True)]


def layer(case: Case, n: int) -> Inputs:
    """The arrays of a case, of sizes that no block divides."""
    form, d_state, dtype = case
    arrays = inputs(2, n, 70, d_state, dtype)
    return arrays._replace(**{name: getattr(arrays, name)[0, : arrays.A.shape[0], 0] for name in form})


def solve(arrays: Inputs, device: CupyDevice | None = None) -> list[Any]:
    """Outputs and gradients of a scan: y, state, and the gradient by each input that is not None."""
    import cupy

    y, state, _ = scan_forward(arrays, **OPTIONS, device=device)
    gradients = scan_backward(cupy.ones_like(y), cupy.ones_like(state), arrays, **OPTIONS, device=device)
    return [y, state, *(x for x in gradients if x is not None)]


def relative_error(got: Any, want: Any) -> float:
    """max |got − want| / max |want|; infinite if there is a NaN, which a maximum could pass over."""
    error = float(abs(got.astype("float64") - want).max() / abs(want).max())
    return math.inf if math.isnan(error) else error
