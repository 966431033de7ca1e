"""NumPy backend: arrays that are computed at once and may be filled in place; compiled kernels, attention in place."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any, ClassVar

import array_api_compat.numpy as xp
import numpy as np

from subquad.backend import Backend, Override
from subquad_numpy.compiled import COMPILED, as_override
from subquad_numpy.plain import attention

__all__ = ["BACKEND", "NumpyBackend"]


class NumpyBackend(Backend):
    """NumPy computes at once; what decides a call are classes, shapes and dtypes."""

    library: ClassVar[str] = "numpy"
    overrides: ClassVar[tuple[Override, ...]] = (*map(as_override, COMPILED.values()), *attention.OVERRIDES)
    fills_in_place: ClassVar[bool] = True

    def namespace(self, array: Any) -> ModuleType:
        return xp if isinstance(array, np.ndarray) else super().namespace(array)

    def is_concrete(self, *arrays: Any) -> bool:
        return True

    def device_of(self, array: Any) -> str:
        return "cpu"

    def computing(self, like: Any) -> AbstractContextManager[Any]:
        """A context without floating-point errors: weights of hidden or far keys underflow to 0 by intention."""
        return np.errstate(all="ignore")

    def signature(self, arrays: Sequence[Any]) -> Hashable | None:
        """The class, shape and dtype of each array; None if something is no array, which later checks will report."""
        try:
            return tuple([None if x is None else (x.__class__, x.shape, x.dtype) for x in arrays])
        except AttributeError:
            return None


BACKEND = NumpyBackend()
