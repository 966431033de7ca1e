"""The CUDA source run on the CPU: compiled by g++ with `cuda_shim.h`, and launched by subquad's own code."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from interpreter import PATIENCE

from subquad_cupy import device
from subquad_cupy.compile import source

HERE = Path(__file__).parent
COMPILER = shutil.which("g++")
FAILURES = {1: "no such kernel", 2: "a shuffle without its whole warp", 3: "a thread left before a barrier"}


def build(kernels: Iterable[str], folder: Path, flags: Iterable[str] = ()) -> Path:
    """Compile the instantiations named in `kernels`."""
    assert COMPILER is not None
    header, binary = folder / "instantiations.h", folder / "shim.so"
    (folder / "joined.cu").write_text(source(), encoding="utf-8")
    header.write_text("".join(f"KERNEL({kernel})\n" for kernel in sorted(kernels)), encoding="utf-8")
    command = [COMPILER, "-std=c++17", "-O1", "-shared", "-fPIC", "-fno-strict-aliasing", *flags]
    command += ["-march=native", "-ffp-contract=fast"]  # fused multiply-add, as nvcc has it
    command += [f"-I{HERE}", f"-I{folder}", f'-DINSTANTIATIONS="{header}"']
    subprocess.run([*command, "-o", str(binary), str(HERE / "driver.cpp")], check=True, timeout=PATIENCE)
    return binary


class Library:
    """The kernels that `build` compiled; `seed` shuffles the order of threads, and 0 keeps it."""

    def __init__(self, binary: Path) -> None:
        library = ctypes.CDLL(str(binary))
        library.shim_argument_size.restype = ctypes.c_longlong
        assert library.shim_argument_size() == device.SCAN.itemsize, "struct Scan and SCAN differ"
        self._launch = library.shim_launch
        self._launch.argtypes = [
            ctypes.c_char_p,
            ctypes.c_longlong,
            ctypes.c_void_p,
            ctypes.c_uint,
            ctypes.c_int,
        ]

    def run(self, kernel: str, blocks: int, arguments: np.ndarray, *, seed: int = 0, skipped_line: int = 0) -> None:
        """Run one launch, without the barrier in line `skipped_line` of `source()`."""
        pointer = arguments.ctypes.data
        if result := self._launch(kernel.encode(), blocks, pointer, seed, skipped_line):
            msg = f"{kernel}: {FAILURES[result]}"
            raise RuntimeError(msg)


Run = Callable[[str, int, np.ndarray], None]


class NumpyDevice:
    """A device of NumPy arrays, whose fresh memory is NaN, so that a read before the first write shows."""

    def __init__(self, run: Run, multiprocessors: int = 132) -> None:
        self.launch, self.multiprocessors = run, multiprocessors

    def dtype(self, x: np.ndarray) -> str:
        return x.dtype.name

    def pointer(self, x: np.ndarray) -> int:
        return x.ctypes.data

    def strides(self, x: np.ndarray) -> tuple[int, ...]:
        return x.strides

    def contiguous(self, x: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(x)

    def empty(self, shape: tuple[int, ...], like: np.ndarray) -> np.ndarray:
        return np.full(shape, np.nan, dtype=like.dtype)

    def cast(self, x: np.ndarray, like: np.ndarray) -> np.ndarray:
        return x.astype(like.dtype, copy=False)


class TorchHost(device.TorchDevice):
    """A device of torch CPU tensors, through the adapter that launches on torch's CUDA tensors."""

    def __init__(self, run: Run, multiprocessors: int = 132) -> None:
        self._run, self.multiprocessors = run, multiprocessors

    def launch(self, kernel: str, blocks: int, arguments: np.ndarray) -> None:
        self._run(kernel, blocks, arguments)
