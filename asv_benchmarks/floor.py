"""`python -m asv_benchmarks.floor`: time as a multiple of the time of the matrix products and exponentials alone.

For each head, FAVOR+ and Nyström attention take two products and one exponential of n × m numbers on the side of the
queries, and two and one on the side of the keys. Exact attention takes two and one of n × n numbers, and half of these
where it is causal. A window, BigBird and LSH take them for the pairs that they visit, Linformer for n × m: what hashes
or pools counts for nothing.

Causal FAVOR+ takes the same as FAVOR+, and for the b rows of a block of its kernel the pairs (i, j ≤ i): φ(q) φ(k)ᵀ and
its product with v, n (b + 1) / 2 numbers of m and of d_v terms.

A gradient computes φ again. By the queries it takes four products and one exponential: φ_q, g Sᵀ, φ_qᵀ g, dy Wᵀ, and
by the keys as many: φ_k, v dSᵀ, φ_k dS, dx Wᵀ; in Nyström attention one more each, by the landmarks. In causal use it
walks over the blocks twice, with both exponentials each time: forward φ_q, φ_k, S, S g and dy Wᵀ, back φ_q, φ_k, R,
R v, φ_k R and dx Wᵀ; and pairs of a block three times for each of the two kinds: v gᵀ in both walks and p g; p, and dp
with either φ. A row "gradient" is the forward pass and the gradients by q, k and v.

The floor is the time that the array library itself needs for these, block by block in
cache, in the same run. Each is measured alone: the threads of a library's products spin on for some milliseconds, on
cores that the method would otherwise have.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from array_api_compat import array_namespace

from asv_benchmarks import harness
from subquad.cli.cases import HEADS, D, find_case

ROWS = 1024  # rows of a block, whose products fit the cache
KEYS = 512  # keys of a block of exact attention
# rows of a block of the causal kernel, `block_rows` of `subquad_numpy.features.step` where registers have 512 bits
CAUSAL_ROWS = 32


class Work(NamedTuple):
    """A method's options, and what a head takes for n rows: matrices of n × width numbers."""

    options: Mapping[str, Any]
    width: int
    exponentials: Callable[[int], float]  # of n
    products: float | None = None  # of D terms a number; None: two for each matrix of exponentials
    causal: bool = False
    gradient: bool = False


def _pairs(width: int) -> float:
    """How many products φ(q) φ(k)ᵀ and its product with v are, for the pairs within blocks of the causal kernel."""
    return (CAUSAL_ROWS + 1) / 2 * (1 / D + 1 / width)


WORK = {
    "favor": Work({"num_features": 256}, 256, lambda n: 2),
    "nystrom": Work({"num_landmarks": 64}, 64, lambda n: 2),
    "window": Work({"left": 256}, 512, lambda n: 513 / 512),
    "bigbird": Work({"block_size": 64}, 512, lambda n: 1 + 128 / 512),  # 8 blocks, and two blocks of rows read all
    "lsh": Work({"bucket_size": 64, "num_rounds": 4}, 128, lambda n: 4),
    "linformer": Work({"rank": 256}, 256, lambda n: 1),
    "exact": Work({}, KEYS, lambda n: n / KEYS),
    "exact causal": Work({}, KEYS, lambda n: n / KEYS / 2, causal=True),
    "favor causal": Work({"num_features": 256}, 256, lambda n: 2, 4 + _pairs(256), causal=True),
    "favor gradient": Work({"num_features": 256}, 256, lambda n: 4, 12, gradient=True),
    "favor causal gradient": Work(
        {"num_features": 256}, 256, lambda n: 6, 15 + 4 * _pairs(256), causal=True, gradient=True
    ),
    "nystrom gradient": Work({"num_landmarks": 64}, 64, lambda n: 4, 14, gradient=True),
}


def calls(backend: str, method: str, n: int) -> dict[str, harness.Run]:
    """Functions to be timed: "ours", the method; "products"; and "exponentials"."""
    work = WORK[method]
    case = find_case(method.partition(" ")[0], work.options, causal=work.causal)
    found, m = {"ours": harness.prepare(backend, case.random(n), gradient=work.gradient).run}, work.width
    exponentials = work.exponentials(n)
    counts = {"products": work.products or 2 * exponentials, "exponentials": exponentials}
    target, rng = harness.target(backend), np.random.default_rng(0)
    x, w, y = (rng.standard_normal(shape, dtype=np.float32) for shape in ((ROWS, D), (D, m), (ROWS, m)))
    for name, function, arrays in (
        ("products", _multiply, (x, w, y)),
        ("exponentials", _exponentiate, (np.zeros_like(y), y)),
    ):
        count = round(HEADS * n / ROWS * counts[name])
        found[name] = _often(harness.Prepared(target, function, arrays), count)
    return found


def measure(found: dict[str, harness.Run], repeat: int) -> dict[str, list[float]]:
    """The times of the functions of `calls`, each alone."""
    return harness.interleave(found, repeat, alone=True)


def multiple(times: dict[str, list[float]]) -> float:
    """Time of the method divided by the floor, by minimum times: other load on the machine can only add to a time."""
    return min(times["ours"]) / (min(times["products"]) + min(times["exponentials"]))


def _often(prepared: harness.Prepared, count: int) -> harness.Run:
    def run() -> None:
        for _ in range(count):
            out = prepared.call(*prepared.args)
        prepared.bench.synchronize(out)

    return run


def _multiply(x: Any, w: Any, out: Any) -> Any:
    """x w, written into `out` if the library can, since fresh memory pages would cost more than the product."""
    xp = array_namespace(x)
    try:
        return xp.matmul(x, w, out=out)
    except TypeError:  # JAX has no `out`: its arrays are immutable
        return xp.matmul(x, w)


def _exponentiate(x: Any, out: Any) -> Any:
    xp = array_namespace(x)
    try:
        return xp.exp(x, out=out)
    except (TypeError, NotImplementedError):
        return xp.exp(x)


def main() -> None:
    from rich.console import Console
    from rich.table import Table

    parser = argparse.ArgumentParser(prog="python -m asv_benchmarks.floor", description=__doc__.partition("\n")[0])
    parser.add_argument("--n", type=int, default=8192)
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--only", nargs="*", choices=list(WORK), help="these rows alone")
    args = parser.parse_args()
    title = f"({HEADS}, {args.n}, {D}) float32, medians of {args.repeat}"
    table = Table("operator", "products / ms", "exponentials / ms", "ours / ms", "multiple", title=title)
    for method, backend in ((method, backend) for method in args.only or WORK for backend in harness.backends()):
        try:
            times = measure(calls(backend, method, args.n), args.repeat)
        except NotImplementedError:
            continue
        medians = [f"{1e3 * statistics.median(times[x]):.1f}" for x in ("products", "exponentials", "ours")]
        table.add_row(f"{method} on {backend}", *medians, f"{multiple(times):.2f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
