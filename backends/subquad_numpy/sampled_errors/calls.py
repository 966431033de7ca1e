"""The errors at sampled rows on NumPy arrays, compiled: see `subquad_numpy.compiled.Compiled`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from subquad.kernels.sampled_errors import outputs
from subquad_numpy.runtime.arguments import (
    Constant,
    Fix,
    Forms,
    Run,
    fix_elements,
    fix_items,
    fix_rows,
    fixed,
    row_step,
    straight,
)

Array = np.ndarray[Any, Any]
NAMES = "exact", "mean", "out", "seeing", "effective", "picks"


def numbers_of(arrays: Sequence[Any], static: Mapping[str, Any]) -> dict[str, int]:
    """The numbers of the argument record, for contiguous arrays."""
    (r, d_v), looked = arrays[0].shape[-2:], arrays[4].shape[-1]
    return {"r": r, "d_v": d_v, "out_of": static["out_of"], "looked": looked, "out_row": d_v, "effective_step": 1}


def products_of(numbers: Mapping[str, int]) -> float:
    """The multiply-adds of an item."""
    return 3.0 * numbers["r"] * numbers["d_v"]


def _plan(arrays: Sequence[Any], static: Mapping[str, Any], save: bool) -> Callable[..., Any]:
    """The outputs of the kernel `sampled_errors`."""
    from subquad_numpy.sampled_errors.kernel import ERRORS_RECORD, RESULTS, errors_kernel

    kinds = [(like.shape, np.dtype(like.dtype)) for like in outputs(*arrays, **static)]
    fixes = [None if x is None else _fix_of(name, x) for name, x in zip(NAMES, arrays, strict=True)]
    must_fix = any(fix is not None for fix in fixes)
    given = {name: fixed(fix, x) for name, fix, x in zip(NAMES, fixes, arrays, strict=True) if x is not None}
    steps = {"out_row": row_step(given["out"]), "effective_step": given["effective"].strides[-1] // arrays[4].itemsize}
    numbers = numbers_of(arrays, static) | steps
    values: dict[str, Any] = {
        **numbers,
        "numbers": Constant(np.array([static["tolerance"] ** 2], arrays[0].dtype)),
        **given,
        **{name: np.empty(*kind) for name, kind in zip(RESULTS, kinds, strict=True)},
    }
    run = Run(errors_kernel(arrays[0].dtype), ERRORS_RECORD, kinds[0][0], 1, products_of(numbers), values)

    def sampled_errors(
        arrays: Sequence[Any], new: Callable[..., Array], threads: Any
    ) -> tuple[tuple[Array, ...], None]:
        outs = tuple(new(*kind) for kind in kinds)
        if must_fix:
            arrays = [x if x is None else fixed(fix, x) for fix, x in zip(fixes, arrays, strict=True)]
        run((None, *arrays, *outs), threads)
        return outs, None

    return sampled_errors if must_fix else straight(sampled_errors)


def _fix_of(name: str, x: Array) -> Fix:
    """The copy after which the kernel can read arrays like x; None if none is needed."""
    if name == "effective":
        return fix_elements(x)
    return fix_rows(x) if name == "out" else fix_items(x, 2 if name in ("exact", "mean") else 1)


sampled_errors = Forms(_plan)
