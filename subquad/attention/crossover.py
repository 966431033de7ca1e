"""How long exact attention and other methods take by the length of a sequence: a table, and its measurement."""

from __future__ import annotations

import math
import time
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from subquad.attention.exact import Exact
from subquad.attention.method import Method
from subquad.backend import Array
from subquad.core.beside import namespace_of, place_of
from subquad.core.checks import check_arrays, check_count, check_flag, check_floating
from subquad.core.host import to_host
from subquad.core.loading import backend_of
from subquad.random import generator

LENGTHS = (2048, 4096, 8192, 16384)
ENOUGH_SECONDS = 2.0  # longer sequences are left out once exact attention took that long
ROUNDS = 3


@dataclass(frozen=True)
class Crossover:
    """Times of exact attention and of methods, by the length of the sequence, as `measure_crossover` measures them.

    Attributes
    ----------
    causal : bool
        Whether the calls were causal.
    channels : int
        The number d = d_v of channels.
    lengths : tuple of int
        Lengths n = n_kv of the sequences, ascending.
    seconds : tuple of float
        Seconds that exact attention takes for one head of each length.
    methods : tuple of (str, tuple of float)
        ``repr`` of each method, and its time as a multiple of that of exact attention, for each length.

    See Also
    --------
    subquad.Auto : The method that chooses by it.

    Examples
    --------
    >>> import subquad
    >>> table = subquad.Crossover(True, 64, (1000, 2000), (0.01, 0.04), (("Window(left=9)", (1.5, 0.75)),))
    >>> round(table.exact_seconds(4000, 64, 64), 6), table.ratio("Window(left=9)", 2000)
    (0.16, 0.75)
    """

    causal: bool
    channels: int
    lengths: tuple[int, ...]
    seconds: tuple[float, ...]
    methods: tuple[tuple[str, tuple[float, ...]], ...] = ()

    def __post_init__(self) -> None:
        check_flag("causal", self.causal)
        rows = {"seconds": self.seconds, **dict(self.methods)}
        if not self.lengths or list(self.lengths) != sorted(set(self.lengths)) or self.lengths[0] < 1:
            msg = f"lengths is {self.lengths!r}, expected positive integers that increase"
            raise ValueError(msg)
        for name, row in rows.items():
            if len(row) != len(self.lengths) or not all(x > 0 for x in row):
                msg = f"{name} is {row!r}, expected {len(self.lengths)} positive numbers, one for each length"
                raise ValueError(msg)

    def ratio(self, method: Method | str, n: int) -> float:
        """Return the time of a method as a multiple of that of exact attention.

        Parameters
        ----------
        method : method object or str
            The method, or its ``repr``.
        n : int
            Length of the sequence.

        Returns
        -------
        float
            The multiple, interpolated between the lengths measured. Beyond the longest it stays as it is there; below
            the shortest it is infinite: nothing was measured.

        Raises
        ------
        ValueError
            If the method was not measured.
        """
        known = dict(self.methods)
        name = method if isinstance(method, str) else repr(method)
        if name not in known:
            msg = f"crossover has no times of {name}, but of {', '.join(known) or 'none'}; measure_crossover makes one"
            raise ValueError(msg)
        return math.inf if n < self.lengths[0] else self._between(known[name], min(n, self.lengths[-1]))

    def exact_seconds(self, n: int, d: int, d_v: int) -> float:
        """Return the time of exact attention for one head.

        Parameters
        ----------
        n : int
            Length of the sequence.
        d, d_v : int
            Channels of keys and of values.

        Returns
        -------
        float
            Seconds, proportional to d + d_v, and to n² beyond the lengths measured.
        """
        inside = min(max(n, self.lengths[0]), self.lengths[-1])
        return self._between(self.seconds, inside) * (n / inside) ** 2 * (d + d_v) / (2 * self.channels)

    def _between(self, row: Sequence[float], n: int) -> float:
        # Linear interpolation in the logarithms
        last = min(max(bisect_right(self.lengths, n), 1), len(row) - 1)
        if last == 0:
            return row[0]
        (n0, n1), (x0, x1) = self.lengths[last - 1 : last + 1], row[last - 1 : last + 1]
        return math.exp(math.log(x0) + math.log(x1 / x0) * math.log(n / n0) / math.log(n1 / n0))


def measure_crossover(
    like: Array,
    /,
    methods: Sequence[Method],
    *,
    causal: bool = False,
    lengths: Sequence[int] = LENGTHS,
    heads: int = 4,
) -> Crossover:
    """Measure how long exact attention and other methods take on this machine, for `subquad.Auto`.

    Parameters
    ----------
    like : array, shape (..., d)
        An array of the library, dtype and number of channels, and on the device, that count.
    methods : sequence of method objects
        The methods, such as ``subquad.Auto().rungs``; exact attention is measured anyway.
    causal : bool, default False
        Whether calls are causal.
    lengths : sequence of int, default (2048, 4096, 8192, 16384)
        Lengths of the sequences; those that follow one of which exact attention took two seconds are left out.
    heads : int, default 4
        Number of heads of a call. Times are divided by it.

    Returns
    -------
    Crossover
        The times, each the least of three calls, which are not compiled as a whole by a tracer.

    Raises
    ------
    TypeError, ValueError
        For an array without a real floating dtype, one whose values cannot be read, or sizes below 1.

    See Also
    --------
    subquad.Auto : Its field `crossover` takes the result.

    Notes
    -----
    Queries, keys and values are normal, from a seed. Measure on a machine that does nothing else.

    Examples
    --------
    >>> import numpy as np, subquad
    >>> like = np.zeros((1, 16), dtype=np.float32)
    >>> table = subquad.measure_crossover(like, [subquad.Window(left=16)], lengths=[256, 512], heads=1)
    >>> table.lengths
    (256, 512)
    """
    xp = check_arrays(like=like)
    check_floating(xp, like=like)
    causal = check_flag("causal", causal)
    sizes = sorted({check_count("lengths", n) for n in lengths})
    heads = check_count("heads", heads)
    if not backend_of(xp).is_concrete(like):
        msg = "like is an array of a program that is traced: measure outside of it, and pass the result as crossover"
        raise ValueError(msg)
    measured: list[tuple[float, list[float]]] = []
    for n in sizes:
        exact, *others = seconds_for(like, methods, n, causal=causal, heads=heads)
        measured.append((exact, [seconds / exact for seconds in others]))
        if exact * heads > ENOUGH_SECONDS:
            break
    by_method = zip(*(ratios for _, ratios in measured), strict=True)
    return Crossover(
        causal, like.shape[-1], tuple(sizes[: len(measured)]), tuple(exact for exact, _ in measured),
        tuple((repr(method), tuple(ratios)) for method, ratios in zip(methods, by_method, strict=True)),
    )  # fmt: skip


def seconds_for(
    like: Array, methods: Sequence[Method], n: int, *, causal: bool, heads: int, rounds: int = ROUNDS
) -> list[float]:
    """The least time of some calls of exact attention, then of each method, for one head of a sequence of n.

    The first call compiles. The others take turns, so that what else the machine does for a moment slows one of each
    down, and not all of one method. A call has ended once a number of its output is read.
    """
    xp, where = namespace_of(like), place_of(like)
    drawn = generator(0, n).standard_normal((3, heads, n, like.shape[-1]))
    q, k, v = (xp.asarray(x, dtype=like.dtype, device=where) for x in drawn.astype(np.float32))
    least = [math.inf] * (1 + len(methods))
    for number in range(rounds + 1):
        for i, method in enumerate((Exact(), *methods)):
            start = time.perf_counter()
            to_host(method(q, k, v, causal=causal)[0, -1:, 0], float)
            if number:
                least[i] = min(least[i], (time.perf_counter() - start) / heads)
    return least
