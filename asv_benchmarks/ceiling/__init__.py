"""What compiled C++ reaches on this machine: the figure that the Numba kernels are measured against.

Built on first use where `g++` is present; nothing of the package depends on it.
"""

import ctypes
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import numpy as np

FLAGS = ("-O3", "-march=native", "-ffast-math", "-fopenmp", "-shared", "-fPIC")


def is_available() -> bool:
    """Whether there is a compiler."""
    return shutil.which("g++") is not None


@cache
def _library() -> ctypes.CDLL:
    source = Path(__file__).with_name("selective_scan.cpp")
    target = Path(tempfile.mkdtemp(prefix="subquad-ceiling-")) / "selective_scan.so"
    # waiting threads of OpenMP would otherwise spin for milliseconds on the cores of whatever is timed next
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    subprocess.run(["g++", *FLAGS, str(source), "-o", str(target)], check=True)
    return ctypes.CDLL(str(target))


def selective_scan(
    u: np.ndarray,
    delta: np.ndarray,
    A: np.ndarray,
    B: np.ndarray,
    C: np.ndarray,
    D: np.ndarray,
    z: np.ndarray,
    *,
    threads: int = 1,
    block: int = 256,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Selective scan with softplus, skip and gate, in C++.

    Parameters
    ----------
    u, delta, z : array, shape (batch, n, d), float32
        Input, step sizes before softplus, gate.
    A : array, shape (d, d_state), float32
        Rates.
    B, C : array, shape (batch, n, d_state), float32
        Input and output maps.
    D : array, shape (d,), float32
        Skip connection.
    threads, block : int
        Number of threads; channels of one unit of work.
    out : array, shape (batch, n, d), float32, optional
        Where to write. Default: a new array.

    Returns
    -------
    array, shape (batch, n, d)
        y.
    """
    arrays = [np.ascontiguousarray(array, np.float32) for array in (u, delta, A, B, C, D, z)]
    y = np.empty_like(arrays[0]) if out is None else out
    sizes = (*arrays[0].shape, A.shape[1], block)
    _library().selective_scan(
        *map(ctypes.c_int64, sizes),
        ctypes.c_int(threads),
        *(ctypes.c_void_p(array.ctypes.data) for array in (*arrays, y)),
    )
    return y
