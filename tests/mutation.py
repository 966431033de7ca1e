"""`python tests/mutation.py --count 300 --seed 0`: how many small changes of the code do the tests notice?

Cosmic Ray makes the mutants of the kernels, the methods, the scans and the call layers of the backends. A seeded sample,
spread over the packages in proportion to their mutants, is run against the tests until the first failure; `--count 0`
runs all of them. The sample is stable: a change of the code replaces the mutants of what has changed. A mutant that
changes only what is no code at run time (annotations, docstrings, overloads) is none.

The tests, but for those of other parts, run once with coverage first: of each test function `--per-function` parametrisations,
and more until every value of a parameter has come. A few that fail without a mutant, as on a busy machine, are left out and
named, and `--coverage` keeps the run for the next time.

A mutant inside of a function then meets those that reach its statement, the fastest of each test function
first, and at last one test of each other function that reaches its file, since a function whose results are remembered is
reached by its first caller alone. One outside of functions meets all that reach its file. With `--every`, what
survives meets all parametrisations as well; without it, the score is a lower bound. The report gives the score of each
package with its 95 % interval (Wilson), and the survivors. Each job works in a copy of the tree. Needs
`pip install cosmic-ray pytest-cov pytest-xdist`, beside the test environment, and a Unix that can fork. Coverage takes
some ten minutes, a mutant some seconds, or minutes where no test notices it; SIGTERM ends a run early, with the score so
far.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import hashlib
import itertools
import json
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
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {  # package → its files
    "subquad/kernels": "subquad/kernels/*.py",
    "subquad/attention": "subquad/attention/*.py",
    "subquad/scans": "subquad/scans/*.py",
    "subquad/blocks": "subquad/blocks/*.py",
    "subquad_numpy": (
        "backends/subquad_numpy/*/calls.py backends/subquad_numpy/features/gradient*s.py "
        "backends/subquad_numpy/plain/attention.py backends/subquad_numpy/block_attention/hashed.py"
    ),
    "subquad_torch": "backends/subquad_torch/[!bc]*.py backends/subquad_torch/conditions.py",
    "subquad_jax": "backends/subquad_jax/[!b]*.py",
}
ELSEWHERE = (  # tests of other parts, of other libraries, and of processes of their own
    "accelerate accelerate_attention benchmark_pages cli cubed cuda_compile cuda_shim cupy_gpu dask gate gpu_report "
    "imports libraries_page loading mlx models ndonnx paddle page papers processors quality registry surroundings tasks "
    "tensorflow transformers_attention translation typeseg units xarray"
)
UNKNOWN = (4, 5)  # statuses of pytest: a test was not found, or none was
LATE = (-signal.SIGXCPU, -signal.SIGKILL, -signal.SIGALRM)  # counts as noticed, and is printed
MOST_BROKEN = 12  # tests that may fail without a mutant: they are left out
FIRST = 30  # tests that meet a mutant in a run of their own


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


def places(package: str, seed: int) -> list[tuple[Path, str, int]]:
    """(file, operator, occurrence) of every mutation of a package, those of annotations among them, in an order by chance.

    The order follows from the seed and the text of each place, so that a change of the code moves few others in it.
    """
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.plugins import get_operator, operator_names

    found: dict[str, tuple[Path, str, int]] = {}
    for path in sorted(path for pattern in PACKAGES[package].split() for path in ROOT.glob(pattern)):
        source = path.read_text()
        lines, nodes = source.splitlines(), list(ast_nodes(get_ast(source)))
        for name in operator_names():
            cls = get_operator(name)
            if cls.arguments() or name.endswith(("NoOp", "RemoveDecorator")):
                continue
            positions = [start for node in nodes for (start, _), _ in cls().mutation_positions(node)]
            seen: Counter[str] = Counter()
            for occurrence, row in enumerate(positions):
                words = f"{seed} {path.name} {name} {lines[row - 1].strip()}"
                seen[words] += 1
                key = hashlib.sha256(f"{words} {seen[words]} {path.relative_to(ROOT)}".encode()).hexdigest()
                found[key] = path, name, occurrence
    return [found[key] for key in sorted(found)]


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
    """The program without docstrings, annotations and overloads; None if it is no program.

    Nor does it count whether an argument goes by name alone, and whether `zip` checks lengths that are equal.
    """
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return None
    for node in ast.walk(tree):
        if isinstance(node, ast.arguments):
            node.args = node.posonlyargs + node.args + node.kwonlyargs
            node.defaults += [x for x in node.kw_defaults if x is not None]
            node.posonlyargs, node.kwonlyargs, node.kw_defaults = [], [], []
        if isinstance(node, ast.Call):
            node.keywords = [x for x in node.keywords if x.arg != "strict"]
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
    """Which tests reach a statement, from one run of some of each function with coverage, which is kept in a folder."""

    def __init__(self, folder: Path, jobs: int, limit: int) -> None:
        from coverage import CoverageData

        files = sorted(path for top in ("subquad", "backends", "tests") for path in (ROOT / top).rglob("*.py"))
        sources = b"".join(path.read_bytes() for path in files if path != Path(__file__).resolve())
        stem = folder / hashlib.sha256(f"{ROOT} {limit} {PACKAGES} {ELSEWHERE}".encode() + sources).hexdigest()[:16]
        names, results, data = (stem.with_suffix(f".{kind}") for kind in ("txt", "xml", "coverage"))
        if not (names.exists() and results.exists() and data.exists()):
            every = sorted(path.stem for path in (ROOT / "tests").glob("test_*.py"))
            nearest = [f"tests/{name}.py" for name in every if name.removeprefix("test_") not in ELSEWHERE.split()]
            pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
            with names.open("w") as out:
                subprocess.run(
                    [*pytest, "--collect-only", *nearest], cwd=ROOT, env=_paths(ROOT), check=True, stdout=out
                )
            listed = stem.with_suffix(".arguments")
            listed.write_text("\n".join(test for own in _functions(names).values() for test in _spread(own, limit)))
            flags = ["--cov=subquad", "--cov=backends", "--cov-context=test", "--cov-report=", f"--junitxml={results}"]
            own = {"COVERAGE_FILE": str(data), "SUBQUAD_TESTS": str(listed)}
            command = [*pytest, "-p", "listed_tests", "-n", str(jobs), *flags, *nearest]
            subprocess.run(command, cwd=ROOT, env=_paths(ROOT) | own, check=False)
        cases = list(ElementTree.parse(results).iter("testcase"))
        broken = {_name(case) for case in cases if case.find("failure") is not None or case.find("error") is not None}
        if not cases or len(broken) > MOST_BROKEN:
            results.unlink()
            msg = f"the tests must pass before a mutant is made; these do not: {sorted(broken)}"
            raise RuntimeError(msg)
        if broken:
            print("left out, since they fail without a mutant:", *sorted(broken), sep="\n    ", flush=True)
        self.functions = {
            function: [test for test in own if test not in broken] for function, own in _functions(names).items()
        }
        self.seconds = {_name(case): float(case.get("time", 0)) for case in cases if _name(case) not in broken}
        self.data = CoverageData(str(data))
        self.data.read()

    def of(self, mutant: Mutant) -> list[str]:
        """The tests to run, in their order: the fastest of each function that reaches the mutant before the others."""
        source = (ROOT / mutant.path).read_text()
        starts = {int(x) for x in re.findall(r"^@@ -(\d+)", mutant.diff(), re.MULTILINE)}
        spans = [statement(source, start) for start in starts]
        by_line = self.data.contexts_by_lineno(str(ROOT / mutant.path))

        def reaching(lines: Iterable[int]) -> list[str]:
            found = {x.partition("|")[0] for line in lines for x in by_line.get(line, ())}
            return [test for test in self.seconds if test in found]

        of_file = reaching(by_line)
        here = of_file if None in spans else reaching(line for span in spans for line in span or ())
        first, more = self._ordered(here)
        return list(dict.fromkeys([*first, *more, *self._ordered(of_file)[0]]))

    def others(self, tests: list[str]) -> list[str]:
        """The parametrisations of the same functions that these tests leave out."""
        functions = dict.fromkeys(test.partition("[")[0] for test in tests)
        return [test for function in functions for test in self.functions[function] if test not in self.seconds]

    def _ordered(self, tests: Iterable[str]) -> tuple[list[str], list[str]]:
        """The fastest test of each function, and the others, the fast ones first."""
        ordered = sorted(tests, key=lambda test: (self.seconds[test], test))
        first = {test.partition("[")[0]: test for test in reversed(ordered)}.values()
        return sorted(first, key=ordered.index), ordered


def _functions(names: Path) -> dict[str, list[str]]:
    """The parametrisations of each test function, from what pytest has listed."""
    found: dict[str, list[str]] = {}
    for test in names.read_text().splitlines():
        if test.startswith("tests/") and "::" in test:
            found.setdefault(test.partition("[")[0], []).append(test)
    return found


def _spread(tests: list[str], limit: int) -> list[str]:
    """`limit` parametrisations, those with most new values of parameters first, and more until every value has come."""
    left = {test: set(re.split(r"[\[\]-]", test)) for test in tests}
    seen, chosen = set[str](), list[str]()
    while left:
        best = max(left, key=lambda test: len(left[test] - seen))
        if len(chosen) >= limit and left[best] <= seen:
            break
        chosen.append(best)
        seen |= left.pop(best)
    return chosen


def _name(case: ElementTree.Element) -> str:
    """How pytest names a test of a report."""
    return f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}"


def _paths(tree: Path) -> dict[str, str]:
    """The environment of a process that imports the library from a tree."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(str(tree / part) for part in ("", "backends", "tests"))}


class Tree:
    """A copy of the tree, and a process that runs pytest there in forks of itself."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".git"))
        command = [sys.executable, "tests/fork_pytest.py"]
        pipe = subprocess.PIPE
        env = _paths(folder) | {"SUBQUAD_TESTS": str(folder.with_suffix(".tests"))}
        self.server = subprocess.Popen(command, cwd=folder, env=env, stdin=pipe, stdout=pipe, text=True)

    def pytest(self, tests: list[str], seconds: float) -> int:
        """The exit status of pytest -x, a negative signal if it took more than these seconds of the processor.

        The tests are names of tests, or files alone.
        """
        assert self.server.stdin
        assert self.server.stdout
        arguments = ["-x", *dict.fromkeys(test.partition("::")[0] for test in tests)]
        if "::" in tests[0]:
            self.folder.with_suffix(".tests").write_text("\n".join(tests))
            arguments += ["-p", "listed_tests"]
        print(json.dumps([str(self.folder), math.ceil(seconds), arguments]), file=self.server.stdin, flush=True)
        return int(self.server.stdout.readline())

    def verdict(self, mutant: Mutant, tests: list[str], seconds: float) -> str:
        """What became of a mutant: "killed" by a test, "survived", or "timed out"."""
        target = self.folder / mutant.path
        original = target.read_text()
        target.write_text(mutant.code)
        try:
            for part in (tests[:FIRST], tests[FIRST:]):  # few files to collect for what is noticed at once
                status = self.pytest(part, seconds) if part else 0
                if status in UNKNOWN:  # the mutant changed the names of tests
                    status = self.pytest([test.partition("::")[0] for test in part], seconds)
                if status:
                    return "timed out" if status in LATE else "killed"
        finally:
            target.write_text(original)
        return "survived"


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
    parser.add_argument("--per-function", type=int, default=6, help="parametrisations of a test, at least (default 6)")
    parser.add_argument("--every", action="store_true", help="what survives meets every parametrisation as well")
    args = parser.parse_args()
    every = {name: places(name, args.seed) for name in PACKAGES if name.startswith(args.package)}
    chosen = sample(every, args.count, args.seed)
    with tempfile.TemporaryDirectory(prefix="subquad-mutants-") as folder:
        kept = args.coverage or Path(folder)
        kept.mkdir(parents=True, exist_ok=True)
        reach = Reach(kept.resolve(), args.jobs, args.per_function)
        trees: SimpleQueue[Tree] = SimpleQueue()
        for job in range(args.jobs):
            trees.put(Tree(Path(folder, str(job)).resolve()))
        stop, score = threading.Event(), Score()
        signal.signal(signal.SIGTERM, lambda *_: stop.set())

        def run(
            mutants: list[Mutant], tests: Callable[[Mutant], list[str]], seen: Callable[[Mutant, str], None]
        ) -> None:
            def judge(mutant: Mutant) -> None:
                if not stop.is_set():
                    chosen = tests(mutant)
                    tree = trees.get()
                    seen(mutant, tree.verdict(mutant, chosen, 120 + 5 * sum(reach.seconds.get(x, 1) for x in chosen)))
                    trees.put(tree)

            with ThreadPoolExecutor(args.jobs) as jobs:
                list(jobs.map(judge, mutants))

        run(chosen, reach.of, score.add)
        score.report()
        if args.every:
            run(list(score.left), lambda mutant: reach.others(reach.of(mutant)), score.revoke)
            score.report()
    return 0


if __name__ == "__main__":
    sys.exit(main())
