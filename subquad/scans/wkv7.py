"""The recurrence of RWKV-7, in the convention of its authors: states are (values, keys).

S[t] = S[t−1] (diag(exp w[t]) + a[t] b[t]ᵀ) + v[t] k[t]ᵀ,    o[t] = S[t] r[t]

It is the general form of the kernel `delta_scan` with transposed states.
"""

from __future__ import annotations

from typing import Any

from subquad.backend import Array
from subquad.core.checks import check_arrays, check_flag, check_floating, check_given
from subquad.core.dtypes import common_dtype, compute_dtype
from subquad.core.shapes import broadcast_batch
from subquad.kernels.delta_scan import delta_scan
from subquad.scans.call import Form, Target, form_of
from subquad.scans.rows import check_first, check_tails, row_target, state_target

INPUTS = ("r", "k", "v", "w", "a", "b", "initial_state")
WHY = dict.fromkeys("rkwab", "rows as of k") | {"v": "one value per key"}


def wkv7(
    r: Array,
    k: Array,
    v: Array,
    w: Array,
    a: Array,
    b: Array,
    /,
    *,
    initial_state: Array | None = None,
    reverse: bool = False,
    implementation: str = "auto",
) -> tuple[Array, Array]:
    """(o, state) of RWKV-7 [1]_.

        S[t] = S[t−1] (diag(exp w[t]) + a[t] b[t]ᵀ) + v[t] k[t]ᵀ,    S[−1] = initial_state
        o[t] = S[t] r[t]

    r, k, w, a, b (..., n, d) and v (..., n, d_v); the states are (..., d_v, d), as in RWKV's own code, where
    flash-linear-attention has (d, d_v). w is the logarithm of the decay: −exp(w) of the w that RWKV's kernels take. In
    a layer of RWKV-7, a = −κ and b = κ ∘ (learning rate), for keys κ of length 1, and k is the replacement key.
    There is no scale.

    TypeError for inputs that are not arrays of one library with a real floating dtype, ValueError if shapes or devices
    do not fit. float16 and bfloat16 are computed in float32; the state is float32 at least.

    .. [1] B. Peng et al., "RWKV-7 "Goose" with Expressive Dynamic State Evolution", 2025.
    """
    arrays = r, k, v, w, a, b, initial_state
    form = form_of("wkv7", arrays, lambda: _form(arrays))
    reverse = check_flag("reverse", reverse)
    r, k, v, w, a, b, state = form.enter(arrays)
    xp = form.xp
    with form.computing(r):
        o, last = delta_scan(
            *(r, k, v, w, None, a, b, None if state is None else xp.matrix_transpose(state), None),
            scale=1.0,
            reverse=reverse,
            implementation=implementation,
        )
        last = xp.matrix_transpose(last)
    return form.leave(0, o), form.leave(1, last)


def _form(given: tuple[Any, ...]) -> Form:
    """The form of a call, after checks of its arrays."""
    arrays = dict(zip(INPUTS, given, strict=True))
    check_given(**{name: arrays[name] for name in INPUTS[:6]})
    xp = check_arrays(**arrays)
    check_floating(xp, **arrays)
    (n,), d, d_v = check_first(arrays, 1)
    tails = {name: (n, d_v if name == "v" else d) for name in INPUTS[:6]} | {"initial_state": (d_v, d)}
    batch = broadcast_batch(**check_tails(arrays, tails, WHY | {"initial_state": "channels of v × channels of k"}))
    compute = compute_dtype(xp, *given)
    targets = (
        *(row_target(arrays[name], compute, batch, tails[name], 1) for name in INPUTS[:6]),
        state_target(arrays["initial_state"], compute, batch, (d_v, d)),
    )
    out = Target(common_dtype(xp, *given[:3]), None, (*batch, n, d_v))
    return Form(xp, targets, (out, Target(compute, None, (*batch, d_v, d))))
