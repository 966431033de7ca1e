"""The errors at sampled rows as one launch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from array_api_compat import array_namespace

from subquad.backend import Array
from subquad.kernels.sampled_errors import outputs
from subquad_numpy.runtime.launch import Launch, Run, threads_for
from subquad_numpy.sampled_errors.calls import NAMES, numbers_of, products_of


def launch(arrays: Sequence[Any], static: Mapping[str, Any], run: Run) -> tuple[Array, ...]:
    """The outputs of the kernel `sampled_errors`, by one launch."""
    from subquad_numpy.sampled_errors.kernel import ERRORS_RECORD, RESULTS, errors_kernel

    results = dict(zip(RESULTS, outputs(*arrays, **static), strict=True))
    dtype, batch, numbers = np.dtype(arrays[0].dtype), tuple(results["error"].shape), numbers_of(arrays, static)
    threads = threads_for(int(math.prod(batch) * products_of(numbers)))
    made = Launch(errors_kernel, (dtype,), ERRORS_RECORD, results, numbers, batch, threads=threads)
    tolerance = array_namespace(arrays[0]).asarray(np.array([static["tolerance"] ** 2], dtype))
    found = run(made, {"numbers": tolerance, **dict(zip(NAMES, arrays, strict=True))})
    return tuple(found[name] for name in RESULTS)
