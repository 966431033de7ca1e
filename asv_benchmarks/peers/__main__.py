"""How many times faster than each peer, and how much closer, on this machine: same inputs, one process, interleaved."""

from __future__ import annotations

import argparse
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from asv_benchmarks import record
from asv_benchmarks.peers.attention import PEERS, Peer, real_keys
from asv_benchmarks.peers.scans import SCAN_PEERS, Problem, ScanPeer, reference_loop
from asv_benchmarks.peers.timing import Run, interleave
from subquad.cli import definitions
from subquad.cli.inputs import read_sample

PACKAGES = ("numpy", "numba", "torch", "transformers", "jax")
SUITES = {
    "attention": (8192, ("performer-pytorch", "nystrom-attention")),
    "scan": (2048, ("mambapy",)),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m asv_benchmarks.peers", description=__doc__)
    parser.add_argument("suite", nargs="?", choices=SUITES, default="attention")
    parser.add_argument("--n", type=int, help="sequence length (default 8192 for attention, 2048 for the scan)")
    parser.add_argument("--repeat", type=int, default=7, help="interleaved pairs (default 7)")
    parser.add_argument("--threads", type=int, help="of each library (default: the cores of this process)")
    parser.add_argument("--only", default="", metavar="TEXT", help="peers whose name contains it; writes no file")
    parser.add_argument("--out", type=Path, help="JSON file (default asv_benchmarks/results/peers-SUITE.json)")
    args = parser.parse_args()
    threads = record.use_threads(args.threads)
    import torch

    torch.set_num_threads(threads)
    default, packages = SUITES[args.suite]
    n = args.n or default
    title, rows = (attention if args.suite == "attention" else scan)(n, args.repeat, args.only)
    Console(width=160).print(table(f"{title}, {threads} threads", rows))
    if args.only and args.out is None:
        return
    flags = [f"--{name} {value}" for name, value in (("n", args.n), ("threads", args.threads)) if value]
    flags += [] if args.repeat == 7 else [f"--repeat {args.repeat}"]
    record.write(
        args.out or record.RESULTS / f"peers-{args.suite}.json",
        module="asv_benchmarks.peers", arguments=[args.suite, *flags], title=title,
        packages=[*PACKAGES, *packages], threads=threads, n=n, rows=rows,
    )  # fmt: skip


def attention(n: int, repeat: int, only: str) -> tuple[str, list[dict[str, Any]]]:
    """Time on random numbers at length n, error on the sample of real activations."""
    import torch

    rng = np.random.default_rng(0)
    host = [rng.standard_normal((1, 8, n, 64), dtype=np.float32) for _ in range(3)]
    rows = []
    with torch.no_grad():
        for peer in PEERS:
            if only not in peer.name:
                continue
            arrays = [peer.bench.asarray(x) for x in host]
            pairs = min(repeat, peer.repeat or repeat)
            row = _row(peer.name, *peer.calls(*arrays), pairs)
            rows.append(row if peer.gradient else row | errors_of(peer))
    return f"attention, (1, 8, {n}, 64) float32", rows


def errors_of(peer: Peer) -> dict[str, float]:
    """Relative error of both against exact attention in float64, at equal m; the median over draws.

    Beside them that of answering the mean of v, which knows no query: an error above it has learnt nothing, and one
    equal to it may have answered just that.
    """
    import torch

    sample = read_sample()
    shared_by = sample.q.shape[0] // sample.k.shape[0]
    host = [sample.q, *(np.repeat(x, shared_by, axis=0) for x in (sample.k, sample.v))]
    seen = real_keys(sample.k.shape[-2]) if peer.padded else slice(None)
    exact = definitions.attention(host[0], *(x[:, seen] for x in host[1:]), causal=peer.causal)
    arrays = [peer.bench.asarray(x[None]) for x in host]
    errors: dict[str, list[float]] = {"error_ours": [], "error_theirs": []}
    for seed in range(max(1, peer.seeds)):
        torch.manual_seed(seed)
        calls = peer.ours(*arrays, **({"seed": seed} if peer.seeds else {})), peer.theirs(*arrays)
        for values, call in zip(errors.values(), calls, strict=True):
            out = peer.bench.to_numpy(call())[0]
            if out.shape != exact.shape:  # (n, heads · d) or (n, heads, d)
                out = np.swapaxes(out.reshape(out.shape[0], exact.shape[0], -1), 0, 1)
            values.append(definitions.relative_error(out, exact))
    mean = definitions.mean_of_values(host[0], host[2][:, seen], causal=peer.causal)
    mean = mean[:, :1] if peer.padded else mean  # each row is the same, and they are as many as the keys
    found = {name: statistics.median(values) for name, values in errors.items()}
    return found | {"error_mean": definitions.relative_error(mean, exact)}


def scan(n: int, repeat: int, only: str) -> tuple[str, list[dict[str, Any]]]:
    """Time, and error against the loop in float64."""
    problem = Problem.draw(1, n, 1536, 16)
    wanted = [peer for peer in SCAN_PEERS if only in peer.name]
    exact = {g: _arrays(reference_loop(problem.wide(), g)()) for g in {peer.gradient for peer in wanted}}
    rows = [_scan_row(peer, problem, exact[peer.gradient], repeat) for peer in wanted]
    return f"selective scan, batch 1, n = {n}, d = 1536, d_state = 16, float32", rows


def _scan_row(peer: ScanPeer, problem: Problem, exact: list[np.ndarray], repeat: int) -> dict[str, Any]:
    calls = {"ours": peer.ours(problem, peer.gradient), "theirs": peer.theirs(problem, peer.gradient)}
    errors = {}
    for name, call in calls.items():
        pairs = zip(_arrays(call()), exact, strict=True)
        errors[f"error_{name}"] = max(definitions.relative_error(x, reference) for x, reference in pairs)
    assert max(errors.values()) < 1e-3, f"{peer.name} computes something else: {errors}"
    return _row(peer.name, calls["ours"], calls["theirs"], repeat) | errors


def _arrays(out: Any) -> list[np.ndarray]:
    """One output, or the gradients by each input."""
    return [np.asarray(x) for x in (out if isinstance(out, tuple | list) else [out])]


def _row(name: str, ours: Run, theirs: Run, repeat: int) -> dict[str, Any]:
    found = interleave(ours, theirs, repeat)
    times = {"ours_ms": 1e3 * found.ours.median, "theirs_ms": 1e3 * found.theirs.median}
    return {"peer": name, "pairs": repeat, **times, "ratio": asdict(found.ratio)}


def table(title: str, rows: list[dict[str, Any]]) -> Table:
    times, ratio = ("theirs / ms", "ours / ms"), ("theirs / ours", "least", "most", "pairs")
    shown = Table("peer", *times, *ratio, "error: ours", "theirs", "mean of v", title=title)
    for row in rows:
        ratio = (f"{row['ratio'][name]:.2f}" for name in ("median", "least", "most"))
        errors = (f"{row[name]:.3g}" if name in row else "–" for name in ("error_ours", "error_theirs", "error_mean"))
        shown.add_row(
            row["peer"], f"{row['theirs_ms']:.1f}", f"{row['ours_ms']:.1f}", *ratio, str(row["pairs"]), *errors
        )
    return shown


if __name__ == "__main__":
    main()
