"""`python tests/goldens.py --base COMMIT`: compare the outputs and gradients of the working tree with those of a commit.

Every row of the tables of methods and scans is called on NumPy, PyTorch and JAX, in float64 and float32, with compiled kernels and
without, by a process that imports the tree's own `subquad`; streams and gradients too. The report counts the arrays
that agree bit for bit, and gives the largest difference of the rest, max|tree − base| / max|base|. The exit code is 1
if a difference exceeds 1e-12 in float64 or 2e-5 in float32, or if one tree alone fails. It takes about ten minutes.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
TOLERANCE = {"float64": 1e-12, "float32": 2e-5}
PARTS = [
    f"{library} {dtype}{numba}"
    for library in ("numpy", "torch", "jax")
    for dtype in TOLERANCE
    for numba in ("", " without LLVM")
]


# One tree -------------------------------------------------------------------------------------------------------------


def record(path: Path, part: str, only: str) -> None:
    """Write the arrays of a part, by name, into a file; what raises is written as its error."""
    library, dtype, *without = part.split(maxsplit=2)
    if without:
        sys.modules["llvmlite"] = None  # type: ignore[assignment]  an import of llvmlite raises ImportError from now on
    from rows.libraries import Jax, NumPy, Torch

    row = {"numpy": NumPy, "torch": Torch, "jax": Jax}[library]()
    found: dict[str, Any] = {}
    for name, function, trees in calls(library):
        if not re.search(only, name):
            continue
        try:
            out = row.call(differentiated(library, function), *trees, dtype=dtype)
        except Exception as error:
            out = {"error": np.asarray(f"{type(error).__name__}: {error}")}
            row_numpy = np.asarray
        else:
            row_numpy = row.host
        found |= {f"{name} {field}": row_numpy(x) for field, x in flat(out)}
    np.savez(path, **found)


def calls(library: str) -> Iterator[tuple[str, Any, Any]]:
    """Name, function and NumPy arguments of every call; JAX, which compiles each, takes some of the shapes only."""
    from rows.methods import CASES, MAIN, METHODS, Case, D
    from rows.scans import SCANS

    long = Case((2, 1, 1500, D), (2, 1, 1500, D), (2, 1, 1500, 20), mask="random")
    for row in METHODS:
        some = [] if library != "jax" else ["n<n_kv"] if row not in MAIN else ["n=63", "n<n_kv", "grouped"]
        for shape, case in {**CASES, "long": long}.items():
            if not row.fits(case) or (some and shape not in some):
                continue
            drawn, arrays = case.draw(), row.arrays(case)
            for causal in row.forms:
                yield f"{row} {shape}{' causal' * causal}", row.call(causal=causal), (*drawn.values(), arrays)
            if streams(row):
                yield f"{row} {shape} stream", stream(row), (*drawn.values(), arrays)
                if row.causal and case.q[-2] == case.k[-2] < 300:
                    yield f"{row} {shape} steps", steps(row), (*list(drawn.values())[:3], arrays)
    for scan in SCANS:
        for n in (1, 40) if library == "jax" else (0, 1, 2, 63, 257, 3000):
            yield f"selective_scan {scan.name} {n}", scan.call(), (scan.draw(n),)
    import subquad

    rng = np.random.default_rng(3)
    for n in (1, 40) if library == "jax" else (0, 1, 2, 63, 257, 3000):
        a, b = rng.uniform(-1, 1, (2, n, 5)), rng.standard_normal((2, n, 5))
        yield f"linear_scan {n}", subquad.linear_scan, (a, b)
        yield f"linear_scan complex {n}", subquad.linear_scan, (a * np.exp(1j * b), b + 0j)


def streams(row: Any) -> bool:
    """Whether a row of methods makes states: statistics of each call, or landmarks of all keys, cannot."""
    from rows.methods import FITTED

    return (row.method in ("favor", "linear") and row.name not in FITTED) or row.name == "nystrom-arrays"


def stream(row: Any) -> Any:
    def call(q: Any, k: Any, v: Any, key_mask: Any, arrays: dict[str, Any]) -> Any:
        method = row.object(**arrays)
        return method.attend(q, method.summarize(k, v, key_mask=key_mask))

    return call


def steps(row: Any) -> Any:
    def call(q: Any, k: Any, v: Any, arrays: dict[str, Any]) -> Any:
        method, state, found = row.object(**arrays), None, {}
        for i in range(min(q.shape[-2], 9)):
            found[str(i)], state = method.step(*(x[..., i : i + 1, :] for x in (q, k, v)), state)
        return found

    return call


def differentiated(library: str, function: Any) -> Any:
    """`function` with its gradients, {"plain", "out", "gradient"}, of the sum of outputs · weights.

    "plain" is the output where nothing is differentiated, which may be computed by other code.
    """
    if library == "numpy":
        return lambda *trees: {"out": function(*trees)}

    def loss(xp: Any, out: Any) -> Any:
        parts = [xp.reshape(x, (-1,)) for _, x in flat(out)]
        return sum((x * xp.cos(0.3 * xp.arange(x.shape[0]))).sum().real for x in parts)

    def by_torch(*trees: Any) -> Any:
        import torch

        inputs = {name: x.requires_grad_() for name, x in flat(trees) if x.is_floating_point() or x.is_complex()}
        out = function(*trees)
        found = torch.autograd.grad(loss(torch, out), list(inputs.values()), allow_unused=True)
        gradient = {name: x for name, x in zip(inputs, found, strict=True) if x is not None}
        with torch.no_grad():
            plain = function(*trees)
        return {"plain": plain, "out": {name: x.detach() for name, x in flat(out)}, "gradient": gradient}

    def by_jax(*trees: Any) -> Any:
        import jax
        import jax.numpy as jnp

        leaves, structure = jax.tree.flatten(trees)
        real = [i for i, x in enumerate(leaves) if jnp.issubdtype(x.dtype, jnp.inexact)]

        def of(inputs: list[Any]) -> Any:
            mine = list(leaves)
            for i, x in zip(real, inputs, strict=True):
                mine[i] = x
            out = function(*jax.tree.unflatten(structure, mine))
            return loss(jnp, out), out

        found, out = jax.grad(of, has_aux=True)([leaves[i] for i in real])
        return {
            "plain": function(*trees),
            "out": out,
            "gradient": {str(i): x for i, x in zip(real, found, strict=True)},
        }

    return by_torch if library == "torch" else by_jax


def flat(tree: Any, path: str = "") -> list[tuple[str, Any]]:
    """The arrays of nested dicts and sequences, each with its path; None is left out."""
    if isinstance(tree, dict | tuple | list):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return [found for key, x in items for found in flat(x, f"{path}.{key}".lstrip("."))]
    return [] if tree is None else [(path, tree)]


# Two trees ------------------------------------------------------------------------------------------------------------


def difference(base: Any, tree: Any, scale: float) -> float:
    """max|tree − base| / scale: 0 if equal bit for bit; infinite if a shape, a dtype or a number that is not finite is.

    `scale` is the largest number of the call, since gradients that cancel to 0 are rounding errors on either side.
    """
    if base.shape != tree.shape or base.dtype != tree.dtype:
        return float("inf")
    if np.array_equal(base, tree, equal_nan=base.dtype.kind != "U"):
        return 0.0
    finite = np.isfinite(base) if base.dtype.kind != "U" else False
    if not np.any(finite) or not np.array_equal(finite, np.isfinite(tree)):
        return float("inf")
    return float(np.max(np.abs(tree[finite] - base[finite])) / scale)


def largest(arrays: dict[str, Any]) -> dict[str, float]:
    """The largest finite |number| in the outputs, and in the gradients, of each call, by name and kind."""
    found: dict[str, float] = {}
    for name, x in arrays.items():
        finite = [] if x.dtype.kind == "U" else np.abs(x[np.isfinite(x)])
        key = name.partition(".")[0]
        found[key] = max(found.get(key, 1e-30), max(finite, default=0.0))
    return found


def start(tree: Path, path: Path, part: str, only: str) -> subprocess.Popen[bytes]:
    paths = [str(tree), str(tree / "backends"), str(ROOT / "tests")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    env["XLA_FLAGS"] = "--xla_backend_optimization_level=0"  # each program runs once: to compile it takes longer
    command = [sys.executable, __file__, "--record", str(path), "--part", part, "--only", only]
    return subprocess.Popen(command, env=env, cwd=tree)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--base", default="HEAD", help="commit to compare the working tree with (default HEAD)")
    parser.add_argument("--part", default="", metavar="REGEX", help=f"parts to compare, of: {', '.join(PARTS)}")
    parser.add_argument("--only", default="", metavar="REGEX", help="names of the calls to compare")
    parser.add_argument("--record", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.record:
        record(args.record, args.part, args.only)
        return 0
    wrong = 0
    with tempfile.TemporaryDirectory(prefix="subquad-goldens-") as folder:
        base = Path(folder, "base")
        base.mkdir()
        archive = subprocess.run(["git", "-C", ROOT, "archive", args.base], check=True, capture_output=True).stdout
        subprocess.run(["tar", "-x", "-C", base], input=archive, check=True)
        for part in [part for part in PARTS if re.search(f"^{args.part}", part)]:
            files = {name: Path(folder, f"{name}.npz") for name in ("base", "tree")}
            trees = {"base": base, "tree": ROOT}
            running = [start(trees[name], path, part, args.only) for name, path in files.items()]
            if any(process.wait() for process in running):
                print(f"{part}: a process failed")
                wrong += 1
                continue
            wrong += report(part, *(dict(np.load(path)) for path in files.values()))
    return int(wrong > 0)


def report(part: str, base: dict[str, Any], tree: dict[str, Any]) -> int:
    """Print the comparison of a part, and return how many arrays differ by too much."""
    scales, limit = largest(base), TOLERANCE[part.split()[1]]
    failed = {name.removesuffix(" error") for name in base if name.endswith(" error")}
    new = {name for name in tree if not name.endswith(" error") and name.rpartition(" ")[0] in failed}
    new |= {name for name in tree.keys() - base.keys() if tree[name].size == 0}  # an empty gradient in place of None
    names = {name for name in base.keys() | tree.keys() if name not in new}
    names -= {f"{name} error" for name in failed if f"{name} error" not in tree}
    found = {name: difference(base[name], tree[name], scales[name.partition(".")[0]])
             if name in base and name in tree else float("inf") for name in names}  # fmt: skip
    apart = {name: gap for name, gap in found.items() if gap}
    streamed = sum(" stream " in name or " steps " in name for name in apart)
    worst = max(apart, key=apart.__getitem__, default="")
    print(f"{part}: {len(found)} arrays, {len(found) - len(apart)} equal bit for bit, {len(apart)} differ"
          + (f" ({streamed} of streams and steps), at most by {apart[worst]:.1e} ({worst})" if apart else "")
          + (f"; {len(new)} of calls that the base refuses" if new else ""), flush=True)  # fmt: skip
    wrong = sorted((name for name in apart if apart[name] > limit), key=apart.__getitem__)
    for name in wrong:
        sides = [f"{side}: {x[name].item()}" for side, x in (("base", base), ("tree", tree))
                 if name in x and name.endswith(" error")]  # fmt: skip
        print(f"    {apart[name]:.1e}  {name}  {'; '.join(sides)}")
    return len(wrong)


if __name__ == "__main__":
    sys.exit(main())
