"""NumPy backend: arrays that are computed at once and may be filled in place; compiled kernels, attention in place."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any, ClassVar

import numpy as np

from subquad.backend import Backend, Override
from subquad.core.checks import WITH_UNITS
from subquad_numpy import array_api
from subquad_numpy.compiled import as_override
from subquad_numpy.half.calls import LEAST
from subquad_numpy.plain import attention
from subquad_numpy.segment_means.calls import means
from subquad_numpy.table import COMPILED

__all__ = ["BACKEND", "NumpyBackend"]


class NumpyBackend(Backend):
    """NumPy computes at once; what decides a call are classes, shapes and dtypes."""

    library: ClassVar[str] = "numpy"
    overrides: ClassVar[tuple[Override, ...]] = (*map(as_override, COMPILED.values()), *attention.OVERRIDES)
    fills_in_place: ClassVar[bool] = True

    def namespace(self, array: Any) -> ModuleType:
        return array_api if isinstance(array, np.ndarray) else super().namespace(array)

    def refuses(self, array: Any) -> str | None:
        """A subclass, whose units or labels a result would silently lack; not one of a file mapped into memory."""
        if array.__class__ in (np.ndarray, np.memmap):
            return None
        kind, package = type(array).__name__, type(array).__module__.partition(".")[0]
        advice = "pass numpy.asarray(x)"
        if hasattr(array, "unit") or hasattr(array, "units"):
            advice = f"{WITH_UNITS}, such as x.value"
        return f"a {kind} of {package}, a subclass of numpy.ndarray, and results would be bare arrays; {advice}"

    def is_concrete(self, *arrays: Any) -> bool:
        return True

    def device_of(self, array: Any) -> str:
        return "cpu"

    def computing(self, like: Any) -> AbstractContextManager[Any]:
        """A context without floating-point errors: weights of hidden or far keys underflow to 0 by intention."""
        return np.errstate(all="ignore")

    def mean_rows(self, xp: Any, x: Any) -> Any:
        """A product with a row of equal weights: `numpy.mean` of a few rows takes three times as long."""
        rows = x.shape[-2]
        return np.matmul(np.full((1, rows), 1 / max(rows, 1), x.dtype), x)[..., 0, :]

    def mean_stored_rows(self, xp: Any, x: Any) -> Any:
        """By a compiled kernel, of large arrays."""
        return means(x) if x.size >= LEAST else None

    def softmax(self, xp: Any, x: Any) -> Any:
        """As the base class, without a temporary."""
        np.subtract(x, np.maximum.reduce(x, axis=-1, keepdims=True), out=x)
        np.exp(x, out=x)
        return np.divide(x, np.add.reduce(x, axis=-1, keepdims=True), out=x)

    def same_numbers(self, x: Any, y: Any) -> bool:
        return bool((x == y).all())

    def signature(self, arrays: Sequence[Any]) -> Hashable | None:
        """The class, shape and dtype of each array; None if something is no array, which later checks will report."""
        try:
            return tuple([None if x is None else (x.__class__, x.shape, x.dtype) for x in arrays])
        except AttributeError:
            return None


BACKEND = NumpyBackend()
