"""The errors at sampled rows on NumPy arrays, compiled: see `subquad_numpy.compiled.Compiled`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from subquad.kernels.sampled_errors import outputs
from subquad_numpy.runtime.arguments import Constant, Forms, Run, fix_items, fixed, straight

Array = np.ndarray[Any, Any]
NAMES = "exact", "mean", "out", "seeing"


def numbers_of(arrays: Sequence[Any], static: Mapping[str, Any]) -> dict[str, int]:
    """The numbers of the argument record."""
    r, d_v = arrays[0].shape[-2:]
    return {"r": r, "d_v": d_v, "out_of": static["out_of"]}


def products_of(numbers: Mapping[str, int]) -> float:
    """The multiply-adds of an item."""
    return 3.0 * numbers["r"] * numbers["d_v"]


def _plan(arrays: Sequence[Any], static: Mapping[str, Any], save: bool) -> Callable[..., Any]:
    """The outputs of the kernel `sampled_errors`."""
    from subquad_numpy.sampled_errors.kernel import ERRORS_RECORD, RESULTS, errors_kernel

    kinds = [(like.shape, np.dtype(like.dtype)) for like in outputs(*arrays, **static)]
    fixes = [fix_items(x, 1 if name == "seeing" else 2) for name, x in zip(NAMES, arrays, strict=True)]
    must_fix = any(fix is not None for fix in fixes)
    numbers = numbers_of(arrays, static)
    values: dict[str, Any] = {
        **numbers,
        "numbers": Constant(np.array([static["tolerance"] ** 2], arrays[0].dtype)),
        **{name: fixed(fix, x) for name, fix, x in zip(NAMES, fixes, arrays, strict=True)},
        **{name: np.empty(*kind) for name, kind in zip(RESULTS, kinds, strict=True)},
    }
    run = Run(errors_kernel(arrays[0].dtype), ERRORS_RECORD, kinds[0][0], 1, products_of(numbers), values)

    def sampled_errors(
        arrays: Sequence[Any], new: Callable[..., Array], threads: Any
    ) -> tuple[tuple[Array, ...], None]:
        outs = tuple(new(*kind) for kind in kinds)
        if must_fix:
            arrays = [fixed(fix, x) for fix, x in zip(fixes, arrays, strict=True)]
        run((None, *arrays, *outs), threads)
        return outs, None

    return sampled_errors if must_fix else straight(sampled_errors)


sampled_errors = Forms(_plan)
