"""Gated linear attention (Yang et al., 2024): linear attention whose state decays, with one rate for each channel.

S[t] = diag(exp g[t]) S[t−1] + k[t] v[t]ᵀ,    o[t] = scale · S[t]ᵀ q[t]
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, overload

import numpy as np

from subquad.backend import Array
from subquad.core.beside import namespace_of, place_of
from subquad.core.checks import check_arrays, check_flag, check_floating, check_given, check_number
from subquad.core.dtypes import cast, common_dtype, compute_dtype, stored_dtype
from subquad.core.shapes import broadcast_batch
from subquad.core.states import StateSpec, merge_by_decay
from subquad.kernels.max_shift import divide_or_zero
from subquad.kernels.outer_scan import outer_scan
from subquad.registry import Host, Inputs, register_scan
from subquad.scans.call import Form, Target, form_of
from subquad.scans.timeline import Rows, Timeline, every, timeline

POSITIONAL = ("q", "k", "v", "g")
INPUTS = (*POSITIONAL, "bonus", "initial_state")
STEP_INPUTS = (*INPUTS[:-1], "state")


def draw(rng: np.random.Generator, n: int) -> Inputs:
    """Example inputs: four heads with a forget gate for each channel, sigmoid(x)^(1/16) as in the paper."""
    q, k, x = rng.standard_normal((3, 4, n, 32))
    return {"q": q, "k": k / 4, "v": rng.standard_normal((4, n, 64)), "g": -np.logaddexp(0, -x - 2) / 16}, {}


def activations(q: Host, k: Host, v: Host) -> Inputs:
    """RetNet's decays over real activations: head h forgets by 1 − 2^(−5 − h) at each step.

    Queries and keys are those of the activations; a key head is repeated for the query heads that share it.
    """
    heads = q.shape[-3] if q.ndim > 2 else 1
    if q.ndim > 2:
        k, v = (np.repeat(x, heads // x.shape[-3], axis=-3) for x in (k, v))
    g = np.log1p(-(2.0 ** (-5 - np.arange(heads))))
    return {"q": q, "k": k, "v": v, "g": np.broadcast_to(g[:, None, None], (heads, q.shape[-2], 1)).reshape(
        (*q.shape[:-1], 1))}, {}  # fmt: skip


def definition(arrays: Mapping[str, Host], options: Mapping[str, Any]) -> Host:
    """The definition: o, step by step, in float64."""
    wide = {name: np.asarray(x, np.float64) for name, x in arrays.items()}
    q, k, v = (wide[name] for name in POSITIONAL[:3])
    if options.get("normalize"):
        v = np.concatenate([v, np.ones((*v.shape[:-1], 1))], axis=-1)
    decay = np.exp(wide["g"]) if "g" in wide else np.ones((q.shape[-2], 1))
    batch = np.broadcast_shapes(*(x.shape[:-2] for x in (q, k, v, decay)))
    scale = options.get("scale")
    q = q * (q.shape[-1] ** -0.5 if scale is None else scale)
    S, o = np.zeros((*batch, q.shape[-1], v.shape[-1])), np.zeros((*batch, *v.shape[-2:]))
    S = wide.get("initial_state", S)
    steps = range(q.shape[-2])
    for t in reversed(steps) if options.get("reverse") else steps:
        kv = k[..., t, :, None] * v[..., t, None, :]
        read = S + wide["bonus"][..., :, None] * kv if "bonus" in wide else None
        S = decay[..., t, :, None] * S + kv
        o[..., t, :] = np.sum(q[..., t, :, None] * (S if read is None else read), axis=-2)
    return o[..., :-1] / o[..., -1:] if options.get("normalize") else o


def decay(arrays: Mapping[str, Any], options: Mapping[str, Any]) -> Array:
    """exp(Σ_t g[t]), (..., d or 1, 1): the factor by which a chunk multiplies the state before it."""
    g, v = arrays.get("g"), arrays["v"]
    xp = namespace_of(v)
    compute = compute_dtype(xp, *(arrays.get(name) for name in INPUTS))
    batch = broadcast_batch(**{name: arrays[name].shape[:-2] for name in POSITIONAL if arrays.get(name) is not None})
    given = {name: options.get(name) for name in ("segments", "mask")}
    time = timeline("v", v, batch, v.shape[-2], **given, reverse=bool(options.get("reverse")), fold=False)
    if g is None:
        total = xp.zeros((*(1 for _ in batch), 1, 1), dtype=compute, device=place_of(v))
    else:
        total = xp.sum(time.filled(cast(xp, g, compute), axis=-2), axis=-2, keepdims=True)
    return time.restarted(xp.exp(xp.matrix_transpose(total)), 0.0)


def gated_linear_attention_step(
    state: Array | None,
    q: Array,
    k: Array,
    v: Array,
    g: Array | None = None,
    /,
    *,
    bonus: Array | None = None,
    scale: float | None = None,
    normalize: bool = False,
    mask: Array | None = None,
    implementation: str = "auto",
) -> tuple[Array, Array]:
    """Compute one step of `gated_linear_attention`, for decoding token by token; the arrays have no time axis.

        S ← diag(exp g) S + k vᵀ,    o = scale · Sᵀ q

    Parameters
    ----------
    state : array, shape (..., d, d_v), or None
        The state before the step, (..., d, d_v + 1) with `normalize`; None means zero.
    q, k : array, shape (..., d)
        Query and key of one token.
    v : array, shape (..., d_v)
        Value.
    g : array, shape (..., d) or (..., 1), optional
        Logarithm of the decay.
    bonus : array, shape (heads, d), optional
        Weight of the current token, which then is read without entering the state first.
    scale : float, optional
        Factor of the output. Default: d^(−1/2).
    normalize : bool, default False
        Divide by the same recurrence of the keys alone.
    mask : array of bool, broadcastable to (...), optional
        False for an item whose sequence has ended: its state stays as it is, and its o is 0.
    implementation : str, default "auto"
        "auto", "generic", or the name of an override of the kernel `outer_scan`; see `subquad.explain`.

    Returns
    -------
    o : array, shape (..., d_v)
        The output, in the common dtype of `q`, `k` and `v`.
    state : array, shape (..., d, d_v)
        The state after the step, at least float32. The state given is not written to.

    Raises
    ------
    TypeError, ValueError
        As `gated_linear_attention` raises them.

    See Also
    --------
    gated_linear_attention : The scan over a whole sequence.

    Examples
    --------
    >>> import numpy as np, subquad
    >>> one, state = np.ones(1), None
    >>> for _ in range(3):
    ...     o, state = subquad.gated_linear_attention_step(state, one, one, one)
    >>> o
    array([3.])
    """
    arrays = q, k, v, g, bonus, state
    normalize = check_flag("normalize", normalize)
    form = form_of(_kind("step", normalize), arrays, lambda: _form(arrays, time=0, normalize=normalize))
    time = form.step_time("q", q, mask)
    return _scan(form, arrays, scale, normalize, time, implementation)[:2]


@overload
def gated_linear_attention(
    q: Array, k: Array, v: Array, g: Array | None = None, /, *, bonus: Array | None = None, scale: float | None = None,
    normalize: bool = False, initial_state: Array | None = None, return_state: Literal[False] = False,
    reverse: bool = False, segments: Array | None = None, mask: Array | None = None, states_at: None = None,
    implementation: str = "auto",
) -> Array: ...  # fmt: skip
@overload
def gated_linear_attention(
    q: Array, k: Array, v: Array, g: Array | None = None, /, *, bonus: Array | None = None, scale: float | None = None,
    normalize: bool = False, initial_state: Array | None = None, return_state: Literal[True], reverse: bool = False,
    segments: Array | None = None, mask: Array | None = None, states_at: None = None, implementation: str = "auto",
) -> tuple[Array, Array]: ...  # fmt: skip
@overload
def gated_linear_attention(
    q: Array, k: Array, v: Array, g: Array | None = None, /, *, bonus: Array | None = None, scale: float | None = None,
    normalize: bool = False, initial_state: Array | None = None, return_state: bool = False, reverse: bool = False,
    segments: Array | None = None, mask: Array | None = None, states_at: Sequence[int] | every,
    implementation: str = "auto",
) -> tuple[Array, ...]: ...  # fmt: skip
@register_scan(
    "gated_linear_attention",
    state=StateSpec({"state": ("d", "d_v"), "decay": ("d", "d_v")}, merge_by_decay),
    decay=decay,
    draw=draw,
    cost="n d d_v",
    positional=POSITIONAL,
    step=gated_linear_attention_step,
    activations=activations,
    reference=definition,
)
def gated_linear_attention(
    q: Array,
    k: Array,
    v: Array,
    g: Array | None = None,
    /,
    *,
    bonus: Array | None = None,
    scale: float | None = None,
    normalize: bool = False,
    initial_state: Array | None = None,
    return_state: bool = False,
    reverse: bool = False,
    segments: Array | None = None,
    mask: Array | None = None,
    states_at: Sequence[int] | every | None = None,
    implementation: str = "auto",
) -> Any:
    """Compute causal linear attention whose state decays at each step: GLA, RetNet and RWKV-6.

        S[t] = diag(exp g[t]) S[t−1] + k[t] v[t]ᵀ,    S[−1] = initial_state
        o[t] = scale · S[t]ᵀ q[t]                                                (without bonus)
        o[t] = scale · (S[t−1] + diag(bonus) k[t] v[t]ᵀ)ᵀ q[t]                   (with bonus)

    Parameters
    ----------
    q, k : array, shape (..., n, d)
        Queries and keys, of real floating dtypes; the axis of heads, if any, is −3. Batch axes of all inputs broadcast.
    v : array, shape (..., n, d_v)
        Values.
    g : array, shape (..., n, d) or (..., n, 1), optional
        Logarithm of the decay, at most 0 unless the state is meant to grow: one number for each channel of the keys
        (GLA, RWKV-6) or one for all (RetNet, where it is constant). −∞ forgets all. Default: no decay, which is
        linear attention without denominator.
    bonus : array, shape (heads, d), optional
        Weight u of the current token (RWKV-6): the output reads the state before the step, and the current token with
        this weight. More generally (..., d), which broadcasts against the batch axes.
    scale : float, optional
        Factor of the output. Default: d^(−1/2).
    normalize : bool, default False
        Divide by the same recurrence of the keys alone: o[t] by scale · z[t]ᵀ q[t], where z[t] = exp(g[t]) ∘ z[t−1] +
        k[t]. An output whose divisor is 0 is 0.
    initial_state : array, shape (..., d, d_v), optional
        The state before the first step (with `reverse`, after the last); (..., d, d_v + 1) with `normalize`, whose last
        column is z. Default: zero.
    return_state : bool, default False
        Return (o, state) instead of o.
    reverse : bool, default False
        Run time from the end: S[t] = diag(exp g[t]) S[t+1] + k[t] v[t]ᵀ.
    segments : array of int, broadcastable to (..., n), optional
        Numbers of the documents in a packed sequence: S starts anew from 0 where the number changes. `initial_state`
        belongs to the first document of the call.
    mask : array of bool, broadcastable to (..., n), optional
        True for a step that counts. A padded step, False, leaves the state as it is and gives 0; its values have no
        influence, nor has its number in `segments`.
    states_at : sequence of int or `every`, optional
        Positions p in 0 … n: the states after p steps are returned too. ``every(k)`` is (k, 2k, …).
    implementation : str, default "auto"
        "auto", "generic", or the name of a kernel; see `subquad.explain`.

    Returns
    -------
    o : array, shape (..., n, d_v)
        The output, in the common dtype of `q`, `k` and `v`, and on their device.
    state : array, shape (..., d, d_v)
        Only with `return_state`: the state after the last step (with `reverse`, the first), at least float32. With
        `normalize` it is (..., d, d_v + 1), and its last column is z. As the `initial_state` of the next chunk, it
        continues this scan up to rounding.
    states : array, shape (p, ..., d, d_v)
        Only with `states_at`, last: for each position the state that a call on the first p steps returns (with
        `reverse`, the last p).

    Raises
    ------
    TypeError
        For inputs that are not arrays of one library with a real floating dtype, `segments` that are not integers, a
        `mask` that is not bool, and `states_at` that are no positions.
    ValueError
        If shapes or devices do not fit, a position is not in 0 … n, or `implementation` cannot take the call; the
        message names the argument and what was expected.

    See Also
    --------
    gated_linear_attention_step : One step of this recurrence.
    ssd : The same recurrence in the arguments of Mamba-2.
    summarize_scan : State and decay of a chunk, for chunks that are processed apart.

    Notes
    -----
    O(n d d_v) operations; the state has d d_v numbers, and no array of n states exists. float16 and bfloat16 are
    computed in float32. The generic form multiplies matrices in chunks [1]_; the exponents are sums of g between two
    steps, so that nothing is divided by a product of decays and no exponential overflows. There the value of a later
    step of the chunk that is not finite may reach an earlier step where g is one number for all channels. RetNet is
    [2]_, RWKV-6 is [3]_, linear attention without denominator [4]_. Kernel: `outer_scan`.

    References
    ----------
    .. [1] S. Yang et al., "Gated Linear Attention Transformers with Hardware-Efficient Training", ICML 2024,
       equations 3 and 4.
    .. [2] Y. Sun et al., "Retentive Network: A Successor to Transformer for Large Language Models", 2023, equation 6.
    .. [3] B. Peng et al., "Eagle and Finch: RWKV with Matrix-Valued States and Dynamic Recurrence", 2024, section 4.2.
    .. [4] A. Katharopoulos et al., "Transformers are RNNs", ICML 2020, section 3.3.

    Examples
    --------
    Without decay the state is a running sum of k vᵀ; a decay of log 2 halves it at each step:

    >>> import numpy as np, subquad
    >>> one = np.ones((3, 1))
    >>> subquad.gated_linear_attention(one, one, one)[:, 0]
    array([1., 2., 3.])
    >>> subquad.gated_linear_attention(one, one, one, -np.log(2) * one)[:, 0]
    array([1.  , 1.5 , 1.75])
    """
    arrays = q, k, v, g, bonus, initial_state
    normalize, return_state = check_flag("normalize", normalize), check_flag("return_state", return_state)
    form = form_of(_kind("scan", normalize), arrays, lambda: _form(arrays, time=1, normalize=normalize))
    *batch, n, _ = form.shape_of(0)
    time = timeline(
        "q", q, tuple(batch), n, xp=form.xp, segments=segments, mask=mask, states_at=states_at,
        reverse=check_flag("reverse", reverse),
    )  # fmt: skip
    return time.results(*_scan(form, arrays, scale, normalize, time, implementation), return_state=return_state)


def _kind(call: str, normalize: bool) -> str:
    return f"gated_linear_attention {call}{' normalize' * normalize}"


def _scan(
    form: Form, arrays: tuple[Any, ...], scale: float | None, normalize: bool, time: Timeline, implementation: str
) -> tuple[Array, Array, list[Array] | None]:
    """(o, last state, states at positions) of a call, by its form."""
    factor = arrays[0].shape[-1] ** -0.5 if scale is None else check_number("scale", scale)
    given: Any = form.enter(arrays)
    xp, (q, k, v, g, bonus, start) = form.xp, given
    if time.is_plain and not normalize:
        given = q, k, v, g, None, bonus, None, start, None
        o, state = form.run(outer_scan, given, implementation, scale=factor, reverse=time.reverse)
        return form.leave(0, o), form.leave(1, state), None

    def outer(rows: Rows, v: Array | None, start: Array | None, resets: Array | None) -> tuple[Array, Array]:
        q, k, g = rows
        return outer_scan(
            q, k, v, g, None, bonus, None, start, resets,
            scale=factor, reverse=time.reverse, implementation=implementation,
        )  # fmt: skip

    def scan(rows: Rows, start: Array | None, resets: Array | None) -> tuple[Array, Array]:
        v, *rows = rows
        assert v is not None
        if not normalize:
            return outer(rows, v, start, resets)
        first, last = (None, None) if start is None else (start[..., :-1], start[..., -1:])
        ones = xp.broadcast_to(xp.ones((1, 1, 1, 1), dtype=v.dtype, device=place_of(v)), (*v.shape[:-1], 1))
        (o, state), (total, sums) = outer(rows, v, first, resets), outer(rows, ones, last, resets)
        return divide_or_zero(xp, o, total), xp.concat([state, sums], axis=-1)

    with form.computing(q):
        # a padded step adds no k vᵀ, and its decay is 1
        o, state, states = time.run(scan, [time.filled(x) for x in (v, q, k, g)], start)
    states = None if states is None else [form.leave(1, x) for x in states]
    return form.leave(0, o), form.leave(1, state), states


def _form(given: tuple[Any, ...], *, time: int, normalize: bool) -> Form:
    """The form of a scan (`time` 1) or of one step (`time` 0), after checks of the arrays: heads join the batch."""
    arrays = dict(zip(INPUTS if time else STEP_INPUTS, given, strict=True))
    check_given(**{name: arrays[name] for name in POSITIONAL[:3]})
    xp = check_arrays(**arrays)
    check_floating(xp, **arrays)
    tails = _tails(arrays, time, normalize)
    batch = broadcast_batch(**{name: tuple(x.shape[: x.ndim - len(tails[name])])
                               for name, x in arrays.items() if x is not None})  # fmt: skip
    count, n = math.prod(batch), given[0].shape[-2] if time else 1
    compute = compute_dtype(xp, *given)

    def target(name: str, x: Array | None) -> Target | None:
        if x is None:
            return None
        tail = tails[name]
        own = tuple(x.shape[: x.ndim - len(tail)])
        rows = (n, 1, x.shape[-1]) if name in POSITIONAL else (1, *tail)
        # a quotient is rounded once, so its numerator must not be
        dtype = stored_dtype(xp, x, compute) if name in POSITIONAL and not normalize else compute
        return Target(dtype, None if own == batch else (*batch, *tail), (count, *rows))

    d, d_v = given[0].shape[-1], given[2].shape[-1]
    dtype, steps = common_dtype(xp, *given[:3]), (n,) * time
    outputs = Target(dtype, None, (*batch, *steps, d_v)), Target(compute, None, (*batch, d, d_v + normalize))
    return Form(xp, tuple(target(name, x) for name, x in arrays.items()), outputs)


def _tails(arrays: Mapping[str, Array | None], time: int, normalize: bool) -> dict[str, tuple[int, ...]]:
    """The axes of each input after the batch; ValueError if one has others."""
    q, v = arrays["q"], arrays["v"]
    assert q is not None
    assert v is not None
    if q.ndim <= time:
        expected = "(..., n, d) with at least two axes" if time else "(..., d)"
        msg = f"q has shape {tuple(q.shape)}, expected {expected}"
        raise ValueError(msg)
    steps, d = tuple(q.shape[-1 - time : -1]), q.shape[-1]
    if d == 0:
        msg = f"q has shape {tuple(q.shape)}, expected at least one channel (last axis)"
        raise ValueError(msg)
    if v.ndim <= time or tuple(v.shape[-1 - time : -1]) != steps:
        each = "".join(f"{n}, " for n in steps)
        msg = f"v has shape {tuple(v.shape)}, expected (..., {each}d_v): one value per query of q {tuple(q.shape)}"
        raise ValueError(msg)
    d_v = v.shape[-1]
    state = "initial_state" if time else "state"
    tails = {"q": (*steps, d), "k": (*steps, d), "v": (*steps, d_v), "g": (*steps, d), "bonus": (d,)}
    tails[state] = (d, d_v + normalize)
    g = arrays["g"]
    if g is not None and tuple(g.shape[g.ndim - len(steps) - 1 :]) == (*steps, 1):
        tails["g"] = (*steps, 1)
    for name, tail in tails.items():
        x = arrays[name]
        if x is None or (x.ndim >= len(tail) and tuple(x.shape[x.ndim - len(tail) :]) == tail):
            continue
        expected = f"(..., {', '.join(map(str, tail))})"
        if name == "g":
            expected += f" or (..., {', '.join(map(str, (*steps, 1)))})"
        hint = ", with the sums of the keys as its last column, since normalize=True" * (name == state and normalize)
        msg = f"{name} has shape {tuple(x.shape)}, expected {expected}{hint}"
        raise ValueError(msg)
    return tails
