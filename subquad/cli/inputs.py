"""Queries, keys and values from an .npz file, checked when they are read."""

import dataclasses
import zipfile
import zlib
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from subquad.cli.errors import CommandError

NAMES = ("q", "k", "v")
FLOATS = ("float16", "float32", "float64")
SAVE = "numpy.savez(file, q=q, k=k, v=v)"


@dataclasses.dataclass(frozen=True)
class Inputs:
    """float32 arrays q (..., heads, n, d), k (..., key heads, n, d) and v (..., key heads, n, d_v)."""

    source: str
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray

    @property
    def n(self) -> int:
        """The number of tokens."""
        return self.q.shape[-2]

    def first(self, n: int) -> "Inputs":
        """The inputs cut to their first `n` tokens."""
        q, k, v = (np.ascontiguousarray(x[..., :n, :]) for x in (self.q, self.k, self.v))
        return Inputs(self.source, q, k, v)


def read_sample() -> Inputs:
    """The activations of a trained model that come with the package."""
    sample = resources.files("subquad") / "data" / "sample.npz"
    with resources.as_file(sample) as path:
        return dataclasses.replace(read_npz(path), source="sample.npz (comes with subquad)")


def read_npz(path: Path) -> Inputs:
    """The inputs in the file `path`, checked; every fault raises a `CommandError` that names the file."""
    if path.is_dir():
        msg = f"{path}: is a directory; expected an .npz file with arrays q, k and v"
        raise CommandError(msg)
    if not path.exists():
        msg = f"{path}: there is no such file; expected an .npz file with arrays q, k and v"
        raise CommandError(msg)
    arrays = _load(path)
    missing = [name for name in NAMES if name not in arrays]
    if missing:
        held = ", ".join(arrays) or "nothing"
        msg = f"{path}: has no {', '.join(missing)}; it holds {held}. Expected q, k and v: write {SAVE}"
        raise CommandError(msg)
    q, k, v = (_floats(path, name, arrays[name]) for name in NAMES)
    _check_shapes(path, q, k, v)
    return Inputs(str(path), q, k, v)


def _load(path: Path) -> dict[str, Callable[[], np.ndarray]]:
    """Array name → function that reads the array: arrays that are not used are not read."""
    try:
        if not zipfile.is_zipfile(path):
            with path.open("rb"):  # raises PermissionError for a file that may not be read, before the message below
                msg = f"{path}: is not an .npz file (a zip archive of arrays); write one with {SAVE}"
                raise CommandError(msg)
        with np.load(path, allow_pickle=False) as archive:
            held = list(archive.files)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        msg = f"{path}: cannot be read: {error}"
        raise CommandError(msg) from error

    def reader(name: str) -> Callable[[], np.ndarray]:
        def read() -> np.ndarray:
            with np.load(path, allow_pickle=False) as archive:
                return archive[name]

        return read

    return {name: reader(name) for name in held}


def _floats(path: Path, name: str, read: Callable[[], Any]) -> np.ndarray:
    try:
        x = read()
    except (OSError, ValueError, EOFError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
        msg = f"{path}: {name} cannot be read: {error}; write the file again with {SAVE}"
        raise CommandError(msg) from error
    if not isinstance(x, np.ndarray) or x.dtype.name not in FLOATS:
        came = getattr(x, "dtype", type(x).__name__)
        msg = f"{path}: {name} is {came}; expected {', '.join(FLOATS)}: convert with {name}.astype('float32')"
        raise CommandError(msg)
    with np.errstate(over="ignore"):  # infinities raise below
        x = x.astype(np.float32)
    wrong = int(np.count_nonzero(~np.isfinite(x)))
    if wrong:
        msg = f"{path}: {name} holds {wrong} values that are NaN or infinite in float32; expected finite ones"
        raise CommandError(msg)
    return x


def _check_shapes(path: Path, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> None:
    came = f"{path}: q is {q.shape}, k is {k.shape}, v is {v.shape}"
    expected = "q (..., heads, n, d), k (..., key heads, n, d), v (..., key heads, n, d_v)"
    fault = None
    if min(q.ndim, k.ndim, v.ndim) < 2 or not q.ndim == k.ndim == v.ndim:
        fault = "the arrays need the same number of axes, at least two"
    elif 0 in (*q.shape, *k.shape, *v.shape):
        fault = "no axis may be empty"
    elif q.shape[-1] != k.shape[-1]:
        fault = f"q and k differ in d, {q.shape[-1]} and {k.shape[-1]}"
    elif not q.shape[-2] == k.shape[-2] == v.shape[-2]:
        fault = "the numbers of tokens n differ"
    elif k.shape[:-2] != v.shape[:-2]:
        fault = "k and v differ in their heads"
    elif q.shape[:-3] != k.shape[:-3]:
        fault = "q and k differ in an axis before the heads"
    elif q.ndim > 2 and q.shape[-3] % k.shape[-3]:
        fault = f"{k.shape[-3]} key heads cannot be shared equally by {q.shape[-3]} heads"
    if fault:
        msg = f"{came}: {fault}. Expected {expected}"
        raise CommandError(msg)
