"""Run the kernels with one barrier left out: ``python -m cuda_shim.mutated LIBRARY EXPECTED LINE``.

This runs in a separate process, because threads that do not wait may write anywhere, and because a new process has fresh
shared memory. The exit code is 0 if every number is right in every order of threads. Line 0 leaves out no barrier.
"""

import functools
import sys
from pathlib import Path

import numpy as np
from rows.libraries import relative_error

from cuda_shim import Library, NumpyDevice
from cuda_shim.cases import CASES, SPLIT, small_chunks, solve

MUTATED = [CASES[0], *SPLIT[:2]]


def main(binary: Path, expected: Path, line: int, tolerance: float = 5e-7) -> int:
    """Run all cases; stop at the first wrong number, or if threads never meet at a barrier."""
    library = Library(binary)
    want = np.load(expected)
    for case in MUTATED:
        for seed in (1, 2, 3):
            device = NumpyDevice(functools.partial(library.run, seed=seed, skipped_line=line))
            with small_chunks(32):
                got = solve(case, device)
            if not all(relative_error(x, want[f"{case} {name}"]) <= tolerance for name, x in got.items()):
                sys.stdout.write(f"{case}, order {seed}: wrong\n")
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])))
