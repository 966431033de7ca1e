"""Run the kernels of a library built with ASan and UBSan: ``python -m cuda_shim.sanitized LIBRARY``.

This runs in a separate process, because the runtime of the sanitizer must be loaded before Python.
"""

import sys
from pathlib import Path

from cuda_shim import Library, NumpyDevice
from cuda_shim.cases import SANITIZED, small_chunks, solve


def main(binary: Path) -> None:
    """Run forward and backward passes, in two orders of threads."""
    library = Library(binary)
    for case in SANITIZED:
        for seed in (0, 1):

            def run(kernel, blocks, arguments, seed=seed):
                library.run(kernel, blocks, arguments, seed=seed)

            with small_chunks(32 if case.n > 100 else 256):
                solve(case, NumpyDevice(run))
    sys.stdout.write(f"{len(SANITIZED)} cases clean\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
