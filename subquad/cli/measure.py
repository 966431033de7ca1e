"""Error, time and memory of one case on one library."""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

import subquad
from subquad.cli.cases import Attention, Case, label
from subquad.cli.definitions import relative_error
from subquad.cli.libraries import Target

ENOUGH_SECONDS = 0.5  # slow calls are repeated at least `LEAST` times, and no longer than this
PAUSE = 0.1  # seconds; threads that computed before spin on for some 50 ms, on cores that are to be measured
LEAST = 3
ROUNDING = 1e-4  # below it errors are rounding, which differs from library to library


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One row of `compare.json`; the units stand beside the rows there.

    Where the case failed, `failure` says how and the numbers are None. `extra_memory` is None as well where
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


def measure(
    case: Case, target: Target, n: int, arrays: tuple[np.ndarray, ...], reference: np.ndarray, repeat: int
) -> Measurement:
    """Run `case` on `target`; a case that raises becomes a row with its failure."""
    who = Measurement(
        case.task,
        case.method,
        dict(case.options),
        label(case),
        target.label,
        target.library,
        target.device,
        n,
    )
    bench = target.bench
    try:
        args = tuple(bench.asarray(x, device=target.device) for x in arrays)
        function = bench.compile(case.function)
        out = function(*args)  # compiles, loads kernels, fills caches: not what is timed
        error = relative_error(bench.to_numpy(out), reference)
        del out
        times = _times(function, args, bench.synchronize, repeat)
        return dataclasses.replace(
            who,
            implementation=_implementation(case, args),
            error=error if np.isfinite(error) else None,
            time=statistics.median(times),
            times=tuple(times),
            extra_memory=bench.peak_extra_memory(function, *args),
            failure=None if np.isfinite(error) else "the output holds NaN or inf",
        )
    except Exception as error:
        return dataclasses.replace(who, failure=f"{type(error).__name__}: {' '.join(str(error).split())}")


def _times(
    function: Callable[..., Any], args: tuple[Any, ...], synchronize: Callable[..., None], repeat: int
) -> list[float]:
    """Seconds of each call, from idle device to finished result."""
    synchronize(*args, function(*args))
    time.sleep(PAUSE)
    times: list[float] = []
    while len(times) < repeat and (len(times) < LEAST or sum(times) < ENOUGH_SECONDS):
        start = time.perf_counter()
        synchronize(function(*args))
        times.append(time.perf_counter() - start)
    return times


def _implementation(case: Case, args: tuple[Any, ...]) -> str:
    """Name of the implementation that the call uses."""
    if isinstance(case, Attention):
        return subquad.explain(subquad.attention, *args, case.operator, causal=case.causal).implementation
    *positional, last = args
    return subquad.explain(subquad.selective_scan, *positional, delta_bias=last, delta_softplus=True).implementation
