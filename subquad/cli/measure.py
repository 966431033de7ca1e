"""Measurement of one case on one library: error, time and memory."""

import dataclasses
import functools
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np

import subquad
from subquad.cli.cases import Case, Problem
from subquad.cli.clock import interleave
from subquad.cli.definitions import relative_error
from subquad.cli.libraries import Target
from subquad.registry import make_method, method_row

ENOUGH_SECONDS = 0.5  # repetitions of slow calls stop after this time
LEAST = 3  # but not before this number of repetitions
ROUNDING = 1e-4  # an error below this is rounding in float32, which differs between libraries


class Prepared:
    """A function and its arguments on a library's device, compiled where the library compiles.

    Floating arrays become ones of `dtype`, if it is given. With `gradient`, the gradients of half the squared norm of
    the output by all arguments are computed as well.
    """

    def __init__(
        self, target: Target, function: Callable[..., Any], arrays: tuple[np.ndarray, ...], *, gradient: bool = False,
        dtype: str | None = None,
    ) -> None:  # fmt: skip
        self.bench = target.bench
        if gradient and not hasattr(self.bench, "gradient"):
            msg = f"{target.label} has no gradients"
            raise NotImplementedError(msg)
        self.args = tuple(self.bench.asarray(x, _dtype_of(x, dtype), target.device) for x in arrays)
        self.call = self.bench.compile(self.bench.gradient(function) if gradient else function)
        self.bench.synchronize(*self.args)

    def run(self) -> Any:
        """Call the function and wait for its result. The first call compiles, loads kernels and fills caches."""
        out = self.call(*self.args)
        self.bench.synchronize(*(out if isinstance(out, tuple) else (out,)))
        return out

    def extra_memory(self) -> int | None:
        """Peak memory of a call beyond inputs and output, in bytes; None if the library cannot tell."""
        return self.bench.peak_extra_memory(self.call, *self.args)


def _dtype_of(x: np.ndarray, dtype: str | None) -> str | None:
    # the dtype to copy an array in; None keeps its own
    if dtype == "float64" and x.dtype.kind == "c":
        return "complex128"
    return dtype if x.dtype.kind == "f" else None


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One row of `compare.json`; `subquad.cli.report.UNITS` has the units.

    If the case failed, `failure` says how, and numbers that were not obtained are None. `extra_memory` is also None if
    the library cannot tell.
    """

    task: str
    method: str
    options: dict[str, Any]
    label: str
    backend: str
    library: str
    device: str
    n: int
    implementation: str | None = None
    error: float | None = None
    time: float | None = None
    times: tuple[float, ...] = ()
    extra_memory: int | None = None
    failure: str | None = None


def settled(target: Target, problem: Problem) -> Problem:
    """The problem with a choice made by its arrays, if its method makes one, so that what was chosen is measured.

    A compiled call has no values to choose by.
    """
    name = problem.options.get("method")
    if not isinstance(name, str) or not hasattr(method_row(name).cls, "with_choice"):
        return problem
    own = {key: x for key, x in problem.options.items() if key in method_row(name).options}
    rest = {key: x for key, x in problem.options.items() if key not in own}
    arrays = (target.bench.asarray(x, device=target.device) for x in problem.arrays.values())
    chosen = make_method(name, own).with_choice(*arrays, causal=rest["causal"])
    return dataclasses.replace(problem, options={**rest, "method": chosen})


def measure(case: Case, target: Target, n: int, problem: Problem, reference: np.ndarray, repeat: int) -> Measurement:
    """The row of `case` on `target`; an exception of the case becomes the `failure` of the row."""
    where = (target.label, target.library, target.device, n)
    who = Measurement(case.task, case.name, dict(case.options), case.label, *where)
    try:
        problem = settled(target, problem)
        prepared = Prepared(target, problem.bind(), tuple(problem.arrays.values()))
        error = relative_error(prepared.bench.to_numpy(prepared.run()), reference)
        (times,) = interleave({"": prepared.run}, repeat, enough=ENOUGH_SECONDS, least=LEAST).values()
        explained = problem.bind(functools.partial(subquad.explain, problem.function))(*prepared.args)
        return dataclasses.replace(
            who,
            implementation=" and ".join({choice.implementation: None for choice in explained.choices}) or "generic",
            error=error if np.isfinite(error) else None,
            time=statistics.median(times),
            times=tuple(times),
            extra_memory=prepared.extra_memory(),
            failure=None if np.isfinite(error) else "the output holds NaN or inf",
        )
    except Exception as error:
        return dataclasses.replace(who, failure=f"{type(error).__name__}: {' '.join(str(error).split())}")
