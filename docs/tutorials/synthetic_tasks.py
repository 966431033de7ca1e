"""Train four small models on two synthetic tasks, and ask them at lengths that they never saw.

    python docs/tutorials/synthetic_tasks.py

writes synthetic_tasks.json beside itself, from which the page and its pictures are made. The models differ in one
operator alone. Needs PyTorch; takes less than ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

import subquad
import subquad.tasks

WIDTH, STATES, HEADS, VOCABULARY = 64, 16, 4, 16
TRAINED = 64  # length in training
LENGTHS = (64, 128, 256, 512, 1024)
TOKENS = 8  # to copy
FILE = Path(__file__).with_suffix(".json")


def rates(d: int) -> nn.Parameter:
    """log of A = −1 … −16 for each channel: S4D's real initialisation."""
    return nn.Parameter(torch.log(torch.arange(1, STATES + 1.0)).repeat(d, 1))


def step_sizes(d: int) -> torch.Tensor:
    """Step sizes between 0.001 and 0.1, evenly in the logarithm."""
    return torch.exp(torch.empty(d).uniform_(math.log(0.001), math.log(0.1)))


class Selective(nn.Module):
    """A selective scan: step sizes and maps come from the token."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.A_log, self.D = rates(d), nn.Parameter(torch.ones(d))
        self.maps, self.step = nn.Linear(d, 2 * STATES, bias=False), nn.Sequential(nn.Linear(d, 4), nn.Linear(4, d))
        self.bias = nn.Parameter(torch.log(torch.expm1(step_sizes(d))))

    def forward(self, u: torch.Tensor) -> torch.Tensor:
        B, C = self.maps(u).split(STATES, -1)
        return subquad.selective_scan(
            u, self.step(u), -torch.exp(self.A_log), B, C, self.D, delta_bias=self.bias, delta_softplus=True
        )


class Fixed(nn.Module):
    """A fixed state-space model (S4D): one kernel for all tokens."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.A_log, self.D = rates(d), nn.Parameter(torch.ones(d))
        self.B, self.C = nn.Parameter(torch.ones(d, STATES)), nn.Parameter(torch.randn(d, STATES))
        self.step = nn.Parameter(torch.log(step_sizes(d)))

    def forward(self, u: torch.Tensor) -> torch.Tensor:
        return subquad.lti_scan(u, -torch.exp(self.A_log), self.B, self.C, self.D, delta=torch.exp(self.step))


class Heads(nn.Module):
    """Queries, keys and values of each head, from the token."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(d, 3 * d, bias=False)

    def forward(self, u: torch.Tensor) -> torch.Tensor:
        heads = self.qkv(u).unflatten(-1, (3, HEADS, -1)).movedim(-3, 0).transpose(-2, -3)
        return self.mix(u, *heads).transpose(-2, -3).flatten(-2)

    def mix(self, u: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


class Gated(Heads):
    """Gated linear attention: the decay of each channel comes from the token."""

    def __init__(self, d: int) -> None:
        super().__init__(d)
        self.gate = nn.Sequential(nn.Linear(d, 16, bias=False), nn.Linear(16, d))

    def mix(self, u: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        g = functional.logsigmoid(self.gate(u) + 4).unflatten(-1, (HEADS, -1)).transpose(-2, -3)
        return subquad.gated_linear_attention(q, k, v, g)


class Attention(Heads):
    """Exact attention, with rotary positions."""

    def mix(self, u: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return subquad.attention(rotated(q), rotated(k), v, "exact", causal=True)


def rotated(x: torch.Tensor) -> torch.Tensor:
    """Pairs of channels, turned by angles that grow with the position."""
    n, d = x.shape[-2:]
    angles = torch.arange(n)[:, None] * 10000 ** (-torch.arange(0, d, 2) / d)
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)


class Layer(nn.Module):
    """The block of Mamba without its gate: a projection, a short convolution, the operator, a projection."""

    def __init__(self, operator: type[nn.Module]) -> None:
        super().__init__()
        d = 2 * WIDTH
        self.norm, self.up, self.down = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, d), nn.Linear(d, WIDTH)
        self.taps, self.operator = nn.Parameter(torch.empty(d, 4).uniform_(-0.5, 0.5)), operator(d)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        u = subquad.causal_conv1d(self.up(self.norm(x)), self.taps, activation="silu")
        return x + self.down(functional.silu(self.operator(u)))


OPERATORS = {"selective scan": Selective, "fixed scan": Fixed, "gated linear attention": Gated, "exact": Attention}


def model(operator: str) -> nn.Module:
    """Two layers between an embedding and a prediction of the next token."""
    layers = [Layer(OPERATORS[operator]) for _ in range(2)]
    head = nn.Linear(WIDTH, VOCABULARY, bias=False)
    return nn.Sequential(nn.Embedding(VOCABULARY, WIDTH), *layers, nn.RMSNorm(WIDTH), head)


def batch_of(task: str, rng: np.random.Generator, size: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs (size, ·) and the tokens expected at the last places."""
    if task == "selective copying":
        inputs, targets = subquad.tasks.selective_copying(rng, batch=size, n=n, tokens=TOKENS, vocabulary=VOCABULARY)
    else:
        inputs, targets = subquad.tasks.induction_heads(rng, batch=size, n=n, vocabulary=VOCABULARY)
    return torch.from_numpy(inputs), torch.from_numpy(targets).reshape(size, -1)


def run(job: tuple[str, str, int]) -> dict[str, Any]:
    """Train one model on one task; its accuracy at every length."""
    task, operator, steps = job
    torch.manual_seed(0)
    torch.set_num_threads(1)
    rng, start = np.random.default_rng(0), time.perf_counter()
    net = model(operator)
    optimizer = torch.optim.AdamW(net.parameters(), 4e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        inputs, targets = batch_of(task, rng, 32, TRAINED)
        logits = net(inputs)[:, -targets.shape[1] :]
        loss = functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    accuracy = {}
    with torch.no_grad():
        for n in LENGTHS:
            right = []
            for _ in range(4):
                inputs, targets = batch_of(task, rng, 32, n)
                right.append((net(inputs)[:, -targets.shape[1] :].argmax(-1) == targets).float().mean().item())
            accuracy[n] = float(np.mean(right))
    return {"task": task, "operator": operator, "steps": steps, "accuracy": accuracy,
            "seconds": time.perf_counter() - start}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=None, help="training steps (default: 2000 and 1200)")
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each (default: 2)")
    parser.add_argument("--out", type=Path, default=FILE, help="where the JSON goes")
    options = parser.parse_args(argv)
    start = time.perf_counter()
    steps = {"selective copying": 2000, "induction heads": 1200}
    jobs = [(task, operator, options.steps or steps[task]) for task in steps for operator in OPERATORS]
    with ProcessPoolExecutor(options.jobs) as pool:
        results = []
        for result in pool.map(run, jobs):
            print(f"{result['task']:18} {result['operator']:23}",
                  "  ".join(f"{n}: {x:.2f}" for n, x in result["accuracy"].items()), flush=True)  # fmt: skip
            results.append(result)
    facts = {"trained": TRAINED, "results": results, "seconds": time.perf_counter() - start}
    options.out.write_text(json.dumps(facts, indent=1) + "\n")
    print(f"{facts['seconds']:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
