"""`python tests/mutation.py --count 300 --seed 0`: how many small changes of the code do the tests notice?

Cosmic Ray makes the mutants of the kernels, the methods, the scans and the call layers of the backends. A seeded sample,
spread over the packages in proportion to their mutants, is run against the tests that are nearest to each package, until
the first failure; `--count 0` runs all of them. A mutant that changes annotations or docstrings alone is no mutant.
The nearest tests run once with coverage first: a mutant inside of a function then meets those that reach its line, the
fastest of each test function before the others; one outside of functions meets all. The report gives the score of each
package with its 95 % interval (Wilson), and the survivors. Each job works in a copy of the tree. Needs
`pip install cosmic-ray pytest-cov`, beside the test environment. Coverage takes ten minutes, a mutant some seconds, or
minutes where no test notices it; SIGTERM ends a run early, with the score of what is done.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import itertools
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {  # package → (files, tests in the order in which they run)
    "subquad/kernels": (
        "subquad/kernels/*.py",
        (
            "test_signs_and_groups test_states test_causality test_masks test_scan test_linear_scan test_parity "
            "test_numba_gradients test_numbers test_refusals test_gradients test_block_attention test_kmeans"
        ),
    ),
    "subquad/attention": (
        "subquad/attention/*.py",
        (
            "test_signs_and_groups test_errors test_states test_shapes test_masks test_causality test_parity test_numbers "
            "test_refusals test_gradients test_restrictions test_window test_bigbird test_lsh test_linformer test_kmeans "
            "test_weights"
        ),
    ),
    "subquad/scans": ("subquad/scans/*.py", "test_every_scan test_scan test_linear_scan test_errors test_numbers"),
    "subquad_numpy": (
        (
            "backends/subquad_numpy/*/calls.py backends/subquad_numpy/features/gradients.py "
            "backends/subquad_numpy/plain/attention.py backends/subquad_numpy/block_attention/hashed.py"
        ),
        (
            "test_every_override test_numba_features test_numba_gradients test_numba_causal_gradients test_numba_scan "
            "test_masks test_parity test_numbers test_refusals"
        ),
    ),
    "subquad_torch": (
        "backends/subquad_torch/[!bc]*.py backends/subquad_torch/conditions.py",
        "test_every_override test_numba_gradients test_dispatch test_transforms test_programs test_reversible",
    ),
    "subquad_jax": (
        "backends/subquad_jax/[!b]*.py",
        "test_every_override test_transforms test_programs test_dispatch test_reversible_jax",
    ),
}
UNKNOWN = (4, 5)  # statuses of pytest: a test was not found, or none was
TIMEOUT = 1800  # seconds; a mutant that does not end counts as noticed, and is printed


class Mutant(NamedTuple):
    """One change of a file."""

    package: str
    path: Path  # from the root
    operator: str
    occurrence: int
    code: str

    def diff(self) -> str:
        """The changed lines."""
        lines = difflib.unified_diff(
            (ROOT / self.path).read_text().splitlines(), self.code.splitlines(), n=0, lineterm=""
        )
        return "\n".join(line for line in lines if not line.startswith(("---", "+++")))


def places(package: str) -> list[tuple[Path, str, int]]:
    """(file, operator, occurrence) of every mutation of a package, those of annotations among them."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.plugins import get_operator, operator_names

    found = []
    for path in sorted(path for pattern in PACKAGES[package][0].split() for path in ROOT.glob(pattern)):
        nodes = list(ast_nodes(get_ast(path.read_text())))
        for name in operator_names():
            cls = get_operator(name)
            if not cls.arguments() and not name.endswith(("NoOp", "RemoveDecorator")):
                count = sum(len(list(cls().mutation_positions(node))) for node in nodes)
                found += [(path, name, occurrence) for occurrence in range(count)]
    return found


def made(package: str, path: Path, operator: str, occurrence: int) -> Mutant | None:
    """The mutant of a place; None if the program means what it meant before, or is none."""
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    source = path.read_text()
    code = mutate_code(source, get_operator(operator)(), occurrence)
    if code is None or _meaning(code) in (_meaning(source), None):
        return None
    return Mutant(package, path.relative_to(ROOT), operator, occurrence, code)


def _meaning(source: str) -> str | None:
    """The program without docstrings and annotations; None if it is no program."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return None
    for node in ast.walk(tree):
        for field in ("annotation", "returns"):
            if hasattr(node, field):
                setattr(node, field, None)
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [x for x in body if not (isinstance(x, ast.Expr) and isinstance(x.value, ast.Constant))] or [
                ast.Pass()
            ]
    return ast.dump(tree)


class Reach:
    """Which of the nearest tests of a package reach a line, from one run with coverage in a copy of the tree."""

    def __init__(self, package: str, tree: Path) -> None:
        from coverage import CoverageData

        self.tests = [f"tests/{name}.py" for name in PACKAGES[package][1].split()]
        results, data = (tree / f"{package.replace('/', '_')}.{kind}" for kind in ("xml", "coverage"))
        folders = [f"--cov={folder}" for folder in ("subquad", "backends")]
        flags = [*folders, "--cov-context=test", "--cov-report=", f"--junitxml={results}"]
        _pytest(tree, [*flags, *self.tests], COVERAGE_FILE=str(data))
        self.seconds = {
            f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}": float(case.get("time", 0))
            for case in ElementTree.parse(results).iter("testcase")
        }
        self.data = CoverageData(str(data))
        self.data.read()
        self.root = tree

    def of(self, mutant: Mutant) -> list[str]:
        """The tests to run, in their order: one of each test function first, the fast ones first."""
        lines = {int(word.partition(",")[0]) for word in re.findall(r"^@@ -(\d+)", mutant.diff(), re.MULTILINE)}
        by_line = self.data.contexts_by_lineno(str(self.root / mutant.path))
        found = {context.partition("|")[0] for line in lines for context in by_line.get(line, ())}
        if not found or "" in found:
            return self.tests
        ordered = sorted(found, key=lambda test: self.seconds.get(test, 0))
        first = {test.partition("[")[0]: test for test in reversed(ordered)}
        leading = sorted(first.values(), key=ordered.index)
        return leading + [test for test in ordered if test not in set(leading)]


def _pytest(tree: Path, arguments: list[str], **environment: str) -> int:
    """The exit status of pytest in a copy of the tree; raises subprocess.TimeoutExpired."""
    paths = [str(tree), str(tree / "backends"), str(tree / "tests")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONDONTWRITEBYTECODE": "1"} | environment
    listed = tree / "arguments.txt"
    listed.write_text("\n".join(arguments))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"@{listed}"]
    return subprocess.run(command, cwd=tree, env=env, check=False, capture_output=True, timeout=TIMEOUT).returncode


def verdict(mutant: Mutant, tree: Path, reach: Reach) -> str:
    """What became of a mutant in a copy of the tree: "killed" by a test, "survived", or "timed out"."""
    target = tree / mutant.path
    original = target.read_text()
    try:
        target.write_text(mutant.code)
        status = _pytest(tree, ["-x", *reach.of(mutant)])
        if status in UNKNOWN:
            status = _pytest(tree, ["-x", *reach.tests])
    except subprocess.TimeoutExpired:
        return "timed out"
    else:
        return "killed" if status else "survived"
    finally:
        target.write_text(original)


def interval(killed: int, count: int) -> tuple[float, float]:
    """The 95 % interval of a proportion by Wilson's formula."""
    z = 1.96
    middle, n = (killed + z * z / 2) / (count + z * z), count + z * z
    half = z / n * math.sqrt(killed * (count - killed) / count + z * z / 4)
    return middle - half, middle + half


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=300, help="mutants in the sample (default 300), 0 for all")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sample (default 0)")
    parser.add_argument("--package", default="", help=f"only this package, of: {', '.join(PACKAGES)}")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="mutants at a time (default: cores)")
    args = parser.parse_args()
    every = {name: places(name) for name in PACKAGES if name.startswith(args.package)}
    total, rng = sum(map(len, every.values())), random.Random(args.seed)
    chosen: list[Mutant] = []
    for name, found in every.items():
        rng.shuffle(found)
        wanted = round(args.count * len(found) / total) if args.count else len(found)
        mutants = (mutant for place in found if (mutant := made(name, *place)) is not None)
        chosen += itertools.islice(mutants, wanted)
    rng.shuffle(chosen)  # a run that is interrupted is a sample too
    print(f"{len(chosen)} mutants of {total} places", flush=True)
    left: list[Mutant] = []
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="subquad-mutants-") as folder:
        trees: SimpleQueue[Path] = SimpleQueue()
        for job in range(args.jobs):
            shutil.copytree(ROOT, Path(folder, str(job)), ignore=shutil.ignore_patterns(".git"))
            trees.put(Path(folder, str(job)))
        reach: dict[str, Reach] = {}

        def look(package: str) -> None:
            tree = trees.get()
            reach[package] = Reach(package, tree)
            trees.put(tree)
            sys.stderr.write(f"\r{package}: {len(reach[package].seconds)} tests ")

        with ThreadPoolExecutor(args.jobs) as jobs:
            list(jobs.map(look, every))

        stop = threading.Event()
        signal.signal(signal.SIGTERM, lambda *_: stop.set())  # ends the run early, with the score of what is done

        def judge(mutant: Mutant) -> None:
            if stop.is_set():
                return
            tree = trees.get()
            seen = verdict(mutant, tree, reach[mutant.package])
            trees.put(tree)
            counts[mutant.package] += 1
            if seen == "survived":
                left.append(mutant)
            if seen != "killed":
                print(f"{seen}: {mutant.path} {mutant.operator}\n{mutant.diff()}", flush=True)
            sys.stderr.write(f"\r{sum(counts.values())} of {len(chosen)} done, {len(left)} survived ")

        with ThreadPoolExecutor(args.jobs) as jobs:
            list(jobs.map(judge, chosen))
    for name in (*every, "all"):
        count = sum(counts.values()) if name == "all" else counts[name]
        killed = count - sum(name in ("all", mutant.package) for mutant in left)
        if count:
            low, high = interval(killed, count)
            print(f"{name}: {killed} of {count} noticed, {killed / count:.1%} ({low:.1%} to {high:.1%})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
