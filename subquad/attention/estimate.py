"""Estimates of a method's error on the user's own arrays: the method against exact attention at sampled rows."""

from __future__ import annotations

import functools
import math
import warnings
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from subquad.attention.call import enter
from subquad.attention.find import find_method
from subquad.attention.method import Method
from subquad.attention.restrictions import restrict
from subquad.attention.sampled_rows import Sample, sample
from subquad.backend import Array
from subquad.core.beside import namespace_of, place_of
from subquad.core.binomial import upper_bounds
from subquad.core.checks import check_count, check_positive, check_seed
from subquad.core.dtypes import cast
from subquad.core.gather import gather
from subquad.core.host import to_host
from subquad.core.loading import backend_of
from subquad.kernels.sampled_errors import sampled_errors

MOST_TABLED = 1024  # rows up to which the bounds of all shares are computed once
SHOWN = 16  # heads that a table lists; of more, the first half and the last half
WARNED: set[type] = set()  # methods of which a warning was issued


class PoorApproximation(UserWarning):
    """Issued where an estimate shows a method to be no better than the mean of the visible values.

    Such a method is no better than ignoring queries and keys on these arrays. The warning is issued once in a process
    for each class of methods. The filters of `warnings` apply to it: "ignore" switches it off, as in
    ``warnings.simplefilter("ignore", subquad.PoorApproximation)``, and "error" makes it an exception.
    """


class ErrorEstimate(NamedTuple):
    """What `estimate_error` found: arrays (..., heads), one number for each head; ``print`` shows a table.

    With o[i] the exact output of row i, ô[i] that of the method and the sums over the r sampled rows that see a key:

        error² = Σ ‖ô[i] − o[i]‖² / Σ ‖o[i]‖²

    Attributes
    ----------
    error : array, shape (..., heads)
        Relative error in the Frobenius norm. NaN if no sampled row sees a key.
    spread : array, shape (..., heads)
        Standard deviation of `error` by the delta method, with f[i] = ‖ô[i] − o[i]‖² − error² ‖o[i]‖² and r of n rows:
        √(1 − r/n) √(Σ f[i]² r/(r − 1)) / (2 error Σ ‖o[i]‖²). 0 if all rows were taken. Where a few rows carry the
        error it is too small: it is no guarantee, and `bound` is one.
    share_above : array, shape (..., heads)
        Share of the sampled rows whose relative error ‖ô[i] − o[i]‖ / ‖o[i]‖ is above the tolerance.
    bound : array, shape (..., heads)
        Upper bound of that share among all rows, with 95 % confidence, whatever the distribution (Clopper–Pearson). The
        share itself if all rows were taken.
    effective_keys : array, shape (..., heads)
        Mean of 1 / Σ_j p[i, j]², where p are the exact weights, over 32 of the rows or somewhat more.
    error_of_mean : array, shape (..., heads)
        The `error` of the mean of the values that a row sees.
    rows : array of int, shape (..., heads)
        The number r of sampled rows that see a key.
    norm : array, shape (..., heads)
        √(Σ ‖o[i]‖²), by which heads are pooled.
    tolerance : float
        The tolerance of the call.

    See Also
    --------
    subquad.estimate_error : The function that makes it.
    """

    error: Array
    spread: Array
    share_above: Array
    bound: Array
    effective_keys: Array
    error_of_mean: Array
    rows: Array
    norm: Array
    tolerance: Any

    @property
    def overall(self) -> ErrorEstimate:
        """The estimate for all heads together, of arrays of shape ().

        Errors are those of the joined outputs, shares and effective keys means over rows. `spread` is an upper bound,
        since errors of heads may go together, and `bound` the largest of the heads'.
        """
        xp = namespace_of(self.error)
        with backend_of(xp).computing(self.error):
            flat = [xp.reshape(x, (-1,)) for x in self[:-1]]
            if flat[0].shape[0] == 0:  # of no heads: a head without rows
                one = xp.ones((1,), dtype=self.error.dtype, device=place_of(self.error))
                flat = [one * x for x in (*[math.nan] * 3, 1.0, *[math.nan] * 2, 0.0, 0.0)]
                flat[6] = xp.astype(flat[6], xp.int32)
            error, spread, share, bound, effective, of_mean, rows, norm = flat
            largest, counted = xp.max(norm), rows > 0
            square = xp.where(
                counted, xp.where(largest == 0, 1.0, (norm / xp.where(largest == 0, 1.0, largest)) ** 2), 0.0
            )
            count = xp.astype(rows, norm.dtype)

            def pooled(x: Array, weight: Array) -> Array:
                total = xp.sum(weight)
                return xp.sum(xp.where(weight > 0, weight * x, 0.0)) / xp.where(total == 0, math.nan, total)

            joined = pooled(error**2, square) ** 0.5
            fields = [
                joined,
                pooled(error * spread, square) / xp.where(joined == 0, 1.0, joined),
                pooled(share, count),
                xp.where(xp.any(counted), xp.max(xp.where(counted, bound, 0.0)), 1.0),
                pooled(effective, count),
                pooled(of_mean**2, square) ** 0.5,
                xp.sum(rows, dtype=xp.int32),
                largest * xp.sum(xp.where(largest == 0, 0.0, square)) ** 0.5,
            ]
            return _made(xp, fields, self.tolerance)

    def __str__(self) -> str:
        if not backend_of(namespace_of(self.error)).is_concrete(*self[:-1]):
            return repr(self)
        return _table(self)


def estimate_error(
    method: str | Method,
    q: Array,
    k: Array,
    v: Array,
    /,
    *,
    causal: bool = False,
    key_mask: Array | None = None,
    segments: Array | tuple[Array, Array] | None = None,
    visible: Array | None = None,
    scale: float | None = None,
    rows: int = 128,
    seed: int = 0,
    tolerance: float = 0.05,
    **options: Any,
) -> ErrorEstimate:
    """Estimate the error of a method on these arrays, from exact attention at sampled rows.

        error² = Σ_i ‖ô[i] − o[i]‖² / Σ_i ‖o[i]‖²,    i over the sampled rows that see a key

    Parameters
    ----------
    method : str or method object
        As in `subquad.attention`.
    q : array, shape (..., n, d)
        Queries.
    k, v : array, shape (..., n_kv, d) and (..., n_kv, d_v)
        Keys and values.
    causal, key_mask, segments, visible, scale : optional
        As in `subquad.attention`: arguments of the method and of exact attention alike.
    rows : int, default 128
        How many rows to sample, one in each of as many equal parts of the sequence; if there are fewer, all are taken.
        Rows that see no key do not count, and in causal calls those before the first key are not sampled.
    seed : int, default 0
        Seed of the rows. They depend on it and on the number of rows alone, and are the same on every library.
    tolerance : float, default 0.05
        The relative error of a row above which it counts in `share_above`.
    **options
        Options of the method. Those that are called `rows`, `seed` or `tolerance` are set in a method object.

    Returns
    -------
    ErrorEstimate
        Arrays (..., heads) of the library of the inputs, in float32 or float64; ``print`` shows them as a table.

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        As `subquad.attention`, and for `rows`, `seed` and `tolerance` of a wrong type or below their least.

    Warns
    -----
    PoorApproximation
        Once for each class of methods, if the error over all heads is above the tolerance and not below that of the
        mean of the visible values. Not while a program is traced.

    See Also
    --------
    subquad.Auto : The method that chooses by such estimates.
    subquad.estimate_scan_error : The rounding error of a scan.

    Notes
    -----
    The method runs once, on the whole input. Exact attention at r rows costs r / n of exact attention, 3.1 % at r = 128
    and n = 4096, and the effective keys and the mean of the visible values at most a sixth of that. Memory does not
    grow with n · n_kv. bfloat16 and float16 are compared in float32, so that the rounding of the method's output is
    part of its error.

    References
    ----------
    .. [1] C. J. Clopper, E. S. Pearson, "The Use of Confidence or Fiducial Limits Illustrated in the Case of the
       Binomial", 1934.

    Examples
    --------
    >>> import numpy as np, subquad
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 2, 512, 16))
    >>> found = subquad.estimate_error("window", q, k, v, left=400, tolerance=0.5)
    >>> found.error.shape, bool(np.all(found.share_above <= found.bound))
    ((2,), True)
    """
    made = find_method(method, options)
    check_count("rows", rows)
    check_seed(seed)
    check_positive("tolerance", tolerance)
    arrays = {"q": q, "k": k, "v": v}
    call = enter(None, arrays, key_mask=key_mask, causal=causal, scale=scale, owner=estimate_error)
    if segments is not None or visible is not None:
        call = restrict(call, segments=segments, visible=visible)
    out = made(q, k, v, causal=causal, key_mask=key_mask, scale=scale, segments=segments, visible=visible)
    with call.computing():
        known = sample(call, rows, seed)
        found = errors_of(known, out, tolerance, known.numbers)
    warn_if_poor(made, found, stacklevel=3)
    return found


def errors_of(known: Sample, out: Array, tolerance: float, numbers: Array | None = None) -> ErrorEstimate:
    """The estimate of an output (..., heads, r, d_v) at the rows of a sample, or of all rows and their `numbers`."""
    exact = known.exact
    xp = namespace_of(exact)
    if out.dtype != exact.dtype:
        out = cast(xp, out if numbers is None else xp.take(out, numbers, axis=-2), exact.dtype)
        numbers = None
    error, spread, of_mean, norm, share, effective, rows, above = sampled_errors(
        exact, known.mean, out, known.seeing, known.effective, numbers, tolerance=float(tolerance), out_of=known.out_of
    )
    bound = _bound(xp, above, rows, share, known)
    return _made(xp, [error, spread, share, bound, effective, of_mean, rows, norm], tolerance)


def _made(xp: ModuleType, fields: list[Array], tolerance: Any) -> ErrorEstimate:
    # The estimate with these fields: sums of NumPy's over all axes are scalars, and become arrays of shape ()
    return ErrorEstimate._make([*(xp.asarray(x) if isinstance(x, np.generic) else x for x in fields), tolerance])


def warn_if_poor(method: Method, found: ErrorEstimate, *, stacklevel: int) -> None:
    """Issue `PoorApproximation` if the estimate says so, unless the class was warned of or the values are traced."""
    backend = backend_of(namespace_of(found.error))
    if type(method) in WARNED or 0 in found.error.shape or not backend.is_concrete(*found[:-1]):
        return
    overall = found.overall
    error, of_mean = float(overall.error), float(overall.error_of_mean)
    if math.isnan(of_mean) or error <= found.tolerance or error < of_mean:
        return
    WARNED.add(type(method))
    msg = (
        f"{type(method).__name__} has a relative error of {error:.2g} on these arrays, no less than the mean of the "
        f"visible values, {of_mean:.2g}: look at other methods with subquad.estimate_error, or at 'auto' and 'exact'"
    )
    warnings.warn(msg, PoorApproximation, stacklevel=stacklevel)


def _bound(xp: ModuleType, above: Array, rows: Array, share: Array, known: Sample) -> Array:
    # The Clopper–Pearson bound of the share above / rows
    if known.numbers.shape[0] == known.out_of:
        return xp.where(rows == 0, 1.0, share)
    backend, where = backend_of(xp), place_of(share)
    r = known.exact.shape[-2]
    if backend.is_concrete(above, rows):
        number = to_host(above, int)
        tabled = known.all_see and r <= MOST_TABLED
        host = _bounds_of(r, True)[number] if tabled else upper_bounds(number, to_host(rows, int))
        return xp.asarray(host, dtype=share.dtype, device=where)
    index = above if known.all_see else above + rows * (r + 1)
    table = xp.asarray(backend.on_host(_bounds_of, r, known.all_see), dtype=share.dtype, device=where)
    return xp.reshape(gather(xp, table, xp.reshape(index, (-1,))), share.shape)


def _bounds_of(r: int, all_see: bool) -> Any:
    # The bounds of k of r for k = 0 … r, or of k of c for c = 0 … r one after the other. `torch.compile` calls
    # functions alone, not what `lru_cache` makes of them
    return _cached_bounds(r, all_see)


@functools.lru_cache(maxsize=16)
def _cached_bounds(r: int, all_see: bool) -> Any:
    k, c = np.arange(r + 1), np.arange(r + 1)[:, None]
    return upper_bounds(k, np.asarray(r)) if all_see else upper_bounds(np.minimum(k, c), c).reshape(-1)


def _table(found: ErrorEstimate) -> str:
    # The estimate as text: one line for each head, and one for all of them
    shape = tuple(found.error.shape)
    lines = list(np.ndindex(*shape)) if shape else []
    shown = lines if len(lines) <= SHOWN else lines[: SHOWN // 2] + lines[-SHOWN // 2 :]
    columns = [to_host(x, float) for x in found[:7]]
    head = ("head", "error", "± sd", f"above {found.tolerance:g}", "≤ (95 %)", "effective keys", "mean of v", "rows")
    text: list[tuple[str, ...]] = [head]
    for index in shown:
        text.append((",".join(map(str, index)), *_cells([x[index] for x in columns])))
        if len(lines) > SHOWN and len(text) == SHOWN // 2 + 1:
            text.append(("…", *[""] * 7))
    if len(lines) != 1:
        text.append(("all", *_cells([float(x) for x in (found.overall if shape else found)[:7]])))
    widths = [max(map(len, column)) for column in zip(*text, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(x.rjust(w) for x, w in zip(row[1:], widths[1:], strict=True))]).rstrip()
        for row in text
    )


def _cells(numbers: list[float]) -> list[str]:
    error, spread, share, bound, effective, of_mean, rows = numbers
    shares = [f"{100 * x:.1f} %" for x in (share, bound)]
    return [f"{error:.3g}", f"{spread:.1g}", *shares, f"{effective:.4g}", f"{of_mean:.3g}", f"{rows:.0f}"]
