"""`python -m asv_benchmarks.ceiling`: the compiled scan beside a scan in C++, interleaved in one process.

`g++` must be installed to build the C++ scan; nothing else in the repository depends on it.
"""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np

from asv_benchmarks import harness
from subquad_numpy.table import COMPILED

FLAGS = ("-O3", "-march=native", "-ffast-math", "-fopenmp", "-shared", "-fPIC")
SHAPES = ((1, 2048, 1536), (8, 2048, 64), (1, 2048, 64))  # batch, n, d
STATES = 16
BLOCKS = (32, 64, 128, 256, 512, 768)  # channels of one unit of work of the C++ scan; the fastest counts
ROUNDS = 15
NAMES = ("u", "delta", "A", "B", "C", "D", "z")


@functools.cache
def library() -> ctypes.CDLL:
    """Compile the C++ scan and return it as a loaded library."""
    target = Path(tempfile.mkdtemp(prefix="subquad-ceiling-")) / "selective_scan.so"
    # waiting threads of OpenMP would otherwise spin for milliseconds on the cores of whatever is timed next
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    source = Path(__file__).with_name("selective_scan.cpp")
    subprocess.run(["g++", *FLAGS, str(source), "-o", str(target)], check=True)
    return ctypes.CDLL(str(target))


def cpp_scan(layer: dict[str, np.ndarray], out: np.ndarray, *, threads: int, block: int) -> np.ndarray:
    """Compute a selective scan of float32 arrays with softplus, skip and gate in C++, into `out`, and return `out`."""
    sizes = map(ctypes.c_int64, (*out.shape, layer["A"].shape[1], block))
    pointers = (ctypes.c_void_p(x.ctypes.data) for x in (*(layer[name] for name in NAMES), out))
    library().selective_scan(*sizes, ctypes.c_int(threads), *pointers)
    return out


def compare(shape: tuple[int, int, int], threads: int, even: bool, rounds: int = ROUNDS) -> str:
    """A line with the median times, and the speed of ours divided by that of C++, in wall and in processor time.

    The rates of a channel are those of Mamba's initialisation, at equal distances, or differ from them by up to 10 %.
    """
    layer = harness.mamba(np, shape, STATES)
    if not even:
        noise = np.random.default_rng(1).random(layer["A"].shape, np.float32)
        layer["A"] = layer["A"] * (1 + np.float32(0.1) * noise)
    out = np.empty_like(layer["u"])
    u, delta, A, B, C, D, z = (layer[name] for name in NAMES)
    arrays = (u, delta, A, B[:, :, None], C[:, :, None], D, z, None, None, None)
    memory = {out.shape: out, (shape[0], *A.shape): np.empty((shape[0], *A.shape), np.float32)}
    options = {"new": lambda sizes, _: memory[tuple(sizes)], "threads": threads}
    scan, static = COMPILED["selective_scan"].forward, {"delta_softplus": True, "reverse": False}
    sides = {"ours": functools.partial(scan, arrays, static, **options)}
    sides |= {f"C++ {x}": functools.partial(cpp_scan, layer, out, threads=threads, block=x) for x in BLOCKS}
    work: dict[str, list[float]] = {name: [] for name in sides}

    def counted(name: str) -> None:
        start = time.process_time()
        sides[name]()
        work[name].append(time.process_time() - start)

    times = harness.interleave({name: functools.partial(counted, name) for name in sides}, rounds)
    clock = {name: median(found) for name, found in times.items()}
    processor = {name: median(found[1:]) for name, found in work.items()}  # the first call compiles
    ours, processor_ours = clock.pop("ours"), processor.pop("ours")
    best = min(clock, key=clock.__getitem__)
    return (
        f"batch, n, channels {shape}, state {STATES}, {'even' if even else 'other'} rates, threads {threads}: "
        f"ours {ours * 1e3:.1f} ms, "
        f"{best} {clock[best] * 1e3:.1f} ms, ratio {clock[best] / ours:.2f} wall, "
        f"{min(processor.values()) / processor_ours:.2f} processor; {out.size * STATES / ours / 1e9:.2f}e9 updates/s"
    )


if __name__ == "__main__":
    for shape in SHAPES:
        for even in (True, False):
            for threads in (1, 2):
                print(compare(shape, threads, even))
