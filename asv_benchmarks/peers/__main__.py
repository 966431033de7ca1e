"""How many times faster than each peer, on this machine: same inputs, one process, interleaved."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import subquad
from asv_benchmarks.peers import PEERS
from asv_benchmarks.peers.scans import SCAN_PEERS, Problem
from asv_benchmarks.peers.timing import interleave


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m asv_benchmarks.peers", description=__doc__)
    parser.add_argument("suite", nargs="?", choices=["attention", "scan"], default="attention")
    parser.add_argument("--n", type=int, help="sequence length (default 8192 for attention, 2048 for the scan)")
    parser.add_argument("--repeat", type=int, default=7, help="interleaved pairs (default 7)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    run = attention if args.suite == "attention" else scan
    Console(width=120).print(run(args.n, args.threads, args.repeat))


def attention(n: int | None, threads: int, repeat: int) -> Table:
    n = n or 8192
    table = _table(f"attention, (1, 8, {n}, 64) float32 tensors, {threads} threads, {repeat} pairs")
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 8, n, 64) for _ in range(3))
    with torch.no_grad():
        for peer in PEERS:

            def ours(method: str = peer.method, causal: bool = peer.causal, options: dict = peer.options) -> object:
                return subquad.attention(q, k, v, method, causal=causal, **options)

            _add(table, peer.name, ours, peer.theirs(q, k, v), repeat)
    return table


def scan(n: int | None, threads: int, repeat: int) -> Table:
    n = n or 2048
    table = _table(
        f"selective scan, batch 1, n = {n}, d = 1536, d_state = 16, float32, {threads} threads, {repeat} pairs"
    )
    problem = Problem.draw(1, n, 1536, 16)
    for peer in SCAN_PEERS:
        ours, theirs = peer.ours(problem, peer.gradient), peer.theirs(problem, peer.gradient)
        _agree(ours(), theirs())
        _add(table, peer.name, ours, theirs, repeat)
    return table


def _agree(ours: object, theirs: object) -> None:
    """Both compute the same thing, or the ratio means nothing; peers may have time on the last axis."""
    pairs = zip(ours, theirs, strict=True) if isinstance(ours, tuple | list) else [(ours, theirs)]
    for mine, other in pairs:
        a, b = np.asarray(mine), np.asarray(other)
        b = b if a.shape == b.shape else np.swapaxes(b, -1, -2)
        assert np.abs(a - b).max() <= 1e-3 * np.abs(a).max()


def _table(title: str) -> Table:
    return Table("peer", "theirs / ms", "ours / ms", "ratio: median", "least", "most", title=title)


def _add(table: Table, name: str, ours: Callable[[], object], theirs: Callable[[], object], repeat: int) -> None:
    result = interleave(ours, theirs, repeat)
    times = (f"{1e3 * x.median:.1f}" for x in (result.theirs, result.ours))
    table.add_row(name, *times, *(f"{x:.2f}" for x in (result.ratio.median, result.ratio.least, result.ratio.most)))


if __name__ == "__main__":
    main()
