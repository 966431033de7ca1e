"""Errors of heads on activations of a trained model, at a share of the keys, and what "auto" makes of a tolerance.

    python -m asv_benchmarks.quality.heads FILE.npz …      queries, keys and values q (heads, n, d), k and v
    python -m asv_benchmarks.quality.heads DIR --n 4096 --share 0.15 --tolerances 0.05 --times
    python -m asv_benchmarks.quality.heads DIR --seeds 100                          "auto" with other sampled rows

A folder stands for its files ``smol*.npz``, such as `python -m asv_benchmarks.quality.activations DIR` writes. Causal
and not, two tables. "Opened" is the largest number of opened clusters with which "clustered" reads at most the share of
the keys that a row sees. For "auto", an error is that of the whole output, where the choice is by sampled rows, each
file is a call, and its cost is the share of the keys that its choices read, exact attention 1, of all heads. `--times`
measures a crossover on this machine first: rungs that are slower than exact attention are then left out, and the time
that the table predicts is told, relative to exact attention. `--seeds` takes the choices of that many seeds, from the
errors of all rows, which are computed once: misses are seldom, and one seed shows few.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

import subquad
from asv_benchmarks import harness
from asv_benchmarks.quality import console
from asv_benchmarks.quality.shares import SHARES
from subquad.attention.call import enter
from subquad.attention.error_bounds import bounded_by, carried, draw

Array = np.ndarray
MISS = 1.2  # times the tolerance that no error should be above


@dataclass(frozen=True)
class Heads:
    """The heads of one layer on one text: q (heads, n, d), k and v (key heads, n, d), and their exact output."""

    name: str
    q: Array
    k: Array
    v: Array
    exact: Array
    causal: bool

    def share(self, method: Any) -> float:
        """Keys that a method reads per row over keys that the row sees."""
        share = SHARES["exact" if isinstance(method, subquad.Exact) else "clustered"]
        return share(method, self.q, self.k, self.v, causal=self.causal)


def files(paths: list[Path]) -> list[Path]:
    """The files that paths stand for."""
    found = [x for path in paths for x in (sorted(path.glob("smol*.npz")) if path.is_dir() else [path])]
    if not found:
        msg = f"no smol*.npz in {', '.join(map(str, paths))}"
        raise FileNotFoundError(msg)
    return found


def read(path: Path, n: int, *, causal: bool) -> Heads:
    """The first `n` tokens of a file, in float32."""
    with np.load(path) as stored:
        q, k, v = (stored[name][:, :n].astype(np.float32) for name in "qkv")
    return Heads(path.stem, q, k, v, subquad.attention(q, k, v, "exact", causal=causal), causal)


def within(method: subquad.Clustered, heads: Heads, share: float) -> subquad.Clustered:
    """The method with the largest number of opened clusters that reads at most a share of the keys; none at least."""
    opened = 0
    while heads.share(replace(method, opened=opened + 1)) <= share and opened < heads.k.shape[-2]:
        opened += 1
    return replace(method, opened=opened)


def judge(heads: Heads, share: float, chunk: int | None = None) -> dict[str, Any]:
    """The errors of "clustered" on some heads at a share of the keys, with chunks of this size or the default."""
    method = subquad.Clustered() if chunk is None else subquad.Clustered(chunk=chunk)
    method = within(method, heads, share)
    out = subquad.attention(heads.q, heads.k, heads.v, method, causal=heads.causal)
    errors = harness.head_errors(out, heads.exact)
    return {"name": heads.name, "opened": method.opened, "share": heads.share(method), "errors": errors}


def choose(heads: Heads, tolerance: float, crossover: Any) -> Iterator[dict[str, Any]]:
    """What "auto" chooses for each of some heads: its error, the share of the keys and the time of the choice."""
    auto = subquad.Auto(tolerance=tolerance, crossover=crossover)
    made = auto.with_choice(heads.q, heads.k, heads.v, causal=heads.causal)
    errors = harness.head_errors(made(heads.q, heads.k, heads.v, causal=heads.causal), heads.exact)
    numbers = np.broadcast_to(made.choice, len(heads.q)).tolist()
    for error, number in zip(errors, numbers, strict=True):
        method = made.rungs[number]
        exact = isinstance(method, subquad.Exact)
        time = None
        if isinstance(crossover, subquad.Crossover):
            time = 1.0 if exact else crossover.ratio(method, heads.k.shape[-2])
        yield {"error": error, "exact": exact, "share": heads.share(method), "time": time}


def choose_often(heads: Heads, tolerances: list[float], seeds: int) -> Iterator[tuple[float, dict[str, Any]]]:
    """(tolerance, what "auto" chooses for a head with `crossover=1`), as `choose` has it, for seeds 0 … seeds − 1."""
    auto = subquad.Auto(crossover=1)
    call = enter(None, {"q": heads.q, "k": heads.k, "v": heads.v}, causal=heads.causal)
    size = (heads.exact.astype(float) ** 2).sum(axis=-1)
    off = [
        ((subquad.attention(heads.q, heads.k, heads.v, x, causal=heads.causal) - heads.exact).astype(float) ** 2).sum(
            -1
        )
        for x in auto.rungs
    ]
    errors = [np.sqrt(x.sum(axis=-1) / size.sum(axis=-1)) for x in off]
    shares = [heads.share(x) for x in auto.rungs]
    groups = len(heads.k), -1, 1
    for seed in range(seeds):
        numbers, weights = draw(call, auto.rungs, auto.rows, seed)
        before: list[tuple[Any, Array]] = []
        for method, e in zip(auto.rungs[:-1], off, strict=False):
            off_here, size_here = (x[:, numbers] * weights for x in (e, size))
            found = bounded_by(off_here, size_here, weights, np.ones(len(heads.q), bool))
            of_groups = found.bound.reshape(groups)
            bound = np.broadcast_to(of_groups.max(axis=1, keepdims=True), of_groups.shape).reshape(-1)
            before.append((method, carried(method, bound, before)))
        bounds = np.stack([*(bound for _, bound in before), np.zeros(len(heads.q))])
        for tolerance in tolerances:
            for head, number in enumerate((bounds <= tolerance).argmax(axis=0).tolist()):
                exact = number == len(before)
                error = errors[number][head]
                yield tolerance, {"error": error, "exact": exact, "share": shares[number], "time": None}


def summary(tolerance: float, found: list[dict[str, Any]]) -> list[str]:
    """A row of the table of "auto"."""
    ratios = [x["error"] / tolerance for x in found]
    met, missed = (sum(x <= limit for x in ratios) for limit in (1, MISS))
    times = [x["time"] for x in found if x["time"] is not None]
    return [
        f"{tolerance:g}", f"{met} of {len(found)}", f"{max(ratios):.2f}", f"{len(found) - missed}",
        f"{sum(x['exact'] for x in found)}", f"{statistics.mean(x['share'] for x in found):.2f}",
        f"{statistics.mean(times):.2f}" if times else "–",
    ]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m asv_benchmarks.quality.heads", description=__doc__.partition("\n")[0]
    )
    add = parser.add_argument
    add("paths", type=Path, nargs="+", metavar="PATH", help="files with q, k and v, or folders of them")
    add("--n", type=int, default=2048, help="tokens, the first ones (default: %(default)s)")
    add("--share", type=float, default=0.2, help="of the keys that a row sees, at most (default: %(default)s)")
    add("--chunk", type=int, help='rows of a chunk of causal "clustered" (default: that of the method)')
    add("--tolerances", metavar="LIST", default="0.02,0.05,0.1,0.2", help="of auto (default: %(default)s)")
    add("--causal", choices=("yes", "no", "both"), default="both", help="default: %(default)s")
    add(
        "--seeds",
        type=int,
        default=0,
        help="of the sampled rows, whose choices are all judged (default: one, by a call)",
    )
    add("--times", action="store_true", help="measure a crossover on this machine, and tell the time that it predicts")
    add("--threads", type=int, help="of subquad (default: the cores of this process)")
    args = parser.parse_args()
    harness.use_threads(args.threads)
    tolerances = [float(x) for x in args.tolerances.split(",") if x]
    try:
        paths = files(args.paths)
        for causal in {"yes": (True,), "no": (False,), "both": (False, True)}[args.causal]:
            _show(paths, args, tolerances, causal=causal)
    except (FileNotFoundError, KeyError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


def _show(paths: list[Path], args: argparse.Namespace, tolerances: list[float], *, causal: bool) -> None:
    kind, all_errors, rows = "causal" if causal else "not causal", [], []
    found: dict[float, list[dict[str, Any]]] = {x: [] for x in tolerances}
    crossover: Any = 1
    for path in track(paths, kind, console=Console(stderr=True)):
        heads = read(path, args.n, causal=causal)
        if args.times and not isinstance(crossover, subquad.Crossover):
            rungs = subquad.Auto().rungs[:-1]
            crossover = subquad.measure_crossover(heads.q[0], rungs, causal=causal, lengths=[args.n])
        row = judge(heads, args.share, args.chunk)
        all_errors += row["errors"]
        rows.append(
            [row["name"], str(row["opened"]), f"{row['share']:.3f}", " ".join(f"{x:.3f}" for x in row["errors"])]
        )
        if args.seeds:
            for tolerance, choice in choose_often(heads, tolerances, args.seeds):
                found[tolerance].append(choice)
            continue
        for tolerance in tolerances:
            found[tolerance] += choose(heads, tolerance, crossover)
    title = f"{kind}, n = {args.n}: 'clustered' at {args.share:.0%} of the keys"
    total = f"median {statistics.median(all_errors):.4f}, worst {max(all_errors):.4f}"
    rows.append([f"{len(all_errors)} heads", "", "", total])
    console.show(title, ["file", "opened", "share", "errors of heads"], rows)
    if tolerances:
        judged = ["tolerance", "met", "worst / tolerance", f"above {MISS:g}"]
        header = [*judged, "exact", "share of keys", "predicted time"]
        console.show(f"{kind}, n = {args.n}: 'auto'", header, [summary(x, found[x]) for x in tolerances])


if __name__ == "__main__":
    sys.exit(main())
