"""Forward and backward pass beside their floors."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from asv_benchmarks.gpu import table
from asv_benchmarks.gpu.clock import milliseconds
from asv_benchmarks.gpu.inputs import NO_BFLOAT16, OPTIONS, STATES, has_bfloat16, inputs
from asv_benchmarks.gpu.verdict import LONG, USUAL, Found
from subquad.kernels.selective_scan import Inputs
from subquad_cupy._scan import scan_backward, scan_forward

SHAPES = [USUAL, (1, 4096, 2048), (1, 65536, 1024), LONG, (1, 524288, 1024)]


def kernels(found: Found, copied: float, exps: float) -> Iterator[str]:
    """Each shape beside the larger of two floors: exponentials, and bytes of u, delta, z and y.

    A gradient is taken without checkpoints, as by the library; the last column has those that a forward pass can keep.
    """
    import cupy

    columns = ("batch, n, d, states", "data type", "floor, ms", "forward, ms", "/ floor", "backward / forward")
    yield from table.header(*columns, "the same from checkpoints")
    for dtype in ("bfloat16", "float32"):
        if dtype == "bfloat16" and not has_bfloat16():
            yield table.row("all", dtype, NO_BFLOAT16, *[""] * 4)
            continue
        for shape in SHAPES:
            named = ", ".join(map(str, (*shape, STATES)))
            try:
                arrays = inputs(*shape, STATES, dtype)
                values = arrays.u.size
                # beside those of the states, softplus and silu take two each
                floor = 1e3 * max(values * (STATES + 4) / exps, 4 * values * arrays.u.itemsize / copied)

                def forward(arrays: Inputs = arrays) -> Any:
                    return scan_forward(arrays, **OPTIONS)

                taken = milliseconds(forward)
                found["forward", dtype, shape] = taken / floor
                ratio = kept = "not run"
                if values < 2**28:
                    backward = functools.partial(scan_backward, cupy.ones_like(arrays.u), None, arrays, **OPTIONS)
                    found["backward", dtype, shape] = milliseconds(backward) / taken
                    ratio = f"{found['backward', dtype, shape]:.2f}"
                    *_, saved = scan_forward(arrays, **OPTIONS, save=True)
                    run = functools.partial(backward, checkpoints=saved)
                    kept = "do not fit" if saved is None else f"{milliseconds(run) / taken:.2f}"
            except Exception as problem:  # the other shapes still run
                yield table.row(named, dtype, table.told(problem), *[""] * 4)
                continue
            yield table.row(named, dtype, f"{floor:.3f}", f"{taken:.3f}", f"{taken / floor:.2f}", ratio, kept)
