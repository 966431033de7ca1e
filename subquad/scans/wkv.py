"""The recurrences of RWKV, one function for versions 4 to 7; w is the logarithm of the decay in each.

4        averages of values, weighed by exp(k), in vectors
5, 6     S[t] = diag(exp w[t]) S[t−1] + k[t] v[t]ᵀ,    o[t] = (S[t−1] + diag(u) k[t] v[t]ᵀ)ᵀ r[t]
7        S[t] = S[t−1] (diag(exp w[t]) + a[t] b[t]ᵀ) + v[t] k[t]ᵀ,    o[t] = S[t] r[t]
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, overload

import numpy as np

from subquad.backend import Array
from subquad.core.checks import check_arrays, check_flag, check_floating, check_given
from subquad.core.dtypes import common_dtype, compute_dtype, stored_dtype
from subquad.core.shapes import broadcast_batch
from subquad.core.states import StateSpec
from subquad.kernels.delta_scan import delta_scan
from subquad.kernels.outer_scan import outer_scan
from subquad.kernels.sigmoid import sigmoid
from subquad.registry import Host, Inputs, register_scan
from subquad.scans.call import Form, Target, form_of
from subquad.scans.timeline import Rows, Timeline, every, timeline
from subquad.scans.wkv4 import wkv4

VERSIONS = (4, 5, 6, 7)
POSITIONAL = ("r", "k", "v", "w")
INPUTS = (*POSITIONAL, "u", "a", "b", "initial_state")
STEP_INPUTS = (*INPUTS[:-1], "state")
NEEDED = {4: ("u",), 5: ("u",), 6: ("u",), 7: ("a", "b")}


def draw(rng: np.random.Generator, n: int) -> Inputs:
    """Example inputs: four heads of RWKV-6, whose channels have memories of 1 to 1000 steps."""
    r, k, v = rng.standard_normal((3, 4, n, 32))
    w = -np.exp(rng.uniform(np.log(1e-3), 0.0, (4, n, 32)))
    return {"r": r, "k": k / 32**0.5, "v": v, "w": w, "u": rng.standard_normal((4, 32))}, {"version": 6}


def activations(q: Host, k: Host, v: Host) -> Inputs:
    """RWKV-6 over real activations: r = q / √d, w = −0.1 sigmoid(k), u = 1; a key head serves all its query heads."""
    if q.ndim > 2:
        k, v = (np.repeat(x, q.shape[-3] // x.shape[-3], axis=-3) for x in (k, v))
    d = q.shape[-1]
    w, u = -0.1 / (1 + np.exp(-k)), np.ones((*q.shape[:-2], d))
    return {"r": q / d**0.5, "k": k, "v": v, "w": w, "u": u}, {"version": 6}


def definition(arrays: Mapping[str, Host], options: Mapping[str, Any]) -> Host:
    """The definition: step by step, in float64; batch shapes are equal."""
    wide = {name: np.asarray(x, np.float64) for name, x in arrays.items()}
    r, k, v, w = (wide[name] for name in POSITIONAL)
    version, (n, d), d_v = options["version"], k.shape[-2:], v.shape[-1]
    o, steps = np.empty(v.shape), range(n)
    order = reversed(steps) if options.get("reverse") else steps
    if version == 4:
        zero = np.zeros((*k.shape[:-2], d))
        num, den, shift = np.moveaxis(wide.get("initial_state", np.stack([zero, zero, zero], axis=-2)), -2, 0)
        num, den = num * np.exp(shift), den * np.exp(shift)
        for t in order:
            e, bonus = np.exp(k[..., t, :]), np.exp(wide["u"] + k[..., t, :])
            o[..., t, :] = (num + bonus * v[..., t, :]) / (den + bonus) / (1 + np.exp(-r[..., t, :]))
            num, den = np.exp(w) * num + e * v[..., t, :], np.exp(w) * den + e
        return o
    S = wide.get("initial_state", np.zeros((*k.shape[:-2], *((d_v, d) if version == 7 else (d, d_v)))))
    w = np.broadcast_to(w[..., None, :], (*w.shape[:-1], n, d)) if version == 5 else w
    for t in order:
        row = {name: wide[name][..., t, :] for name in ("r", "k", "v", "a", "b") if name in wide}
        outer = row["k"][..., :, None] * row["v"][..., None, :]
        decay = np.exp(w[..., t, :])
        if version == 7:
            read = np.sum(S * row["a"][..., None, :], axis=-1)
            S = S * decay[..., None, :] + read[..., :, None] * row["b"][..., None, :] + np.swapaxes(outer, -1, -2)
            o[..., t, :] = np.sum(S * row["r"][..., None, :], axis=-1)
        else:
            o[..., t, :] = np.sum((S + wide["u"][..., :, None] * outer) * row["r"][..., :, None], axis=-2)
            S = decay[..., :, None] * S + outer
    return o


def wkv_step(
    state: Array | None, r: Array, k: Array, v: Array, w: Array, /, *, version: int, u: Array | None = None,
    a: Array | None = None, b: Array | None = None, mask: Array | None = None, implementation: str = "auto",
) -> tuple[Array, Array]:  # fmt: skip
    """Compute one step of `wkv`, for decoding token by token; the arrays have no time axis.

    Parameters
    ----------
    state : array or None
        The state before the step, of the shape that `wkv` returns; None means no token before.
    r, k, v : array, shape (..., d) or (..., heads, d)
        Receptance, key and value of one token; with heads from version 5 on.
    w : array
        Logarithm of the decay: (d,) in version 4, (heads, d) or (heads, 1) in version 5, (..., heads, d) from 6 on.
    version : {4, 5, 6, 7}
        Version of RWKV.
    u : array, shape (d,) or (heads, d), optional
        Weight of the present token; versions 4, 5 and 6 need it.
    a, b : array, shape (..., heads, d), optional
        The matrix a bᵀ of a step; version 7 needs them.
    mask : array of bool, broadcastable to the batch axes, optional
        False for a token that does not count: the state stays as it is, and the output is 0.
    implementation : str, default "auto"
        "auto", "generic", or the name of an override of the kernel; see `subquad.explain`.

    Returns
    -------
    o : array, shape (..., d) or (..., heads, d_v)
        The output, in the common dtype of `r`, `k` and `v`.
    state : array
        The state after the step, at least float32. The state given is not written to.

    Raises
    ------
    TypeError, ValueError
        As `wkv` raises them.

    See Also
    --------
    wkv : The scan over a whole sequence.

    Examples
    --------
    >>> import numpy as np, subquad
    >>> one, state = np.ones((1, 1)), None
    >>> for _ in range(3):
    ...     o, state = subquad.wkv_step(state, one, one, one, 0 * one, version=6, u=one)
    >>> o
    array([[3.]])
    """
    version = _check_version(version)
    arrays = r, k, v, w, u, a, b, state
    form = form_of(f"wkv_step {version}", arrays, lambda: _form(arrays, version, time=0))
    time = form.step_time("k", k, mask)
    o, state = _scan(form, arrays, time, version, implementation)[:2]
    return form.leave(0, o), form.leave(1, state)


@overload
def wkv(
    r: Array, k: Array, v: Array, w: Array, /, *, version: int, u: Array | None = None, a: Array | None = None,
    b: Array | None = None, initial_state: Array | None = None, return_state: Literal[False] = False,
    reverse: bool = False, segments: Array | None = None, mask: Array | None = None, states_at: None = None,
    implementation: str = "auto",
) -> Array: ...  # fmt: skip
@overload
def wkv(
    r: Array, k: Array, v: Array, w: Array, /, *, version: int, u: Array | None = None, a: Array | None = None,
    b: Array | None = None, initial_state: Array | None = None, return_state: bool = False,
    reverse: bool = False, segments: Array | None = None, mask: Array | None = None,
    states_at: Sequence[int] | every | None = None, implementation: str = "auto",
) -> Any: ...  # fmt: skip
@register_scan(
    "wkv",
    state=StateSpec({"state": ("d", "d_v")}, None),
    decay=None,
    draw=draw,
    cost="n d d_v",
    positional=POSITIONAL,
    step=wkv_step,
    activations=activations,
    reference=definition,
)
def wkv(
    r: Array, k: Array, v: Array, w: Array, /, *, version: int, u: Array | None = None, a: Array | None = None,
    b: Array | None = None, initial_state: Array | None = None, return_state: bool = False,
    reverse: bool = False, segments: Array | None = None, mask: Array | None = None,
    states_at: Sequence[int] | every | None = None, implementation: str = "auto",
) -> Any:  # fmt: skip
    """Compute the time mixing of RWKV, versions 4 to 7, without the projections around it.

        4       o[t] = σ(r[t]) ∘ (N[t−1] + exp(u + k[t]) v[t]) / (M[t−1] + exp(u + k[t]))
                N[t] = exp(w) N[t−1] + exp(k[t]) v[t],    M[t] = exp(w) M[t−1] + exp(k[t])
        5, 6    o[t] = (S[t−1] + diag(u) k[t] v[t]ᵀ)ᵀ r[t],    S[t] = diag(exp w[t]) S[t−1] + k[t] v[t]ᵀ
        7       S[t] = S[t−1] (diag(exp w[t]) + a[t] b[t]ᵀ) + v[t] k[t]ᵀ,    o[t] = S[t] r[t]

    Parameters
    ----------
    r, k, v : array
        Receptances, keys and values: (..., n, d) in version 4, (..., heads, n, d) and v (..., heads, n, d_v) from
        version 5 on. Batch axes broadcast.
    w : array
        Logarithm of the decay, at most 0: (d,) in version 4, (heads, d) or (heads, 1) in version 5, and
        (..., heads, n, d) in versions 6 and 7.
    version : {4, 5, 6, 7}
        Version of RWKV.
    u : array, optional
        Weight of the present token, (d,) in version 4, (heads, d) in versions 5 and 6, which need it.
    a, b : array, shape (..., heads, n, d), optional
        The matrix a bᵀ of each step; version 7 needs them.
    initial_state : array, optional
        The state before the first step (with `reverse`, after the last), of the shape given below. Default: no token.
    return_state : bool, default False
        Return (o, state) instead of o.
    reverse : bool, default False
        Run time from the end.
    segments : array of int, broadcastable to (..., n) or (..., heads, n), optional
        Numbers of the documents in a packed sequence: the state starts anew where the number changes. `initial_state`
        belongs to the first document of the call.
    mask : array of bool, broadcastable as `segments`, optional
        True for a step that counts. A padded step, False, leaves the state as it is and gives 0; its values have no
        influence, nor has its number in `segments`.
    states_at : sequence of int or `every`, optional
        Positions p in 0 … n: the states after p steps are returned too. ``every(k)`` is (k, 2k, …).
    implementation : str, default "auto"
        "auto", "generic", or the name of a kernel; see `subquad.explain`.

    Returns
    -------
    o : array, shape of `v`
        The output, in the common dtype of `r`, `k` and `v`, and on their device.
    state : array
        Only with `return_state`: the state after the last step, at least float32: (..., 3, d) in version 4, the rows
        N exp(−P), M exp(−P) and P, where P is the largest exponent; (..., heads, d, d_v) in versions 5 and 6;
        (..., heads, d_v, d) in version 7.
    states : array, shape (p, ...)
        Only with `states_at`, last: the state after each of these numbers of steps.

    Raises
    ------
    TypeError
        For inputs that are not arrays of one library with a real floating dtype, or a `version` that is no integer.
    ValueError
        For an unknown `version`, an argument that the version needs or does not know, and shapes or devices that do
        not fit; the message names the argument and what was expected.

    See Also
    --------
    wkv_step : One step of this recurrence.
    gated_linear_attention : Versions 5 and 6 in the arguments of gated linear attention; their states merge.
    delta_rule : The delta rule, of which version 7 is a general form.

    Notes
    -----
    O(n d) operations in version 4 [1]_ and O(n d d_v) in versions 5, 6 [2]_ and 7 [3]_. Published models store other
    numbers than w: time_decay of version 4 is log(−w), that of version 5 too, and versions 6 and 7 make w in the model,
    as −exp(·) and −exp(−1/2) σ(·). In version 7, a is −κ̂ and b is κ̂ ∘ (the in-context learning rate). float16 and
    bfloat16 are computed in float32. Version 4 keeps its sums relative to their largest term, so that no key overflows.
    In version 7, numbers that overflow in the generic form may reach all steps of their chunk, of another document too.
    Kernels: `linear_scan`, `outer_scan`, `delta_scan`.

    References
    ----------
    .. [1] B. Peng et al., "RWKV: Reinventing RNNs for the Transformer Era", 2023, equations 16 to 18, and appendix D.
    .. [2] B. Peng et al., "Eagle and Finch: RWKV with Matrix-Valued States and Dynamic Recurrence", 2024, section 4.
    .. [3] B. Peng et al., "RWKV-7 'Goose' with Expressive Dynamic State Evolution", 2025, section 4.

    Examples
    --------
    Version 4 averages the values; a key of −100 has no weight:

    >>> import numpy as np, subquad
    >>> r, k = np.full((3, 1), 100.0), np.asarray([[0.0], [-100.0], [0.0]])
    >>> v, w, u = np.asarray([[1.0], [5.0], [2.0]]), np.zeros(1), np.zeros(1)
    >>> subquad.wkv(r, k, v, w, version=4, u=u)[:, 0]
    array([1. , 1. , 1.5])
    """
    version = _check_version(version)
    arrays = r, k, v, w, u, a, b, initial_state
    form = form_of(f"wkv {version}", arrays, lambda: _form(arrays, version, time=1))
    reverse, return_state = check_flag("reverse", reverse), check_flag("return_state", return_state)
    *batch, n, _ = form.shape_of(0)
    time = timeline(
        "k", k, tuple(batch), n, xp=form.xp, segments=segments, mask=mask, states_at=states_at, reverse=reverse
    )
    o, state, states = _scan(form, arrays, time, version, implementation)
    given = None if states is None else [form.leave(1, x) for x in states]
    return time.results(form.leave(0, o), form.leave(1, state), given, return_state=return_state)


def _check_version(version: Any) -> int:
    if isinstance(version, bool) or not isinstance(version, int | np.integer):
        msg = f"version is {version!r} of type {type(version).__name__}, expected one of {VERSIONS}"
        raise TypeError(msg)
    if version not in VERSIONS:
        msg = f"version is {version}, expected one of {VERSIONS}"
        raise ValueError(msg)
    return int(version)


def _scan(
    form: Form, arrays: Sequence[Array | None], time: Timeline, version: int, implementation: str
) -> tuple[Array, Array, list[Array] | None]:
    """(o, last state, states at positions) as the kernels give them, version 7's states turned back."""
    entered: list[Any] = form.enter(arrays)
    xp, (r, k, v, w, u, a, b, start) = form.xp, entered
    if time.is_plain and version == 6:
        given = r, k, v, w, None, u, None, start, None
        return *form.run(outer_scan, given, implementation, scale=1.0, reverse=time.reverse), None
    if time.is_plain and version == 7:
        turned = None if start is None else xp.matrix_transpose(start)
        given = r, k, v, w, None, a, b, turned, None
        o, state = form.run(delta_scan, given, implementation, scale=1.0, reverse=time.reverse)
        return o, xp.matrix_transpose(state), None
    how: dict[str, Any] = {"reverse": time.reverse, "implementation": implementation}
    r, k, v = (time.filled(x) for x in (r, k, v))

    def run4(rows: Rows, state: Array, resets: Array | None) -> tuple[Array, Array]:
        k, v, mask = rows
        if time.reverse:
            k, v, mask, resets = (None if x is None else xp.flip(x, axis=1) for x in (k, v, mask, resets))
        out, state = wkv4(xp, k, v, w, u, state, resets, mask, implementation=implementation)
        return xp.flip(out, axis=1) if time.reverse else out, state

    def run5(rows: Rows, state: Array, resets: Array | None) -> tuple[Array, Array]:
        r, k, v, w = rows
        return outer_scan(r, k, v, w, None, u, None, state, resets, scale=1.0, **how)

    def run7(rows: Rows, state: Array, resets: Array | None) -> tuple[Array, Array]:
        r, k, v, w, a, b = rows
        return delta_scan(r, k, v, w, None, a, b, state, resets, scale=1.0, **how)

    with form.computing(k):
        if version == 4:
            wide = None if time.mask is None else xp.broadcast_to(time.mask, k.shape[:2])
            o, state, states = time.run(run4, (k, v, wide), start)
            return sigmoid(xp, r) * o, state, states
        if version == 5:
            w = xp.broadcast_to(w, (*k.shape[:3], w.shape[-1]))
        w = time.filled(w)
        if version != 7:
            return time.run(run5, (r, k, v, w), start)
        turned = None if start is None else xp.matrix_transpose(start)
        a, b = time.filled(a), time.filled(b)
        o, state, states = time.run(run7, (r, k, v, w, a, b), turned)
        back = None if states is None else [xp.matrix_transpose(x) for x in states]
        return o, xp.matrix_transpose(state), back


def _form(given: Sequence[Array | None], version: int, *, time: int) -> Form:
    """The form of a scan (`time` 1) or of one step (`time` 0), after checks of the arrays: heads join the batch."""
    arrays: dict[str, Any] = dict(zip(INPUTS if time else STEP_INPUTS, given, strict=True))
    check_given(**{name: arrays[name] for name in (*POSITIONAL, *NEEDED[version])})
    for name in ("u", "a", "b"):
        if arrays[name] is not None and name not in NEEDED[version]:
            msg = f"{name} is given, but version {version} has no {name}; it needs {' and '.join(NEEDED[version])}"
            raise ValueError(msg)
    xp = check_arrays(**arrays)
    check_floating(xp, **arrays)
    tails = _tails(arrays, version, time)
    own = {name: tuple(x.shape[: x.ndim - len(tails[name])]) for name, x in arrays.items() if x is not None}
    batch = broadcast_batch(**own)
    k, v = arrays["k"], arrays["v"]
    count, n, d, d_v = math.prod(batch), k.shape[-2] if time else 1, k.shape[-1], v.shape[-1]
    compute = compute_dtype(xp, *given)
    heads = () if version == 4 else (1,)  # kernels with matrix states have an axis of heads

    def target(name: str, x: Array | None) -> Target | None:
        if x is None:
            return None
        tail, is_state = tails[name], name not in INPUTS[:-1]
        wide = None if own[name] == batch or (version == 4 and name in ("w", "u")) else (*batch, *tail)
        if version == 4 and name in ("w", "u"):
            return Target(compute, wide, (d,))
        if is_state or name == "u":
            return Target(compute, wide, (count, *heads, *tail))
        dtype = compute if version == 4 else stored_dtype(xp, x, compute)
        return Target(dtype, wide, (count, 1 if (version, name) == (5, "w") else n, *heads, tail[-1]))

    outputs = (
        Target(common_dtype(xp, *given[:3]), None, (*batch, *(n,) * time, d_v)),
        Target(compute, None, (*batch, *tails["state"])),
    )
    return Form(xp, tuple(target(name, x) for name, x in arrays.items()), outputs)


def _tails(arrays: Mapping[str, Any], version: int, time: int) -> dict[str, tuple[int, ...]]:
    """The axes of each array after the batch, and of the state; ValueError unless the arrays have them."""
    k, v = arrays["k"], arrays["v"]
    each = "n, " * time
    for name, x in (("k", k), ("v", v)):
        if x.ndim <= time:
            msg = f"{name} has shape {tuple(x.shape)}, expected (..., {each}d)"
            raise ValueError(msg)
    steps, d, d_v = tuple(k.shape[-1 - time : -1]), k.shape[-1], v.shape[-1]
    state = {4: (3, d), 5: (d, d_v), 6: (d, d_v), 7: (d_v, d)}[version]
    rows = (*steps, d)
    tails = {"r": rows, "k": rows, "v": rows if version == 4 else (*steps, d_v), "u": (d,), "a": rows, "b": rows}
    tails["w"] = rows if version > 5 else (d,)
    if version == 5 and tuple(arrays["w"].shape[-1:]) == (1,):
        tails["w"] = (1,)
    tails["initial_state" if time else "state"] = tails["state"] = state
    for name, x in arrays.items():
        if x is None:
            continue
        tail, got = tails[name], tuple(x.shape)
        alone = version == 4 and name in ("w", "u")
        if len(got) < len(tail) or got[len(got) - len(tail) :] != tail or (alone and len(got) > 1):
            axes = tuple(map(str, tail))
            expected = f"({', '.join(axes if alone else ('...', *axes))}{',' * (alone)})"
            msg = f"{name} has shape {got}, expected {expected} in version {version}, as k has {tuple(k.shape)}"
            raise ValueError(msg)
    return tails
