"""`python -m asv_benchmarks.ceiling`: the Numba scan beside C++, interleaved in one process."""

import time
from collections.abc import Callable
from statistics import median

import numpy as np

from asv_benchmarks import ceiling
from subquad_numpy.selective_scan.calls import scan_forward

SHAPES = ((1, 2048, 1536, 16), (8, 2048, 64, 16))
ROUNDS = 15


def compare(batch: int, n: int, d: int, d_state: int, threads: int) -> None:
    """Print median times, and the speed of Numba as a part of that of C++ by wall and by processor time."""
    rng = np.random.default_rng(0)
    u, delta, z, out = (rng.standard_normal((batch, n, d), np.float32) for _ in range(4))
    A = -np.exp(rng.standard_normal((d, d_state), np.float32))
    B, C = (rng.standard_normal((batch, n, d_state), np.float32) for _ in range(2))
    D = rng.standard_normal(d, np.float32)

    def numba() -> object:
        maps = B[:, :, None], C[:, :, None]
        return scan_forward(u, delta, A, *maps, D, z, delta_softplus=True, threads=threads, out=out)

    def in_blocks(block: int) -> Callable[[], object]:
        return lambda: ceiling.selective_scan(u, delta, A, B, C, D, z, threads=threads, block=block, out=out)

    sides = {"numba": numba, **{f"C++ {block}": in_blocks(block) for block in (32, 64, 128, 256, 512, 768)}}
    wall: dict[str, list[float]] = {name: [] for name in sides}
    work: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(ROUNDS + 1):
        for name, side in sides.items():
            start = time.perf_counter(), time.process_time()
            side()
            wall[name].append(time.perf_counter() - start[0])
            work[name].append(time.process_time() - start[1])
    clock = {name: median(times[1:]) for name, times in wall.items()}
    processor = {name: median(times[1:]) for name, times in work.items()}
    best = min((name for name in sides if name != "numba"), key=clock.__getitem__)
    lightest = min((name for name in sides if name != "numba"), key=processor.__getitem__)
    wall_ratio = clock[best] / clock["numba"]
    processor_ratio = processor[lightest] / processor["numba"]
    print(f"batch {batch}, n {n}, channels {d}, state {d_state}, threads {threads}: ", end="")
    print(f"numba {clock['numba'] * 1e3:.1f} ms, {best} {clock[best] * 1e3:.1f} ms, ", end="")
    print(f"ratio {wall_ratio:.2f} wall, {processor_ratio:.2f} processor; ", end="")
    print(f"{batch * n * d * d_state / clock['numba'] / 1e9:.2f}e9 updates/s")


if __name__ == "__main__":
    for shape in SHAPES:
        for threads in (1, 2):
            compare(*shape, threads)
