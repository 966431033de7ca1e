"""`python tests/mutation.py --count 300 --seed 0`: how many small changes of the code do the tests notice?

Cosmic Ray makes the mutants of the kernels, the methods, the scans and the call layers of the backends. A seeded sample,
spread over the packages in proportion to their mutants, is run against the tests until the first failure; `--count 0`
runs all of them. A mutant that changes only what is no code at run time (annotations, docstrings, overloads) is none.
The tests nearest to the packages run once with coverage first, and have to pass. A mutant inside of a function then
meets the tests that reach its statement: the fastest of each test function, then up to `--per-function` parametrisations
of each, chosen so that every value of a parameter comes soon, then one test of each other function that is near to the
package, since a function whose results are remembered is reached by the first caller only. One outside of functions
meets the tests near to its package. What survives meets, after all mutants, every parametrisation as well. The report
gives the score of each package with its 95 % interval (Wilson), and the survivors. Each job works in a copy of the tree.
Needs `pip install cosmic-ray pytest-cov pytest-xdist`, beside the test environment. Coverage takes a quarter of an
hour, a mutant some seconds, or minutes where no test notices it; SIGTERM ends a run early, with the score so far.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import hashlib
import itertools
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable
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
    "subquad/scans": (
        "subquad/scans/*.py",
        "test_every_scan test_scan test_linear_scan test_oracle test_errors test_numbers test_cli",
    ),
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
    """The program without docstrings, annotations and overloads; None if it is no program."""
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
            node.body = [x for x in body if not _is_no_code(x)] or [ast.Pass()]
    return ast.dump(tree)


def _is_no_code(node: ast.stmt) -> bool:
    """Whether a statement is a docstring or an overload."""
    if isinstance(node, ast.FunctionDef):
        return any(ast.unparse(decorator) in ("overload", "typing.overload") for decorator in node.decorator_list)
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def statement(source: str, line: int) -> range | None:
    """The lines of the statement at a line, the body for the head of a function; None outside of functions."""
    holders, inside = [], False
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.stmt):
            function = isinstance(node, ast.FunctionDef)
            first = min((x.lineno for x in getattr(node, "decorator_list", ())), default=node.lineno)
            if first <= line <= (node.end_lineno or line):
                inside |= function
                body = getattr(node, "body", None)
                head = range(first, body[0].lineno if body else (node.end_lineno or line) + 1)
                if line in head or not body:
                    holders.append(range(body[0].lineno, node.end_lineno + 1) if function else head)
    return min(holders, key=len, default=range(line, line + 1)) if inside else None


class Reach:
    """Which tests reach a statement, from one run of all of them with coverage; the run is kept in a folder."""

    def __init__(self, folder: Path, jobs: int) -> None:
        from coverage import CoverageData

        files = sorted(path for top in ("subquad", "backends", "tests") for path in (ROOT / top).rglob("*.py"))
        sources = b"".join(path.read_bytes() for path in files if path != Path(__file__).resolve())
        stem = folder / hashlib.sha256(str(ROOT).encode() + sources).hexdigest()[:16]
        results, data = stem.with_suffix(".xml"), stem.with_suffix(".coverage")
        if not (results.exists() and data.exists()):
            names = dict.fromkeys(name for _, tests in PACKAGES.values() for name in tests.split())
            flags = ["--cov=subquad", "--cov=backends", "--cov-context=test", "--cov-report=", f"--junitxml={results}"]
            tests = [f"tests/{name}.py" for name in names]
            _pytest(ROOT, folder, ["-n", str(jobs), *flags, *tests], math.inf, COVERAGE_FILE=str(data))
        cases = list(ElementTree.parse(results).iter("testcase"))
        broken = [_name(case) for case in cases if case.find("failure") is not None or case.find("error") is not None]
        if broken or not cases:
            results.unlink()
            msg = f"the tests must pass before a mutant is made; these do not: {broken}"
            raise RuntimeError(msg)
        self.seconds = {_name(case): float(case.get("time", 0)) for case in cases}
        self.data = CoverageData(str(data))
        self.data.read()

    def of(self, mutant: Mutant, limit: int | None) -> list[str]:
        """The tests to run, in their order, at most `limit` parametrisations of a function."""
        near = tuple(f"tests/{name}.py" for name in PACKAGES[mutant.package][1].split())
        nearest = [test for test in self.seconds if test.startswith(near)]
        source = (ROOT / mutant.path).read_text()
        starts = {int(x) for x in re.findall(r"^@@ -(\d+)", mutant.diff(), re.MULTILINE)}
        spans = [statement(source, start) for start in starts]
        by_line = self.data.contexts_by_lineno(str(ROOT / mutant.path))
        reached = {x.partition("|")[0] for span in spans for line in span or () for x in by_line.get(line, ())}
        found = list(nearest if None in spans else reached & self.seconds.keys())
        first, more = self._ordered(found, limit)
        return list(dict.fromkeys([*first, *more, *self._ordered(nearest, 1)[0]]))

    def _ordered(self, tests: list[str], limit: int | None) -> tuple[list[str], list[str]]:
        """The fastest test of each function, and the others up to the limit, those with new parameters first."""
        functions: dict[str, list[str]] = {}
        for test in sorted(tests, key=self.seconds.__getitem__):
            functions.setdefault(test.partition("[")[0], []).append(test)
        more = [test for rest in functions.values() for test in _spread(rest, limit)[1:]]
        return [rest[0] for rest in functions.values()], sorted(more, key=self.seconds.__getitem__)


def _spread(tests: list[str], limit: int | None) -> list[str]:
    """At most `limit` parametrisations, the first and then always one with most values that have not come yet."""
    if limit is None or len(tests) <= limit:
        return tests
    chosen, left, seen = [], {test: set(re.split(r"[\[\]-]", test)) for test in tests}, set[str]()
    while len(chosen) < limit:
        chosen.append(max(left, key=lambda test: len(left[test] - seen)) if chosen else tests[0])
        seen |= left.pop(chosen[-1])
    return chosen


def _name(case: ElementTree.Element) -> str:
    """How pytest names a test of a report."""
    return f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}"


def _pytest(tree: Path, folder: Path, arguments: list[str], seconds: float, **environment: str) -> int:
    """The exit status of pytest in a tree, SIGXCPU's negative after these seconds of the processor."""
    paths = [str(tree), str(tree / "backends"), str(tree / "tests")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONDONTWRITEBYTECODE": "1"} | environment
    listed = folder / f"{tree.name}.arguments"
    listed.write_text("\n".join(arguments))

    def limited() -> None:  # not by the clock: a process may have to wait for others
        if seconds < math.inf:
            resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(seconds), math.ceil(seconds) + 5))

    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"@{listed}"]
    timeout = TIMEOUT if seconds < math.inf else None
    with (folder / f"{tree.name}.log").open("w") as log:
        return subprocess.run(
            command, cwd=tree, env=env, check=False, stdout=log, stderr=log, timeout=timeout, preexec_fn=limited
        ).returncode


def verdict(mutant: Mutant, tree: Path, reach: Reach, tests: list[str]) -> str:
    """What became of a mutant in a copy of the tree: "killed" by a test, "survived", or "timed out"."""
    target = tree / mutant.path
    original = target.read_text()
    allowed = 60 + 5 * sum(map(reach.seconds.__getitem__, tests))
    try:
        target.write_text(mutant.code)
        status = _pytest(tree, tree.parent, ["-x", *tests], allowed)
        if status in UNKNOWN:  # the mutant changed the names of tests
            files = list(dict.fromkeys(test.partition("::")[0] for test in tests))
            status = _pytest(tree, tree.parent, ["-x", *files], allowed)
    except subprocess.TimeoutExpired:
        return "timed out"
    else:
        return {0: "survived", -signal.SIGXCPU: "timed out", -signal.SIGKILL: "timed out"}.get(status, "killed")
    finally:
        target.write_text(original)


def interval(killed: int, count: int) -> tuple[float, float]:
    """The 95 % interval of a proportion by Wilson's formula."""
    z = 1.96
    middle, n = (killed + z * z / 2) / (count + z * z), count + z * z
    half = z / n * math.sqrt(killed * (count - killed) / count + z * z / 4)
    return middle - half, middle + half


def sample(every: dict[str, list[tuple[Path, str, int]]], count: int, seed: int) -> list[Mutant]:
    """Mutants of each package, in proportion to its places, in an order in which any first part is a sample too."""
    total, rng = sum(map(len, every.values())), random.Random(seed)
    chosen: list[Mutant] = []
    for name, found in every.items():
        rng.shuffle(found)
        mutants = (mutant for place in found if (mutant := made(name, *place)) is not None)
        chosen += itertools.islice(mutants, round(count * len(found) / total) if count else len(found))
    rng.shuffle(chosen)
    print(f"{len(chosen)} mutants of {total} places", flush=True)
    return chosen


class Score:
    """What became of the mutants, and which are left."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.left: list[Mutant] = []

    def add(self, mutant: Mutant, seen: str) -> None:
        """Count a mutant, and print it if no test noticed."""
        self.counts[mutant.package] += 1
        if seen == "survived":
            self.left.append(mutant)
        if seen != "killed":
            print(f"{seen}: {mutant.path} {mutant.operator}\n{mutant.diff()}", flush=True)
        sys.stderr.write(f"\r{self.counts.total()} done, {len(self.left)} survived ")

    def revoke(self, mutant: Mutant, seen: str) -> None:
        """Take a mutant from those that are left, if more tests have noticed it."""
        if seen != "survived":
            self.left.remove(mutant)
            print(f"{seen} by more tests: {mutant.path} {mutant.operator}\n{mutant.diff()}", flush=True)

    def report(self) -> None:
        """Print the score of each package and of all."""
        for name in (*PACKAGES, "all"):
            count = self.counts.total() if name == "all" else self.counts[name]
            killed = count - sum(name in ("all", mutant.package) for mutant in self.left)
            if count:
                low, high = interval(killed, count)
                print(
                    f"{name}: {killed} of {count} noticed, {killed / count:.1%} ({low:.1%} to {high:.1%})", flush=True
                )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=300, help="mutants in the sample (default 300), 0 for all")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sample (default 0)")
    parser.add_argument("--package", default="", help=f"only this package, of: {', '.join(PACKAGES)}")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="mutants at a time (default: cores)")
    parser.add_argument("--coverage", type=Path, help="folder that keeps the run with coverage for the next time")
    parser.add_argument(
        "--per-function", type=int, default=6, help="parametrisations that meet a mutant first (default 6)"
    )
    args = parser.parse_args()
    every = {name: places(name) for name in PACKAGES if name.startswith(args.package)}
    chosen = sample(every, args.count, args.seed)
    with tempfile.TemporaryDirectory(prefix="subquad-mutants-") as folder:
        kept = args.coverage or Path(folder)
        kept.mkdir(parents=True, exist_ok=True)
        reach = Reach(kept.resolve(), args.jobs)
        trees: SimpleQueue[Path] = SimpleQueue()
        for job in range(args.jobs):
            shutil.copytree(ROOT, Path(folder, str(job)), ignore=shutil.ignore_patterns(".git"))
            trees.put(Path(folder, str(job)))
        stop, score = threading.Event(), Score()
        signal.signal(signal.SIGTERM, lambda *_: stop.set())

        def run(mutants: list[Mutant], limit: int | None, seen: Callable[[Mutant, str], None]) -> None:
            def judge(mutant: Mutant) -> None:
                if not stop.is_set():
                    tree = trees.get()
                    seen(mutant, verdict(mutant, tree, reach, reach.of(mutant, limit)))
                    trees.put(tree)

            with ThreadPoolExecutor(args.jobs) as jobs:
                list(jobs.map(judge, mutants))

        run(chosen, args.per_function, score.add)
        score.report()
        run(list(score.left), None, score.revoke)
    score.report()
    return 0


if __name__ == "__main__":
    sys.exit(main())
