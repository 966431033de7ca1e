"""`python -m asv_benchmarks.first_calls --base COMMIT`: first calls with nothing compiled, beside those of a commit.

A call is timed as a user waits for it: a whole process that imports NumPy and subquad and calls once, with an empty
folder of compiled code, and a second process that finds it filled. The trees take turns. A base that compiles by Numba
needs it installed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from asv_benchmarks import harness
from asv_benchmarks.tree import check_out

ATTENTION = "x = rng.standard_normal((3, 1, 8, 1024, 64), dtype=np.float32)\nsubquad.attention(*x, {!r}, causal={})\n"
SCAN = """u, delta, z = rng.standard_normal((3, 1, 512, 256), dtype=np.float32)
B, C = rng.standard_normal((2, 1, 512, 16), dtype=np.float32)
A = -np.tile(np.arange(1, 17, dtype=np.float32), (256, 1))
subquad.selective_scan(u, delta, A, B, C, np.ones(256, np.float32), z=z, delta_softplus=True)
"""
LINEAR = """a, b = rng.random((2, 1, 1024, 256), dtype=np.float32)
subquad.linear_scan(a, b)
"""
HEAD = "import numpy as np\nimport subquad\nrng = np.random.default_rng(0)\n"
CALLS = {
    "favor": ATTENTION.format("favor", False),
    "favor causal": ATTENTION.format("favor", True),
    "linear": ATTENTION.format("linear", False),
    "linear causal": ATTENTION.format("linear", True),
    "nystrom": ATTENTION.format("nystrom", False),
    "selective_scan": SCAN,
    "linear_scan": LINEAR,
}
COMMAND = "import sys\nfrom subquad.cli import main\nsys.exit(main())\n"
METHODS = "exact,favor,linear,nystrom,selective_scan"
COMPARE = ["-c", COMMAND, "compare", "--backends", "numpy", "--methods", METHODS, "--out", "."]


def first(tree: Path, command: list[str], folder: Path) -> float:
    """Seconds of one process of Python in which the tree's subquad is imported; `folder` keeps compiled code."""
    path = os.pathsep.join([str(tree), str(tree / "backends")])
    env = os.environ | {"PYTHONPATH": path, "NUMBA_CACHE_DIR": str(folder), "XDG_CACHE_HOME": str(folder)}
    full = [sys.executable, *command]
    with tempfile.TemporaryDirectory() as work:
        return harness.seconds(lambda: subprocess.run(full, check=True, env=env, cwd=work, capture_output=True))


def measure(trees: dict[str, Path], command: list[str], repeat: int) -> dict[str, tuple[float, float]]:
    """Median seconds of each tree, (cold, with compiled code on disk)."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in trees}
    for _ in range(repeat):
        for name, tree in trees.items():
            with tempfile.TemporaryDirectory() as folder:
                cold = first(tree, command, Path(folder))
                times[name].append((cold, first(tree, command, Path(folder))))
    return {name: (statistics.median(x), statistics.median(y)) for name, (x, y) in
            ((name, zip(*found, strict=True)) for name, found in times.items())}  # fmt: skip


def main() -> None:
    from rich.console import Console
    from rich.table import Table

    parser = argparse.ArgumentParser(
        prog="python -m asv_benchmarks.first_calls", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--base", default="HEAD", help="commit to compare the working tree with (default HEAD)")
    parser.add_argument("--only", default="", help="calls whose name has this text")
    parser.add_argument("--compare", action="store_true", help="`subquad compare` of five methods as well")
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    commands = {name: ["-c", HEAD + text] for name, text in CALLS.items() if args.only in name}
    if args.compare:
        commands["subquad compare"] = COMPARE
    table = Table("", "base / s", "tree / s", "ratio", "base, on disk / s", "tree, on disk / s", title="first calls")
    with tempfile.TemporaryDirectory(prefix="subquad-first-") as folder:
        trees = {"base": check_out(harness.ROOT, args.base, Path(folder)), "tree": harness.ROOT}
        for name, command in commands.items():
            found = measure(trees, command, 1 if name == "subquad compare" else args.repeat)
            (base, base_warm), (tree, tree_warm) = found["base"], found["tree"]
            table.add_row(name, *(f"{x:.2f}" for x in (base, tree, tree / base, base_warm, tree_warm)))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
