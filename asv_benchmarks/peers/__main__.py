"""`python -m asv_benchmarks.peers`: how many times faster than each peer, on this machine."""

from __future__ import annotations

import argparse

import torch
from rich.console import Console
from rich.table import Table

import subquad
from asv_benchmarks.peers import PEERS
from asv_benchmarks.peers.timing import interleave


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m asv_benchmarks.peers", description=__doc__)
    parser.add_argument("--n", type=int, default=8192, help="sequence length (default 8192)")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--repeat", type=int, default=7, help="interleaved pairs (default 7)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, args.heads, args.n, 64) for _ in range(3))
    title = f"(1, {args.heads}, {args.n}, 64) float32, {args.threads} threads, {args.repeat} interleaved pairs"
    table = Table("peer", "theirs / ms", "ours / ms", "ratio: median", "least", "most", title=title)
    with torch.no_grad():
        for peer in PEERS:
            theirs = peer.theirs(q, k, v)
            result = interleave(
                lambda p=peer: subquad.attention(q, k, v, p.method, causal=p.causal, **p.options), theirs, args.repeat
            )
            ratio = result.ratio
            row = [1e3 * result.theirs.median, 1e3 * result.ours.median, ratio.median, ratio.least, ratio.most]
            table.add_row(peer.name, *(f"{x:.1f}" for x in row[:2]), *(f"{x:.2f}" for x in row[2:]))
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
