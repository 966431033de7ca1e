"""The rounding error of a selective scan, from some of its channels in float64."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from subquad.backend import Array
from subquad.core.beside import place_of
from subquad.core.checks import check_arrays, check_count, check_flag, check_seed
from subquad.core.dtypes import is_dtype, is_half
from subquad.core.host import to_host
from subquad.core.loading import backend_of
from subquad.random import draw_rows
from subquad.scans.call import Shapes, check_inputs
from subquad.scans.selective_scan import INPUTS, selective_scan

SHOWN = 16  # channels that a table lists


class ScanErrorEstimate(NamedTuple):
    """What `estimate_scan_error` found; ``print`` shows a table.

    Attributes
    ----------
    channels : array of int, shape (c,)
        Numbers of the sampled channels, ascending.
    error : array, shape (c,)
        For each of them ‖y − y₆₄‖ / ‖y₆₄‖ over the batch and time, where y₆₄ is computed in float64.
    largest : array, shape ()
        The largest of the errors.
    overall : array, shape ()
        The error of the sampled channels together.

    See Also
    --------
    subquad.estimate_scan_error : The function that makes it.
    """

    channels: Array
    error: Array
    largest: Array
    overall: Array

    def __str__(self) -> str:
        errors = [f"{float(x):.2g}" for x in self.error]
        names = [str(int(x)) for x in self.channels]
        lines = [("channel", "error"), *zip(names, errors, strict=True)][: SHOWN + 1]
        if len(errors) > SHOWN:
            lines.append(("…", ""))
        lines += [("largest", f"{float(self.largest):.2g}"), ("all", f"{float(self.overall):.2g}")]
        width = max(len(error) for _, error in lines)
        return "\n".join(f"{name:<7}  {error:>{width}}".rstrip() for name, error in lines)


def estimate_scan_error(
    u: Array,
    delta: Array,
    A: Array,
    B: Array,
    C: Array,
    D: Array | None = None,
    /,
    *,
    z: Array | None = None,
    delta_bias: Array | None = None,
    delta_softplus: bool = False,
    delta_limits: tuple[float, float] | None = None,
    initial_state: Array | None = None,
    reverse: bool = False,
    segments: Array | None = None,
    mask: Array | None = None,
    implementation: str = "auto",
    channels: int = 16,
    seed: int = 0,
) -> ScanErrorEstimate:
    """Estimate the rounding error of `selective_scan` on these arrays, from some channels in float64.

        error[c] = ‖y[…, c] − y₆₄[…, c]‖ / ‖y₆₄[…, c]‖

    Parameters
    ----------
    u, delta, A, B, C, D, z, delta_bias, delta_softplus, delta_limits, initial_state, reverse, implementation
        Arguments of `subquad.selective_scan`. Their values must be readable: not while a program is traced.
    segments, mask
        Arguments of `subquad.selective_scan` too; the outputs of padded steps are 0 and count as exact.
    channels : int, default 16
        How many of the d channels to sample, one in each of as many equal parts; if there are fewer, all are taken.
    seed : int, default 0
        Seed of the channels. They depend on it and on d alone, and are the same on every library.

    Returns
    -------
    ScanErrorEstimate
        Arrays of the library of the inputs; ``print`` shows them as a table.

    Raises
    ------
    TypeError, ValueError
        As `subquad.selective_scan`, for `channels` and `seed` of a wrong type or below their least, and for arrays of a
        program that is traced.

    See Also
    --------
    subquad.estimate_error : The error of a method of attention.

    Notes
    -----
    The scan runs once, on all channels, in the dtypes given. NumPy computes the sampled channels in float64, from the
    values that the inputs have after rounding to their dtypes. So float64 inputs show the difference between two
    implementations, and float16 and bfloat16 the rounding of the output too.

    Examples
    --------
    >>> import numpy as np, subquad
    >>> rng = np.random.default_rng(0)
    >>> u, delta = rng.random((2, 500, 32), dtype=np.float32)
    >>> B, C = rng.random((2, 500, 4), dtype=np.float32)
    >>> A = -np.arange(1, 129, dtype=np.float32).reshape(32, 4) / 64
    >>> found = subquad.estimate_scan_error(u, delta, A, B, C, channels=8)
    >>> found.error.shape, bool(found.largest < 1e-5)
    ((8,), True)
    """
    arrays = dict(zip(INPUTS, (u, delta, A, B, C, D, z, delta_bias, initial_state), strict=True))
    shapes = check_inputs(arrays, time=1)
    xp, d = shapes.xp, shapes.d
    count = min(check_count("channels", channels), d)
    seed = check_seed(seed)
    steps = {name: x for name, x in (("segments", segments), ("mask", mask)) if x is not None}
    check_arrays(u=u, **steps)
    if not backend_of(xp).is_concrete(*arrays.values(), *steps.values()):
        msg = "the arrays of a program that is traced have no values to compare: call estimate_scan_error outside of it"
        raise ValueError(msg)
    options: dict[str, Any] = {
        "delta_softplus": check_flag("delta_softplus", delta_softplus),
        "delta_limits": delta_limits,
        "reverse": check_flag("reverse", reverse),
    }
    y = selective_scan(
        u, delta, A, B, C, D, z=z, delta_bias=delta_bias, initial_state=initial_state, implementation=implementation,
        **steps, **options,
    )  # fmt: skip
    chosen = draw_rows(0, d, count, seed)
    index = xp.asarray(chosen, device=place_of(u))
    some = {name: _wide(xp, _of_channels(xp, name, x, index, shapes)) for name, x in arrays.items() if x is not None}
    by_position = [some.pop(name) for name in INPUTS[:6] if name in some]
    exact = selective_scan(
        *by_position,
        **some,
        **{name: to_host(x, bool if name == "mask" else np.int64) for name, x in steps.items()},
        **options,
    )
    found = _wide(xp, xp.take(y, index, axis=-1))
    off, size = (np.square(x).reshape(-1, count).sum(axis=0) for x in (found - exact, exact))
    kind = xp.float32 if is_half(xp, y.dtype) else y.dtype
    each, overall = (_relative(*pair) for pair in ((off, size), (off.sum(), size.sum())))
    made = (xp.asarray(x, dtype=kind, device=place_of(u)) for x in (each, each.max(initial=0.0), overall))
    return ScanErrorEstimate(index, *made)


def _of_channels(xp: Any, name: str, x: Array, index: Array, shapes: Shapes) -> Array:
    # An input of the scan for the channels `index` alone
    axis = {"A": 0, "D": 0, "delta_bias": 0, "initial_state": -2}.get(name, -1)
    rank = shapes.forms.get(name)
    if rank == 0:  # one map for each channel
        axis = 0
    elif rank == 2:  # one for each step: all channels share it
        return x
    elif rank == 3:  # one for each step and group: a group for each channel
        return xp.take(x, index // (shapes.d // x.shape[-2]), axis=-2)
    return xp.take(x, index, axis=axis)


def _wide(xp: Any, x: Array) -> Any:
    # The values of an array in NumPy, in double precision
    dtype = np.complex128 if is_dtype(xp, x.dtype, "complex floating") else np.float64
    return to_host(x, dtype).astype(dtype)


def _relative(off: Any, size: Any) -> Any:
    # The root of off / size; 0 / 0 is 0
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where((off == 0) & (size == 0), 0.0, np.sqrt(np.divide(off, size)))
