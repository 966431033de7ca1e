"""The same scan in other hands, and attention of equal width."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from asv_benchmarks.gpu import table
from asv_benchmarks.gpu.clock import milliseconds, wall_milliseconds
from asv_benchmarks.gpu.inputs import NO_BFLOAT16, OPTIONS, STATES, has_bfloat16, inputs
from asv_benchmarks.gpu.verdict import USUAL, Found
from subquad.kernels.selective_scan import Inputs
from subquad_cupy._scan import scan_forward

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)


def baselines(found: Found) -> Iterator[str]:
    """The same scan, without skip and gate, float32; from call to result."""
    arrays = inputs(*USUAL, STATES, "float32", full=False)
    ours = wall_milliseconds(_this_kernel(arrays))
    yield from table.header(f"({', '.join(map(str, USUAL))}, {STATES}), float32", "forward, ms", "times ours")
    yield table.row("this kernel", f"{ours:.3f}", 1)
    for key, name, prepare in (
        ("loop", "PyTorch loop over time", _torch_loop),
        ("torch", "torch associative_scan, compiled", _torch_associative),
        ("jax", "jax.lax.associative_scan, jit", _jax_associative),
    ):
        try:
            taken = wall_milliseconds(prepare([arrays[i] for i in (0, 1, 2, 3, 4, 7)]))
        except Exception as problem:  # a baseline that fails is reported, not fatal
            yield table.row(name, table.told(problem), "")
            continue
        found[key] = taken / ours
        yield table.row(name, f"{taken:.2f}", f"{found[key]:.1f}")


def crossover() -> Iterator[str]:
    """The scan beside causal softmax attention of equal width, bfloat16: where attention falls behind."""
    if not has_bfloat16():
        yield f"Left out: {NO_BFLOAT16}."
        return
    import torch

    yield from table.header("n", "scan (1, n, 1024, 16), ms", "attention (1, 16 heads, n, 64), ms")
    faster_from = None
    for n in LENGTHS:
        arrays = inputs(1, n, 1024, STATES, "bfloat16")
        ours = milliseconds(lambda arrays=arrays: scan_forward(arrays, **OPTIONS), 0.2)
        qkv = torch.randn(3, 1, 16, n, 64, device="cuda", dtype=torch.bfloat16)
        attention = torch.nn.functional.scaled_dot_product_attention  # on the default stream, as CuPy
        theirs = milliseconds(lambda qkv=qkv, run=attention: run(*qkv, is_causal=True), 0.2)
        faster_from = (faster_from or n) if ours < theirs else None
        yield table.row(n, f"{ours:.3f}", f"{theirs:.3f}")
    yield from ("", f"The scan is the faster one from n = {faster_from} on." if faster_from else "Attention is faster.")


def _this_kernel(arrays: Inputs) -> Callable[[], Any]:
    import cupy

    def run() -> None:
        scan_forward(arrays, **OPTIONS)
        cupy.cuda.get_current_stream().synchronize()

    return run


def _torch_loop(arrays: list[Any]) -> Callable[[], Any]:
    import torch

    u, delta, A, B, C, bias = (torch.from_dlpack(x) for x in arrays)

    def run() -> None:
        steps = torch.nn.functional.softplus(delta + bias)
        h, out = torch.zeros((*u.shape[::2], A.shape[1]), device=u.device), []
        for t in range(u.shape[1]):
            a = torch.exp(steps[:, t, :, None] * A)
            h = a * h + (steps[:, t] * u[:, t])[..., None] * B[:, t]
            out.append((h * C[:, t]).sum(-1))
        torch.stack(out, 1)
        torch.cuda.synchronize()

    return run


def _torch_associative(arrays: list[Any]) -> Callable[[], Any]:
    import torch
    from torch._higher_order_ops.associative_scan import associative_scan

    u, delta, A, B, C, bias = (torch.from_dlpack(x) for x in arrays)

    def combine(left: Any, right: Any) -> Any:
        return left[0] * right[0], left[1] * right[0] + right[1]

    @torch.compile
    def scan() -> Any:
        steps = torch.nn.functional.softplus(delta + bias)
        a, b = torch.exp(steps[..., None] * A), (steps * u)[..., None] * B
        return (associative_scan(combine, (a, b), dim=1)[1] * C).sum(-1)

    def run() -> None:
        scan()
        torch.cuda.synchronize()

    return run


def _jax_associative(arrays: list[Any]) -> Callable[[], Any]:
    import jax

    jnp = jax.numpy
    u, delta, A, B, C, bias = (jnp.from_dlpack(x) for x in arrays)

    @jax.jit
    def scan(u: Any, delta: Any, A: Any, B: Any, C: Any, bias: Any) -> Any:
        steps = jax.nn.softplus(delta + bias)
        a, b = jnp.exp(steps[..., None] * A), (steps * u)[..., None] * B
        h = jax.lax.associative_scan(lambda x, y: (x[0] * y[0], x[1] * y[0] + y[1]), (a, b), axis=1)[1]
        return (h * C).sum(-1)

    return lambda: scan(u, delta, A, B, C, bias).block_until_ready()
