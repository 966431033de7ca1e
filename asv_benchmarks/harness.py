"""Functions that all benchmarks share: operators and their inputs, libraries, threads, and the record of a run.

Benchmarks and `subquad compare` use one clock, `subquad.cli.clock`.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

import subquad
from subquad import registry
from subquad.cli.cases import Case, Problem, find_case, reason_against_causal
from subquad.cli.clock import interleave, seconds
from subquad.cli.errors import CommandError
from subquad.cli.libraries import Target, targets
from subquad.cli.measure import Prepared, settled
from subquad.core import loading

__all__ = ["Case", "Prepared", "Problem", "interleave", "seconds"]

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).with_name("results")
FORMAT = "subquad table 1"
Run = Callable[[], Any]


# Operators ------------------------------------------------------------------------------------------------------------


def operators() -> list[str]:
    """The names of all operators in the registry now: "exact", "exact causal", …, "selective_scan"."""
    found = []
    for name in registry.METHODS:
        causal = find_case(name, {}, causal=True)
        found += [name] if reason_against_causal(causal) else [name, f"{name} causal"]
    return [*found, *registry.SCANS]


def case(operator: str) -> Case:
    """The case of an operator with its default options."""
    name, _, causal = operator.partition(" ")
    return find_case(name, {}, causal=bool(causal))


def stepping() -> list[str]:
    """The names of the operators that take one token at a time: causal methods with a state, and scans with a step."""
    methods = [name for name, cls in registry.METHODS.items() if cls.state is not None and cls.causal is True]
    return [*methods, *(name for name, row in registry.SCANS.items() if row.step)]


def one_step(operator: str) -> Problem:
    """The problem of one step: one token after the state of earlier tokens."""
    if operator in registry.SCANS:
        return _scan_step(registry.SCANS[operator])
    method, arrays = registry.make_method(operator, {}), case(operator).random(1).arrays
    _, left = method.step(*arrays.values())

    def step(q: Any, k: Any, v: Any, /, **fields: Any) -> tuple[Any, ...]:
        out, state = method.step(q, k, v, dict(zip(left, fields.values(), strict=True)))
        return (out, *state.values())

    return Problem(step, {**arrays, **{f"state_{name}": x for name, x in left.items()}}, {})


def _scan_step(row: Any) -> Problem:
    """The problem of one step of a scan: its example arrays without their time axis.

    The time axis is the one whose length differs between inputs of one step and of two.
    """
    one, two = (find_case(row.name, {}).random(n) for n in (1, 2))
    arrays = {}
    for name, x in one.arrays.items():
        time = [axis for axis in range(x.ndim) if x.shape[axis] != two.arrays[name].shape[axis]]
        arrays[name] = np.squeeze(x, axis=tuple(time))
    _, state = Problem(row.function, one.arrays, {**one.options, "return_state": True}).bind()(*one.arrays.values())
    return Problem(row.step, {"state": state, **arrays}, one.options)


def mamba(xp: ModuleType, shape: tuple[int, int, int], d_state: int, dtype: Any = "float32") -> dict[str, Any]:
    """The arrays of a Mamba layer (batch, n, d) at initialisation, by NumPy or CuPy; softplus(bias) = 0.05."""
    rng, (batch, n, d) = xp.random.default_rng(0), shape
    wide = "float64" if dtype == "float64" else "float32"
    u, delta, z = (rng.standard_normal(shape, dtype="float32").astype(dtype) for _ in range(3))
    B, C = (rng.standard_normal((batch, n, d_state), dtype="float32").astype(dtype) for _ in range(2))
    A = -xp.tile(xp.arange(1, d_state + 1, dtype=wide), (d, 1))
    bias = xp.full(d, np.log(np.expm1(0.05)), dtype=wide)
    return {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": xp.ones(d, dtype=wide), "z": z, "delta_bias": bias}


# Libraries ------------------------------------------------------------------------------------------------------------


def backends() -> list[str]:
    """The libraries to measure, "library" or "library:device": SUBQUAD_BENCH_BACKENDS, or all that are found."""
    known = list(loading.names())
    found = os.environ.get("SUBQUAD_BENCH_BACKENDS", ",".join(known)).split(",")
    if unknown := [backend for backend in found if backend.partition(":")[0] not in known]:
        msg = f"SUBQUAD_BENCH_BACKENDS names {', '.join(unknown)}; there are {', '.join(known)}"
        raise ValueError(msg)
    return found


def package_of(backend: str) -> str:
    """The backend package of a library."""
    return loading.names()[backend.partition(":")[0]]


class PerOperator:
    """Base of asv benchmarks with the parameters library and operator, read when asv looks for benchmarks.

    A library that cannot be used on this machine gives n/a.
    """

    param_names: tuple[str, ...] = ("backend", "operator")

    @property
    def params(self) -> tuple[list[Any], ...]:
        """The values of each parameter, one list for each name in `param_names`."""
        return backends(), operators()


def target(backend: str) -> Target:
    """The target of a library; NotImplementedError, which asv shows as n/a, if the library cannot be used here."""
    try:
        (found,), _ = targets(backend)
    except CommandError as error:
        raise NotImplementedError(str(error)) from error
    return found


def prepare(backend: str, problem: Problem, *, gradient: bool = False, dtype: str | None = None) -> Prepared:
    """A call that has run once, so that compiling and filling caches is not measured; `dtype`: of the arrays."""
    problem, where = settled(target(backend), problem), target(backend)
    prepared = Prepared(where, problem.bind(), tuple(problem.arrays.values()), gradient=gradient)
    if dtype is not None:
        arrays = problem.arrays.values()
        prepared.args = tuple(prepared.bench.asarray(x, dtype=dtype, device=where.device) for x in arrays)
    prepared.run()
    return prepared


def use_threads(count: int | None) -> int:
    """Limit every library to `count` threads and return their number; call this before a library is imported.

    XLA and compiled kernels take as many threads as the process has cores, so the cores are what is limited.
    """
    if not hasattr(os, "sched_getaffinity"):  # not Linux: the libraries keep their defaults
        return count or os.cpu_count() or 1
    cores = sorted(os.sched_getaffinity(0))
    if count is not None and count < len(cores):
        os.sched_setaffinity(0, cores[:count])
    return min(count or len(cores), len(cores))


# Records --------------------------------------------------------------------------------------------------------------


def head_errors(out: Any, exact: Any) -> list[float]:
    """‖out − exact‖ / ‖exact‖ of each head, of arrays (heads, n, d_v) of NumPy."""
    wrong, size = (np.linalg.norm(x, axis=(-2, -1)) for x in (out - exact, exact))
    return (wrong / size).tolist()


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, minimum ("least") and maximum ("most") of the values."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def compare(name: str, ours: Run, theirs: Run, repeat: int) -> dict[str, Any]:
    """The row of a peer: times of two calls that take turns, and the ratio theirs / ours, pair by pair."""
    times = interleave({"ours": ours, "theirs": theirs}, repeat)
    medians = {f"{side}_ms": 1e3 * statistics.median(found) for side, found in times.items()}
    ratio = spread([b / a for a, b in zip(times["ours"], times["theirs"], strict=True)])
    return {"peer": name, "pairs": repeat, **medians, "ratio": ratio}


def git(*command: str) -> str:
    """The output of a git command in this repository; empty if the command fails."""
    done = subprocess.run(["git", "-C", str(ROOT), *command], check=False, capture_output=True, text=True)
    return done.stdout.strip()


def doubling(first: int, last: int) -> list[int]:
    """The lengths first, 2 first, 4 first … up to `last`."""
    return [n for n in (first << i for i in range(32)) if n <= last]


def machine() -> dict[str, Any]:
    """Processor, cores, memory and system, without a name that identifies the computer."""
    from asv.machine import Machine

    about = Machine.get_defaults()
    memory, system = round(int(about["ram"] or 0) / 2**30), f"{about['os']}, {about['arch']}"
    return {"processor": about["cpu"], "cores": int(about["num_cpu"]), "memory_gib": memory, "system": system}


def write(path: Path, command: str, *, title: str, packages: Iterable[str], threads: int, **content: Any) -> None:
    """Write measurements as JSON, with the command, the versions and the machine that produced them."""
    versions = {name: metadata.version(name) for name in packages}
    record = {
        "format": FORMAT,
        "command": f"python -m asv_benchmarks.{command}",
        "title": title,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": git("describe", "--always", "--dirty", "--exclude", "*"),
        "machine": machine(),
        "threads": threads,
        "versions": {"subquad": subquad.__version__, "python": platform.python_version(), **versions},
        **content,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    sys.stderr.write(f"wrote {path}\n")
