"""How much faster than exact attention, and at which error? On activations of a trained model, in causal use.

    python -m asv_benchmarks.quality.activations DIR
    python -m asv_benchmarks.quality.clock DIR --layer 15 --n 8192,32768 --methods clustered,clustered:cluster_size=64

The texts of a layer are joined up to n tokens, each attended as if it were before the next. The calls, PyTorch's fused
causal attention among them, take turns in one process, and a method's time includes all that it prepares. The error of
a head is ‖out − exact‖ / ‖exact‖ over sampled rows, exact attention in float64.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

import numpy as np
import torch

import subquad
from asv_benchmarks import harness
from asv_benchmarks.quality import candidates, console
from subquad.cli.errors import CommandError

Array = np.ndarray
ROWS = 192
FEW = 8192  # tokens of exact attention's first call, which is not timed: at 131,072 tokens it would take minutes


def read(folder: Path, layer: int, n: int) -> tuple[Array, Array, Array]:
    """(q, k, v), (heads, n, d) of float32, of all texts of a layer, one behind the other."""
    files = sorted(folder.glob(f"smol_*_l{layer}.npz"), key=lambda path: ("report" not in path.name, path.name))
    parts = [np.load(path) for path in files]
    found = sum(part["q"].shape[1] for part in parts)
    if found < n:
        msg = f"{folder} has {found} tokens of layer {layer}, fewer than the {n} asked for; write more with activations"
        raise CommandError(msg)
    q, k, v = (np.concatenate([part[name] for part in parts], axis=1)[:, :n].astype(np.float32) for name in "qkv")
    return q, k, v


def exact_rows(q: Array, k: Array, v: Array, rows: Array) -> Array:
    """Exact causal attention (heads, rows, d_v) of some rows, in float64; query heads share key heads in order."""
    shared, out = len(q) // len(k), []
    for head, queries in enumerate(q.astype(np.float64)):
        keys, values = k[head // shared].astype(np.float64), v[head // shared].astype(np.float64)
        logits = queries[rows] @ keys.T * q.shape[-1] ** -0.5
        logits[np.arange(len(keys)) > rows[:, None]] = -np.inf
        weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
        out.append(weights @ values / weights.sum(axis=-1, keepdims=True))
    return np.stack(out)


def measure(q: Array, k: Array, v: Array, chosen: list[candidates.Candidate], repeat: int) -> list[list[str]]:
    """A row for exact attention and each method: name, median seconds, how much faster, errors of the heads."""
    n = q.shape[1]
    rows = np.sort(np.random.default_rng(0).choice(n, min(n, ROWS), replace=False))
    expected = exact_rows(q, k, v, rows)
    tensors = [torch.from_numpy(x)[None] for x in (q, k, v)]
    made: dict[str, torch.Tensor] = {}

    def exact(tokens: int = n) -> None:
        few = [x[..., :tokens, :] for x in tensors]
        torch.nn.functional.scaled_dot_product_attention(*few, is_causal=True, enable_gqa=True)

    def run(candidate: candidates.Candidate) -> None:
        made[candidate.label] = subquad.attention(*tensors, candidate.method(n), causal=True)[0]

    calls = {"exact": exact} | {x.label: lambda x=x: run(x) for x in chosen}  # type: ignore[misc]
    timed = harness.interleave(calls, repeat, first={"exact": lambda: exact(FEW)})
    times = {name: statistics.median(found) for name, found in timed.items()}
    found = [["exact", f"{times['exact']:.3f}", "1", "0"]]
    for name, out in made.items():
        shown = ", ".join(f"{x:.3f}" for x in harness.head_errors(out.numpy()[:, rows], expected))
        found.append([name, f"{times[name]:.3f}", f"{times['exact'] / times[name]:.2f}", shown])
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m asv_benchmarks.quality.clock", description=__doc__.partition("\n")[0]
    )
    add = parser.add_argument
    add("folder", type=Path, metavar="DIR", help="what `python -m asv_benchmarks.quality.activations DIR` has written")
    add("--layer", type=int, default=15, help="default: %(default)s")
    add("--n", metavar="LIST", default="8192", help="numbers of tokens, comma-separated (default: %(default)s)")
    add("--heads", type=int, default=3, help="query heads, of which three share a key head (default: %(default)s)")
    add("--methods", metavar="LIST", default="clustered", help="as in `subquad compare` (default: %(default)s)")
    add("--repeat", type=int, default=5, help="rounds (default: %(default)s)")
    add("--threads", type=int, help="of PyTorch and subquad (default: the cores of this process)")
    args = parser.parse_args()
    torch.set_num_threads(harness.use_threads(args.threads))
    try:
        chosen, _ = candidates.find(args.methods, causal=True)
        for n in map(int, args.n.split(",")):
            q, k, v = read(args.folder, args.layer, n)
            table = measure(q[: args.heads], k[: -(-args.heads // 3)], v[: -(-args.heads // 3)], chosen, args.repeat)
            header = ["method", "seconds", "times faster", "errors of heads"]
            console.show(f"layer {args.layer}, n = {n}, beside exact attention", header, table)
    except CommandError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
