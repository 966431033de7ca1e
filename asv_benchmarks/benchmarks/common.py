"""What all benchmarks share: the array libraries, and a call that is ready to be measured."""

import contextlib
import importlib
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np

from subquad import _backends

# "library" or "library:device"; by default every backend that can be found, on its default device
BACKENDS = os.environ.get("SUBQUAD_BENCH_BACKENDS", ",".join(_backends.names())).split(",")
HEADS, D, D_STATE = 4, 64, 16


class Prepared:
    """A function and its arguments on a backend: compiled and run once, none of which is measured."""

    def __init__(
        self, backend: str, function: Callable[..., Any], arrays: tuple[np.ndarray, ...], *, gradient: bool = False
    ) -> None:
        self.bench, device = find(backend)
        if gradient:
            if not hasattr(self.bench, "gradient"):
                msg = f"{backend} has no gradients"
                raise NotImplementedError(msg)
            function = self.bench.gradient(function)
        self.args = tuple(self.bench.asarray(x, device=device) for x in arrays)
        self.call = self.bench.compile(function)
        self.bench.synchronize(*self.args)
        self.run()

    def run(self) -> None:
        """From idle device to finished result."""
        out = self.call(*self.args)
        self.bench.synchronize(*(out if isinstance(out, tuple) else (out,)))

    def seconds(self) -> float:
        """Of one call."""
        start = time.perf_counter()
        self.run()
        return time.perf_counter() - start

    def extra_memory(self) -> float:
        """The most bytes that a call allocates at one moment, beyond its inputs and its output."""
        peak = self.bench.peak_extra_memory(self.call, *self.args)
        return float("nan") if peak is None else peak


class Operator(ABC):  # asv passes over abstract classes
    """Benchmarks of one operator. A subclass gives `function` and `arrays` for its parameters.

    The first parameter is the backend; one that cannot be used here gives n/a.
    """

    timeout = 120.0
    number = 1  # calls between two looks at the clock; they take milliseconds
    repeat = (3, 20, 2.0)  # at least, at most, seconds
    rounds = 1
    warmup_time = 0.1
    gradient = False

    @abstractmethod
    def function(self, *params: Any) -> Callable[..., Any]:
        """What is measured, a function of the arrays alone."""

    @abstractmethod
    def arrays(self, *params: Any) -> tuple[np.ndarray, ...]:
        """Its arguments, on the host."""

    def check(self, *params: Any) -> None:  # noqa: B027  most operators take every combination
        """Raise NotImplementedError for a combination that makes no sense, before a library is imported for it."""

    def setup(self, backend: str, *params: Any) -> None:
        """Make the arrays on their device, compile, and run once."""
        self.check(*params)
        self.prepared = Prepared(backend, self.function(*params), self.arrays(*params), gradient=self.gradient)


class Forward(Operator):
    """Time and extra memory of one call."""

    def time_forward(self, *_params: Any) -> None:
        """One call."""
        self.prepared.run()

    def track_extra_memory(self, *_params: Any) -> float:
        """Beyond inputs and output."""
        return self.prepared.extra_memory()

    track_extra_memory.unit = "bytes"  # type: ignore[attr-defined]


class Gradient(Operator):
    """Time and extra memory of one call together with the gradient of half its squared norm."""

    gradient = True

    def time_forward_backward(self, *_params: Any) -> None:
        """One call and its gradient with respect to every argument."""
        self.prepared.run()

    def track_extra_memory_backward(self, *_params: Any) -> float:
        """Beyond inputs and gradients."""
        return self.prepared.extra_memory()

    track_extra_memory_backward.unit = "bytes"  # type: ignore[attr-defined]


def find(backend: str) -> tuple[Any, str | None]:
    """The `bench` module of "library" or "library:device", and the device; asv shows n/a where it is absent."""
    library, _, device = backend.partition(":")
    package = _backends.names().get(library)
    if package is None:
        msg = f"SUBQUAD_BENCH_BACKENDS names {library!r}; there are {', '.join(_backends.names())}"
        raise ValueError(msg)
    try:
        bench = importlib.import_module(f"{package}.bench")
    except ImportError as error:
        msg = f"{library} cannot be imported: {error}"
        raise NotImplementedError(msg) from error
    about = bench.describe()
    if about["reason"] is not None:
        msg = f"{library} cannot be used: {about['reason']}"
        raise NotImplementedError(msg)
    if device and device not in about["devices"]:
        msg = f"{library} has no device {device!r}; it has {', '.join(about['devices'])}"
        raise NotImplementedError(msg)
    return bench, device or None


def draw_normal(*shapes: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    """Normal float32 arrays, always the same; none of the operators is faster or slower for other values."""
    rng = np.random.Generator(np.random.PCG64(0))
    return tuple(rng.standard_normal(shape, dtype=np.float32) for shape in shapes)


for _package in map(_backends.names().get, (_backend.partition(":")[0] for _backend in BACKENDS)):
    if _package is not None:  # asv forks a process for each measurement: they find the libraries imported
        with contextlib.suppress(ImportError):
            importlib.import_module(f"{_package}.bench")
