"""`python -m asv_benchmarks.frameworks`: one call on two array libraries, in turn in one process.

A ratio is that of the medians. Without options it is JAX beside NumPy: no other library is loaded, since PyTorch's
threads spin on for a while after a call. With `--gradients` JAX beside PyTorch, each with the gradients of all
arguments, and PyTorch's own forward pass; each call then waits until the threads of the one before sleep, or JAX would
pay for those of PyTorch. With `--fused` exact attention of NumPy beside PyTorch's fused attention.
"""

from __future__ import annotations

import argparse
import statistics

import numpy as np

import subquad
from asv_benchmarks import harness
from subquad.cli.cases import Problem

SHAPE = (1, 8, 8192, 64)
LAYER, STATES = (1, 2048, 1536), 16  # batch, n, channels of a selective scan
METHODS = {
    "favor": {"num_features": 256},
    "favor causal": {"num_features": 256},
    "linear": {},
    "linear causal": {},
    "nystrom": {"num_landmarks": 64},
}
SCANS = {"selective_scan even": True, "selective_scan other": False}  # is A an arithmetic sequence?


def problem(name: str) -> Problem:
    """The call of a name of METHODS or SCANS."""
    if name in SCANS:
        return scan(even=SCANS[name])
    method, _, causal = name.partition(" ")
    arrays = np.random.default_rng(0).standard_normal((3, *SHAPE), dtype=np.float32)
    options = {"method": method, "causal": bool(causal), **METHODS[name]}
    return Problem(subquad.attention, dict(zip("qkv", arrays, strict=True)), options)


def scan(*, even: bool) -> Problem:
    """A selective scan of a Mamba layer; its rates are those of Mamba's initialisation, or up to 10 % off them."""
    arrays = harness.mamba(np, LAYER, STATES)
    if not even:
        noise = np.random.default_rng(1).random(arrays["A"].shape, np.float32)
        arrays["A"] = arrays["A"] * (1 + np.float32(0.1) * noise)
    return Problem(subquad.selective_scan, arrays, {"delta_softplus": True})


def fused() -> dict[str, harness.Run]:
    """Exact attention of (1, 8, 4096, 64), by NumPy arrays and by PyTorch's own function."""
    import torch

    arrays = np.random.default_rng(0).standard_normal((3, 1, 8, 4096, 64), dtype=np.float32)
    tensors = [torch.from_numpy(x) for x in arrays]
    found: dict[str, harness.Run] = {}
    for causal in (False, True):
        end = " causal" if causal else ""
        found[f"NumPy{end}"] = lambda causal=causal: subquad.attention(*arrays, "exact", causal=causal)
        found[f"PyTorch{end}"] = lambda causal=causal: torch.nn.functional.scaled_dot_product_attention(
            *tensors, is_causal=causal
        )
    return found


def measure(calls: dict[str, harness.Run], repeat: int, *, alone: bool = False) -> dict[str, float]:
    """Median milliseconds of each call; `alone` is that of `harness.interleave`."""
    found = harness.interleave(calls, repeat, alone=alone)
    return {name: 1e3 * statistics.median(times) for name, times in found.items()}


def rows(repeat: int, *, gradients: bool, only: str) -> list[list[str]]:
    """A row for each call: its name, milliseconds of the libraries, and ratios."""
    found = []
    for name in METHODS | SCANS if gradients else METHODS:
        if only not in name:
            continue
        call, sides = problem(name), {}
        for library, gradient in (("torch", False), ("torch", True), ("jax", True)) if gradients else (
            ("numpy", False), ("jax", False),
        ):  # fmt: skip
            sides[f"{library}{' gradient' if gradient else ''}"] = harness.prepare(library, call, gradient=gradient).run
        times = list(measure(sides, repeat, alone=gradients).values())
        ratios = [f"{times[-1] / times[-2]:.2f}", *([f"{times[1] / times[0]:.2f}"] if gradients else [])]
        found.append([name, *(f"{x:.2f}" for x in times), *ratios])
    return found


def main() -> None:
    from rich.console import Console
    from rich.table import Table

    parser = argparse.ArgumentParser(prog="python -m asv_benchmarks.frameworks", description=__doc__.partition("\n")[0])
    parser.add_argument("--gradients", action="store_true", help="JAX beside PyTorch, forward and backward")
    parser.add_argument("--fused", action="store_true", help="exact attention of NumPy beside PyTorch's own")
    parser.add_argument("--only", default="", help="calls whose name has this text")
    parser.add_argument("--repeat", type=int, default=31)
    args = parser.parse_args()
    if args.fused:
        times = measure(fused(), args.repeat)
        table = Table("", "NumPy / ms", "PyTorch / ms", "ratio", title="exact (1, 8, 4096, 64)")
        for end in ("", " causal"):
            one, other = times[f"NumPy{end}"], times[f"PyTorch{end}"]
            table.add_row(f"exact{end}", f"{one:.1f}", f"{other:.1f}", f"{one / other:.2f}")
    else:
        names = ["NumPy", "JAX", "JAX / NumPy"]
        if args.gradients:
            names = ["PyTorch", "with gradient", "JAX with gradient", "JAX / PyTorch", "with gradient / without"]
        table = Table("", *names, title=f"{SHAPE}, float32, ms, medians of {args.repeat}")
        for row in rows(args.repeat, gradients=args.gradients, only=args.only):
            table.add_row(*row)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
