"""Parameters as arrays of a library: matrices in the dtype that is asked for or stored, all others in float32 at least.

The others (norms, biases, taps, A_log, D) are a hundredth of the numbers, and what is computed with them is float32.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np

from subquad.backend import Array
from subquad.core import loading
from subquad.core.beside import place_of
from subquad.core.checks import check_arrays
from subquad.models.parameters import is_matrix
from subquad.models.source import Host, needed

NAMES = ("float64", "float32", "float16", "bfloat16")


class Placing:
    """Where parameters go: the library and device of an array, and the dtype of matrices, None for that of the file."""

    def __init__(self, like: Array | None, dtype: Any) -> None:
        like = np.empty(0, np.float32) if like is None else like
        self.xp: ModuleType = check_arrays(like=like)
        self.device = place_of(like)
        self.dtype = None if dtype is None else name_of(dtype)
        if self.dtype is not None and self._converted(np.zeros(1, np.float32), self.dtype) is None:
            msg = f"dtype is {self.dtype}, which {self._library()} does not have here; expected one of {self._known()}"
            raise ValueError(msg)

    def place(self, name: str, x: Host) -> Array:
        """A parameter of this name as an array of the library."""
        stored = x.dtype.name
        if is_matrix(name):
            wanted = self.dtype or stored
        else:
            wanted = "float64" if self.dtype == "float64" or (self.dtype is None and stored == "float64") else "float32"
        placed = self._converted(x, wanted)
        if placed is None:  # what the file has and the library lacks
            placed = self._converted(x, "float32")
        assert placed is not None
        return placed

    def _converted(self, x: Host, dtype: str) -> Array | None:
        """An array of the library; None if it does not have the dtype."""
        own = getattr(self.xp, dtype, None)
        try:
            if dtype == "bfloat16" and own is None:
                needed("ml_dtypes", "bfloat16 in this array library")
                made = self.xp.asarray(x.astype(np.dtype("bfloat16")), device=self.device)
            elif "bfloat16" in (dtype, x.dtype.name):  # which libraries do not take from one another
                wide = x.astype(np.float32) if x.dtype.name == "bfloat16" else x
                made = self.xp.astype(self.xp.asarray(wide, device=self.device), own)
            else:
                made = self.xp.asarray(np.ascontiguousarray(x.astype(dtype, copy=False)), device=self.device)
        except (TypeError, ValueError):
            return None
        return made if str(made.dtype).rpartition(".")[2] == dtype else None

    def _known(self) -> str:
        return ", ".join(x for x in NAMES if self._converted(np.zeros(1, np.float32), x) is not None)

    def _library(self) -> str:
        return loading.library_of(self.xp)


def name_of(dtype: Any) -> str:
    """The name of a dtype, given as such or as a dtype of any library; ValueError unless it is real and floating."""
    if isinstance(dtype, str):
        name = dtype
    elif isinstance(dtype, type) and issubclass(dtype, np.generic):
        name = np.dtype(dtype).name
    elif isinstance(dtype, type):  # jax.numpy.bfloat16 is a class that has a dtype
        name = str(getattr(dtype, "dtype", dtype))
    else:
        name = getattr(dtype, "name", None) or str(dtype).rpartition(".")[2]
    if name not in NAMES:
        msg = f"dtype is {dtype!r}, expected one of {', '.join(NAMES)}, or a dtype of this name"
        raise ValueError(msg)
    return name
