"""Time of Mamba's scan and of attention against length (Gu and Dao, 2023, figure 8)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

import subquad
from asv_benchmarks import harness
from asv_benchmarks.papers.paper import Paper, Row
from asv_benchmarks.peers import scans

WIDTH, STATES, D = 1536, 16, 64
SCAN, ATTENTION = "selective scan, subquad", "causal attention (torch SDPA)"


def scan(function: Callable[..., Any]) -> Callable[[int], harness.Run]:
    return lambda n: harness.Prepared(harness.target("torch"), function, scans.draw(1, n, WIDTH, STATES)).run


def attention(n: int) -> harness.Run:
    """A call of causal attention of n tokens, whose heads together have as many channels as the scan."""
    q, k, v = torch.randn((3, 1, WIDTH // D, n, D), generator=torch.Generator().manual_seed(0)).unbind()
    return lambda: scaled_dot_product_attention(q, k, v, is_causal=True)


def crossover(rows: Sequence[dict[str, Any]]) -> float | None:
    """The length from which on the scan is faster, interpolated in log n; None if there is no such length."""
    found = {name: {row["n"]: row["ms"]["median"] for row in rows if row["name"] == name} for name in (SCAN, ATTENTION)}
    lengths = sorted(found[SCAN].keys() & found[ATTENTION].keys())
    gains = [math.log(found[ATTENTION][n] / found[SCAN][n]) for n in lengths]
    for i in reversed(range(1, len(lengths))):
        if gains[i - 1] <= 0 < gains[i]:
            part = gains[i - 1] / (gains[i - 1] - gains[i])
            return lengths[i - 1] * (lengths[i] / lengths[i - 1]) ** part
    return None


PAPER = Paper(
    title=f"Mamba: selective scan of {WIDTH} channels and {STATES} states, attention of {WIDTH // D} heads of {D}, "
    "float32, forward",
    source='A. Gu, T. Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023, figure 8',
    rows=[
        Row(SCAN, scan(subquad.selective_scan), 65536),
        Row(ATTENTION, attention, 16384),
        Row("parallel scan (mambapy, torch)", scan(scans.mambapy), 4096),
    ],
    lengths=harness.doubling(64, 65536),
    quick=harness.doubling(64, 2048),
    packages=("torch", "llvmlite", "mambapy"),
    baselines=[ATTENTION],
)
