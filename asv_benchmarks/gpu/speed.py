"""Speed of the CUDA scan beside its floors, other implementations, and attention of equal width."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import subquad
from asv_benchmarks import harness
from asv_benchmarks.gpu import table
from asv_benchmarks.gpu.clock import milliseconds
from asv_benchmarks.gpu.inputs import NO_BFLOAT16, OPTIONS, STATES, has_bfloat16, inputs
from asv_benchmarks.gpu.table import LONG, USUAL, Found
from asv_benchmarks.peers import scans
from subquad_cupy.selective_scan.calls import scan_backward, scan_forward

SHAPES = [USUAL, (1, 4096, 2048), (1, 65536, 1024), LONG, (1, 524288, 1024)]


def kernels(found: Found, copied: float, exps: float) -> Iterator[str]:
    """The lines of a table of times beside the larger of two floors: exponentials, and bytes of u, delta, z and y.

    As in the library, gradients are computed without checkpoints. The last column is the time of a gradient that starts
    from the checkpoints that a forward pass can keep.
    """
    columns = ("batch, n, d, states", "data type", "floor, ms", "forward, ms", "/ floor", "backward / forward")
    yield from table.header(*columns, "the same from checkpoints")
    for dtype, shape in itertools.product(("bfloat16", "float32"), SHAPES):
        named = ", ".join(map(str, (*shape, STATES)))
        if dtype == "bfloat16" and not has_bfloat16():
            yield table.row(named, dtype, NO_BFLOAT16, *[""] * 4)
            continue
        try:
            yield table.row(named, dtype, *_kernel(found, dtype, shape, copied, exps))
        except Exception as problem:  # the other shapes still run
            yield table.row(named, dtype, table.told(problem), *[""] * 4)


def _kernel(found: Found, dtype: str, shape: tuple[int, int, int], copied: float, exps: float) -> list[str]:
    import cupy

    arrays = inputs(*shape, STATES, dtype)
    values = arrays.u.size
    # exponentials: one for each state, and two each for softplus and silu
    floor = 1e3 * max(values * (STATES + 4) / exps, 4 * values * arrays.u.itemsize / copied)
    taken = milliseconds(functools.partial(scan_forward, arrays, **OPTIONS))
    found["forward", dtype, shape] = taken / floor
    cells = [f"{floor:.3f}", f"{taken:.3f}", f"{taken / floor:.2f}"]
    if values >= 2**28:
        return [*cells, "not run", "not run"]
    backward = functools.partial(scan_backward, cupy.ones_like(arrays.u), None, arrays, **OPTIONS)
    found["backward", dtype, shape] = milliseconds(backward) / taken
    *_, saved = scan_forward(arrays, **OPTIONS, save=True)
    again = functools.partial(backward, checkpoints=saved)
    kept = "do not fit" if saved is None else f"{milliseconds(again) / taken:.2f}"
    return [*cells, f"{found['backward', dtype, shape]:.2f}", kept]


def torch_associative(u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any) -> Any:
    """The scan by PyTorch's `associative_scan`, which runs under torch.compile alone."""
    from torch._higher_order_ops.associative_scan import associative_scan

    pairs = (delta[..., None] * A).exp(), (delta * u)[..., None] * B[:, :, None, :]
    return (associative_scan(scans.joined, pairs, dim=1)[1] * C[:, :, None, :]).sum(-1) + D * u


RIVALS: list[tuple[str, str, str, Callable[..., Any]]] = [
    ("loop", "PyTorch: mamba-ssm's reference loop", "torch:cuda:0", scans.reference_loop),
    ("torch", "torch associative_scan, compiled", "torch:cuda:0", torch_associative),
    ("jax", "jax.lax.associative_scan, jit", "jax", scans.associative_scan),
]


def rivals(found: Found) -> Iterator[str]:
    """The lines of a table of other implementations: a float32 scan without gate, ours and theirs in turn."""
    arrays = scans.draw(*USUAL, STATES)
    ours = harness.Prepared(harness.target("cupy"), subquad.selective_scan, arrays).run
    yield from table.header(f"({', '.join(map(str, USUAL))}, {STATES}), float32", "theirs, ms", "ours, ms", "ratio")
    for key, name, backend, function in RIVALS:
        try:
            given = tuple(map(scans.turned, arrays)) if function is scans.reference_loop else arrays
            scan = _compiled(function) if function is torch_associative else function
            row = harness.compare(name, ours, harness.Prepared(harness.target(backend), scan, given).run, 7)
        except Exception as problem:  # a rival that fails is reported, not fatal
            yield table.row(name, table.told(problem), "", "")
            continue
        found[key] = row["ratio"]["median"]
        yield table.row(name, f"{row['theirs_ms']:.2f}", f"{row['ours_ms']:.3f}", f"{found[key]:.1f}")


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    import torch

    return torch.compile(function)


def crossover() -> Iterator[str]:
    """The lines of a table of the scan beside causal attention of equal width in bfloat16, and where the scan wins."""
    if not has_bfloat16():
        yield f"Left out: {NO_BFLOAT16}."
        return
    import torch
    from torch.nn.functional import scaled_dot_product_attention  # on the default stream, as CuPy

    yield from table.header("n", "scan (1, n, 1024, 16), ms", "attention (1, 16 heads, n, 64), ms")
    faster_from = None
    for n in harness.doubling(512, 65536):
        arrays = inputs(1, n, 1024, STATES, "bfloat16")
        ours = milliseconds(functools.partial(scan_forward, arrays, **OPTIONS), 0.2)
        qkv = torch.randn(3, 1, 16, n, 64, device="cuda", dtype=torch.bfloat16)
        theirs = milliseconds(functools.partial(scaled_dot_product_attention, *qkv, is_causal=True), 0.2)
        faster_from = (faster_from or n) if ours < theirs else None
        yield table.row(n, f"{ours:.3f}", f"{theirs:.3f}")
    yield from ("", f"The scan is the faster one from n = {faster_from} on." if faster_from else "Attention is faster.")
