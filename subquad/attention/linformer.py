"""Linformer attention (Wang et al., "Linformer", 2020).

    out = softmax(s q (E k)ᵀ) (F v)

where E and F, (m, n_kv) each, project keys and values to m rows, whatever their number. O((n + n_kv) m (d + d_v)) time.
Keys pass in blocks; extra memory is O(m (d + d_v)).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import Any

import numpy as np

from subquad.attention.call import ArrayOptions, AttentionCall, enter
from subquad.attention.landmarks import segment_means
from subquad.attention.method import Method
from subquad.backend import Array
from subquad.core.beside import place_of
from subquad.core.block_loop import fold_blocks, rows_per_block
from subquad.core.checks import check_arrays, check_choice, check_count, check_floating, check_given, check_seed
from subquad.core.dtypes import cast
from subquad.core.shapes import broadcast_batch
from subquad.core.states import State, StateSpec
from subquad.kernels.softmax_attention import softmax_attention
from subquad.random import generator
from subquad.registry import register

Host = np.ndarray[Any, Any]
PROJECTIONS = ("mean", "random")
COLUMNS = 256  # columns of a random projection that are drawn at once; another number would change the draws


def add_sums(xp: ModuleType, left: State, right: State) -> State:
    """The state of both chunks: E k and F v are sums over keys."""
    return {name: left[name] + right[name] for name in left}


LONG = 2**15  # keys up to which one product sums them up


@register(
    "linformer",
    cost="n m (d + d_v)",
    size="rank",
    defaults=({"rank": 64}, {"rank": 256}),
)
@dataclass(frozen=True, repr=False, eq=False)
class Linformer(Method):
    """Linformer attention: keys and values projected to m rows, in O((n + n_kv) m (d + d_v)).

        out = softmax(s q (E k)ᵀ) (F v)

    Parameters
    ----------
    rank : int, default 256
        The number of rows m of E and F. A number given beside arrays must be theirs.
    projection : {"mean", "random"} or (array, array), default "mean"
        What E and F are:

        - "mean": both take the means of m consecutive segments of the visible keys, equal shares of them by rank. With
          at most m visible keys, the output is exact attention;
        - "random": E = F, one Gaussian matrix with entries N(0, 1/m);
        - a pair of arrays: E and F, each (..., m, n_kv), such as a model has learnt.
    seed : int, default 0
        Seed of "random"; raises ValueError with another projection.

    Notes
    -----
    A masked key has no influence: its columns of E and F count as 0. "mean" cuts its segments by the rank of a key
    among the visible ones; all segments have one weight, though some have one key more than others. The columns of
    arrays and of "random" belong to positions, so padding before or between the keys moves them to other columns.

    With variance 1/m, the expectation of EᵀE is the identity, and E keeps lengths and products on average; this is
    the distribution of the proofs [1]_, where theorem 2 has one such matrix in E and F, up to scalar factors. So one
    draw serves both. The theorem says that suitable E and F exist: a softmax of random mixtures of the keys is near
    exact attention only by training. "mean" needs none.

    Column j comes from (seed, ⌊j / 256⌋): the first columns do not change when n_kv grows, and the matrix never exists
    as a whole. A traced program holds the draws as constants.

    `causal=True` raises NotImplementedError, because a projected key mixes all positions. `summarize`, `merge` and
    `attend` need E and F as arrays; there is no `step`. Kernel: `softmax_attention`.

    References
    ----------
    .. [1] S. Wang et al., "Linformer: Self-Attention with Linear Complexity", 2020, eq. (7), theorem 2.

    Examples
    --------
    >>> import numpy as np, subquad
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = rng.standard_normal((3, 100, 8)) / 2
    >>> exact = subquad.attention(q, k, v, "exact")
    >>> error = subquad.attention(q, k, v, "linformer", rank=50) - exact
    >>> bool(np.linalg.norm(error) < 0.3 * np.linalg.norm(exact))
    True

    With projections that leave everything as it is, the output is exact:

    >>> out = subquad.attention(q, k, v, "linformer", projection=(np.eye(100), np.eye(100)))
    >>> bool(np.abs(out - exact).max() < 1e-12)
    True
    """

    causal = (
        "Linformer attention has no causal form: a projected key mixes keys of all positions, so later tokens would "
        "reach earlier rows; use 'favor', 'linear' or 'exact'"
    )
    state = StateSpec({"keys": ("m", "d"), "values": ("m", "d_v")}, add_sums)

    rank: int | None = None
    projection: str | tuple[Array, Array] = "mean"
    seed: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank is not None:
            check_count("rank", self.rank)
        if isinstance(self.projection, str):
            check_choice("projection", self.projection, PROJECTIONS)
        else:
            _check_pair("projection", self.projection, or_words=f"one of {PROJECTIONS} or ")
        if self.seed is not None:
            check_seed(self.seed)
            if not isinstance(self.projection, str) or self.projection != "random":
                msg = f'seed={self.seed} would have no effect: only projection="random" is drawn'
                raise ValueError(msg)

    def summarize(
        self,
        k: Array,
        v: Array,
        /,
        *,
        columns: tuple[Array, Array] | None = None,
        key_mask: Array | None = None,
        scale: float | None = None,
    ) -> State:
        """Sum up a chunk of keys and values in a state, which `attend` reads and `merge` continues.

        Parameters
        ----------
        k, v : array, shape (..., n, d) and (..., n, d_v)
            Keys and values of the chunk.
        columns : (array, array)
            The columns of E and F for the keys of this chunk, each (..., m, n): ``E[..., start:stop]`` and
            ``F[..., start:stop]``.
        key_mask : array of bool, broadcastable to (..., n), optional
            True = keep.
        scale : None
            A number raises ValueError: the state does not depend on the scale, `attend` takes it.

        Returns
        -------
        dict of array
            "keys" (..., m, d) and "values" (..., m, d_v), at least float32: the chunk's part of E k and F v.

        Raises
        ------
        TypeError, ValueError
            As `subquad.attention`, and for columns that are missing or do not fit.
        NotImplementedError
            If E and F are not arrays: they then depend on all keys, or on where the chunk begins.
        """
        spec = self._check_streams("summarize")
        if scale is not None:
            msg = f"scale={scale!r} would have no effect: the state of Linformer is free of it; give it to attend"
            raise ValueError(msg)
        if columns is None:
            msg = "summarize of Linformer needs columns=(E, F), the columns of the chunk: (E[..., a:b], F[..., a:b])"
            raise TypeError(msg)
        _check_pair("columns", columns)
        call = enter(
            spec,
            {"k": k, "v": v},
            key_mask=key_mask,
            array_options=lambda xp, like: self._checked(xp, like, "columns", columns, k.shape[-2]),
        )
        with call.computing():
            keys, values = _project(call)
        return call.leave_state({"keys": keys, "values": values})

    def _reads_half(self, *, streaming: bool = False) -> bool:
        return not streaming  # products with E and F take keys and values in float32, though

    def _evaluate(self, call: AttentionCall) -> Array:
        xp, k, v, key_mask, m = call.xp, call.k, call.v, call.key_mask, self._m()
        valid = None
        if call.options:
            E = call.options["E"]
            if E.shape[-1] != k.shape[-2]:
                msg = (
                    f"projection has {E.shape[-1]} columns for {k.shape[-2]} keys, expected one column for each key; "
                    f"for fewer keys, pass the columns (E[..., :n_kv], F[..., :n_kv])"
                )
                raise ValueError(msg)
            k, v = _project(call)
        elif self.projection == "random":
            k, v = _project_random(_with_wide_keys(call), m, self.seed or 0)
        elif k.shape[-2] <= m:  # each key is a segment of its own
            call, valid = call.widened(), key_mask
            k, v = call.k, call.v
        else:
            k, valid = segment_means(xp, k, key_mask, m)
            v, _ = segment_means(xp, v, key_mask, m)
        return call.run(self, softmax_attention, call.q, k, v, scale=call.scale, key_mask=valid)

    def _attend(self, call: AttentionCall) -> Array:
        state = call.state
        assert state is not None
        self.state.check_sizes("state", state, m=self._m(), d=call.q.shape[-1])
        return softmax_attention(call.q, state["keys"], state["values"], scale=call.scale)

    def _m(self) -> int:
        if isinstance(self.projection, str):
            return self.rank or 256
        return self.projection[0].shape[-2]

    def _check_streams(self, call: str) -> StateSpec:
        if isinstance(self.projection, str):
            why = {
                "mean": "the segments of its means are shares of all visible keys, whose number a chunk does not know",
                "random": "its columns belong to positions, and a chunk does not know where it begins",
            }[self.projection]
            msg = (
                f'Linformer has no {call} with projection="{self.projection}": {why}; pass projection=(E, F) as arrays'
            )
            raise NotImplementedError(msg)
        return self.state

    def _in_force(self) -> dict[str, Any]:
        options = super()._in_force()
        if not isinstance(self.projection, str):
            return {"projection": self.projection}
        options |= {"rank": self._m(), "seed": self.seed or 0}
        return options if self.projection == "random" else {name: options[name] for name in ("rank", "projection")}

    def _holds_arrays(self, *, streaming: bool = False) -> bool:
        return not streaming and not isinstance(self.projection, str)

    def _array_options(self, xp: ModuleType, like: Array) -> ArrayOptions:
        assert isinstance(self.projection, tuple)
        return self._checked(xp, like, "projection", self.projection, None)

    def _given_options(self) -> ArrayOptions | None:
        return None if isinstance(self.projection, str) else dict(zip("EF", self.projection, strict=True))

    def _checked(
        self, xp: ModuleType, like: Array, name: str, pair: tuple[Array, Array], n: int | None
    ) -> ArrayOptions:
        """The pair (E, F), checked, in the dtype of `like`; `n` is the number of columns, None if any will do."""
        E, F = pair
        named = {f"{name}[0] (E)": E, f"{name}[1] (F)": F}
        check_arrays(**{"q" if n is None else "k": like}, **named)
        check_floating(xp, **named)
        m = self.rank if n is None else self._m()
        rows = E.shape[-2] if m is None and E.ndim >= 2 else m
        width = E.shape[-1] if n is None and E.ndim >= 2 else n
        for word, x in named.items():
            if x.ndim < 2 or tuple(x.shape[-2:]) != (rows, width) or rows == 0:
                expected = f"(..., {rows or 'm'}, {'n_kv' if width is None else width})"
                msg = f"{word} has shape {tuple(x.shape)}, expected {expected}: m rows in both, a column for each key"
                raise ValueError(msg)
        return {"E": cast(xp, E, like.dtype), "F": cast(xp, F, like.dtype)}


def _check_pair(name: str, pair: Any, or_words: str = "") -> None:
    """Raise TypeError unless it is a pair of things that are not None."""
    if not isinstance(pair, tuple) or len(pair) != 2:
        msg = f"{name} must be {or_words}a pair (E, F) of arrays, got {type(pair).__name__}"
        raise TypeError(msg)
    check_given(**{f"{name}[0] (E)": pair[0], f"{name}[1] (F)": pair[1]})


def _with_wide_keys(call: AttentionCall) -> AttentionCall:
    """The call with keys and values in the compute dtype; queries stay as they are stored."""
    dtype = call.arrangement.compute
    k, v = (x if x.dtype == dtype else call.xp.astype(x, dtype) for x in (call.k, call.v))
    return call.with_keys(k, v, call.key_mask)


def _project(call: AttentionCall) -> tuple[Array, Array]:
    """(E k, F v) of the call's options E and F; hidden keys add nothing.

    Blocks of keys bound the memory of masked copies and of half precision in float32, and keep sums over long sequences
    exact; each costs its gradient a matrix of zeros.
    """
    xp, k, v, keep = call.xp, call.k, call.v, _column(call.key_mask)
    dtype = call.options["E"].dtype
    is_wide = k.dtype == v.dtype == dtype
    if is_wide and keep is None and call.arrangement.backend.holds(k.shape[-2] <= LONG):
        return call.options["E"] @ k, call.options["F"] @ v
    E_t, F_t = (xp.matrix_transpose(call.options[name]) for name in ("E", "F"))

    def add(
        sums: tuple[Array, Array], E_t: Array, F_t: Array, k: Array, v: Array, keep: Array | None
    ) -> tuple[tuple[Array, Array], None]:
        return _added(xp, sums, E_t, F_t, cast(xp, k, dtype), cast(xp, v, dtype), keep), None

    sums = _no_keys(call, E_t, F_t)
    items = math.prod(call.batch(E=E_t.shape[:-2], F=F_t.shape[:-2])) * call.arrangement.backend.items_behind(
        k, v, E_t, F_t
    )
    size = rows_per_block(items * max(E_t.shape[-1], k.shape[-1], v.shape[-1]))
    sums, _ = fold_blocks(add, sums, [E_t, F_t, k, v, keep], size, xp=xp)
    return sums


def _project_random(call: AttentionCall, m: int, seed: int) -> tuple[Array, Array]:
    """(R k, R v) of the random matrix R (m, n_kv), whose columns are drawn block by block."""
    xp, k, v, keep = call.xp, call.k, call.v, _column(call.key_mask)
    n, bits = k.shape[-2], xp.finfo(k.dtype).bits
    sums = None
    for block in range(max(-(-n // COLUMNS), 1)):
        start, stop = block * COLUMNS, min((block + 1) * COLUMNS, n)
        host = call.arrangement.backend.on_host(columns_on_host, m, seed, block, bits)
        R_t = xp.asarray(host, dtype=k.dtype, device=place_of(k))[: stop - start, :]
        rows = [None if x is None else x[..., start:stop, :] for x in (k, v, keep)]
        sums = _added(xp, _no_keys(call, R_t, R_t) if sums is None else sums, R_t, R_t, *rows)
    assert sums is not None
    return sums


def _no_keys(call: AttentionCall, E_t: Array, F_t: Array) -> tuple[Array, Array]:
    """(E k, F v) of no keys."""
    zeros = []
    for x, columns in ((call.k, E_t), (call.v, F_t)):
        mask = None if call.key_mask is None else call.key_mask.shape[:-1]
        batch = broadcast_batch(x=x.shape[:-2], projection=columns.shape[:-2], key_mask=mask)
        shape = (*batch, columns.shape[-1], x.shape[-1])
        zeros.append(call.xp.zeros(shape, dtype=columns.dtype, device=place_of(x)))
    return zeros[0], zeros[1]


def _added(
    xp: ModuleType, sums: tuple[Array, Array], E_t: Array, F_t: Array, k: Array, v: Array, keep: Array | None
) -> tuple[Array, Array]:
    """The sums (E k, F v) with a block of keys added; `keep` (..., n, 1) hides keys and their columns, NaN or not."""
    same = F_t is E_t
    if keep is not None:
        k, v, E_t = (xp.where(keep, x, 0.0) for x in (k, v, E_t))
        F_t = E_t if same else xp.where(keep, F_t, 0.0)
    return sums[0] + xp.matrix_transpose(E_t) @ k, sums[1] + xp.matrix_transpose(F_t) @ v


def _column(mask: Array | None) -> Array | None:
    return None if mask is None else mask[..., None]


def columns_on_host(m: int, seed: int, block: int, bits: int) -> Host:
    """`_drawn_columns(…)`: a plain function, because tracers cannot be told to call an `lru_cache` object."""
    return _drawn_columns(m, seed, block, bits)


@lru_cache(maxsize=32)
def _drawn_columns(m: int, seed: int, block: int, bits: int) -> Host:
    """One block of columns of R, as rows (COLUMNS, m), in the float dtype with `bits` bits; not to be written to."""
    drawn = generator(seed, block).standard_normal((COLUMNS, m)) / math.sqrt(m)
    return drawn.astype(f"float{bits}")
