"""The Mamba block (Gu & Dao, 2023, figure 3): two projections in, a convolution, a selective scan, a gate, one out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal, NamedTuple, overload

from subquad.backend import Array
from subquad.blocks.form import block_form, check_block
from subquad.blocks.parameters import check_shapes, convolve, project, take_parameters
from subquad.core.beside import place_of
from subquad.core.block_loop import fold_blocks
from subquad.core.checks import check_flag
from subquad.core.states import State, StateSpec
from subquad.kernels.mamba_step import mamba_step
from subquad.kernels.selective_scan import selective_scan as scan_kernel
from subquad.scans.call import Form, form_of
from subquad.scans.timeline import timeline

REQUIRED = (
    "in_proj.weight", "conv1d.weight", "x_proj.weight", "dt_proj.weight", "dt_proj.bias", "A_log", "D",
    "out_proj.weight",
)  # fmt: skip
OPTIONAL = ("in_proj.bias", "conv1d.bias", "out_proj.bias")
STATE = StateSpec({"conv": ("width - 1", "d_inner"), "ssm": ("d_inner", "d_state")}, None)
ROWS = 1024  # steps that go through the block together, so that temporaries do not grow with n


class Sizes(NamedTuple):
    """The sizes of a Mamba block."""

    d_model: int
    d_inner: int
    width: int
    d_state: int
    dt_rank: int


@overload
def mamba(
    x: Array, params: Mapping[str, Array], /, *, state: State | None = None, return_state: Literal[False] = False,
    segments: Array | None = None, mask: Array | None = None, implementation: str = "auto",
) -> Array: ...  # fmt: skip
@overload
def mamba(
    x: Array, params: Mapping[str, Array], /, *, state: State | None = None, return_state: Literal[True],
    segments: Array | None = None, mask: Array | None = None, implementation: str = "auto",
) -> tuple[Array, State]: ...  # fmt: skip
def mamba(
    x: Array,
    params: Mapping[str, Array],
    /,
    *,
    state: State | None = None,
    return_state: bool = False,
    segments: Array | None = None,
    mask: Array | None = None,
    implementation: str = "auto",
) -> Any:
    """Compute a Mamba block, a pure function of its input and of parameters with the keys of a checkpoint.

        u, z = in_proj(x)
        u ← silu(causal_conv1d(u))
        delta, B, C = x_proj(u),    delta ← dt_proj.weight delta
        y = selective_scan(u, softplus(delta + dt_proj.bias), −exp(A_log), B, C, D) silu(z)
        out = out_proj(y)

    Parameters
    ----------
    x : array, shape (..., n, d_model)
        Input sequence, of a real floating dtype. The norm and the residual connection around a
        block are not part of it.
    params : mapping of str to array
        The parameters, of the library of `x`; W are matrices of (outputs, inputs):

        =================== ===================================== ==========================
        key                 shape
        =================== ===================================== ==========================
        in_proj.weight      (2 d_inner, d_model)                  W of u, then that of z
        conv1d.weight       (d_inner, 1, width)                   the taps of each channel
        conv1d.bias         (d_inner,)                            optional
        x_proj.weight       (dt_rank + 2 d_state, d_inner)        W of delta, of B, of C
        dt_proj.weight      (d_inner, dt_rank)
        dt_proj.bias        (d_inner,)                            before softplus
        A_log               (d_inner, d_state)                    A = −exp(A_log)
        D                   (d_inner,)                            skip connection
        out_proj.weight     (d_model, d_inner)
        in_proj.bias        (2 d_inner,)                          optional
        out_proj.bias       (d_model,)                            optional
        =================== ===================================== ==========================
    state : dict of array, optional
        What an earlier call returned: "conv" (..., width - 1, d_inner), the last inputs of the convolution, and "ssm"
        (..., d_inner, d_state), the state of the scan. Default: zeros.
    return_state : bool, default False
        Return (out, state) instead of out.
    segments : array of int, shape (..., n), optional
        Numbers of documents: both states start anew before a step whose number differs from that of the step before.
    mask : array of bool, shape (..., n), optional
        False for a padded step, which leaves both states as they are and gives 0.
    implementation : str, default "auto"
        "auto", "generic", or the name of an override of both kernels, `causal_conv1d` and `selective_scan`.

    Returns
    -------
    out : array, shape (..., n, d_model)
        The output, in the dtype and on the device of `x`.
    state : dict of array
        Only with `return_state`: as the `state` of the next call, of any number of tokens, it continues the sequence.

    Raises
    ------
    TypeError
        For inputs that are not arrays of one library with a real floating dtype, or a `state` that is no dict.
    ValueError
        If a key of `params` or `state` is missing or unknown, or shapes or devices do not fit; the message names it.

    See Also
    --------
    init_mamba : Draw the parameters.
    check_mamba : Tell what a framework's own initialisation has broken in them.
    selective_scan : The scan of the block.
    causal_conv1d : The convolution of the block.

    Notes
    -----
    The parameters are those of ``Mamba`` of mamba-ssm and of ``MambaMixer`` of transformers: a layer's part of a
    state_dict, its prefix cut off, works as it is. The four matrix products take most of the time. The sequence goes
    through the block 1024 steps at a time, so that temporaries do not grow with n. float16 and bfloat16 are computed in
    float32. Kernels: `causal_conv1d`, `selective_scan`.

    References
    ----------
    .. [1] A. Gu, T. Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023, section 3.4.

    Examples
    --------
    A sequence in one call, and token by token:

    >>> import numpy as np, subquad
    >>> params = subquad.init_mamba(16, like=np.ones(1))
    >>> x = np.random.default_rng(0).standard_normal((2, 10, 16))
    >>> out, state = subquad.mamba(x, params), None
    >>> for t in range(10):
    ...     token, state = subquad.mamba(x[:, t : t + 1], params, state=state, return_state=True)
    >>> bool(np.allclose(token[:, 0], out[:, -1]))
    True
    """
    given = take_parameters(params, REQUIRED, OPTIONAL)
    before = {} if state is None else STATE.check("state", state)
    arrays = (x, *given.values(), *(before.get(f"state[{name!r}]") for name in STATE.fields))
    form = form_of("mamba", arrays, lambda: checked_form(x, given, before))
    return_state = check_flag("return_state", return_state)
    *batch, n, _ = form.shape_of(0)
    time = timeline("x", x, tuple(batch), n, segments=segments, mask=mask, xp=form.xp)
    xp, entered = form.xp, form.enter(arrays)
    x, *weights, conv, ssm = entered
    p: dict[str, Any] = dict(zip(given, weights, strict=True))
    sizes = _sizes(p)
    flags = [None if a is None else xp.expand_dims(a, axis=-1) for a in (time.resets, time.mask)]
    with form.computing(x):
        if conv is None or ssm is None:
            conv = xp.zeros((x.shape[0], sizes.width - 1, sizes.d_inner), dtype=x.dtype, device=place_of(x))
            ssm = xp.zeros((x.shape[0], sizes.d_inner, sizes.d_state), dtype=x.dtype, device=place_of(x))
        if n == 1 and implementation == "auto" and time.resets is None and time.mask is None:
            out, conv, ssm = mamba_step(
                x[:, 0, :], None, p["in_proj.weight"], p["in_proj.bias"], p["conv1d.weight"][:, 0, :], p["conv1d.bias"],
                p["x_proj.weight"], p["dt_proj.weight"], p["dt_proj.bias"], p["A_log"], p["D"], p["out_proj.weight"],
                p["out_proj.bias"], conv, ssm, eps=0.0,
            )  # fmt: skip
            out = form.leave(0, out)
            return (out, {"conv": form.leave(1, conv), "ssm": form.leave(2, ssm)}) if return_state else out
        x, A = time.filled(x), -xp.exp(p["A_log"])
        W_u, W_z = p["in_proj.weight"][: sizes.d_inner, :], p["in_proj.weight"][sizes.d_inner :, :]
        b_u, b_z = (None, None) if p["in_proj.bias"] is None else _halves(p["in_proj.bias"], sizes.d_inner)
        taps, product = p["conv1d.weight"][:, 0, :], partial(project, implementation=implementation)

        def advance(carry: Any, x: Array, resets: Any, mask: Any) -> tuple[Any, Array]:
            conv, ssm = carry
            resets, mask = (None if a is None else a[..., 0] for a in (resets, mask))
            u, z = product(x, W_u, b_u), product(x, W_z, b_z)
            u, conv = convolve(xp, u, taps, p["conv1d.bias"], conv, resets, mask, implementation)
            low = product(u, p["x_proj.weight"])
            delta = product(low[..., : sizes.dt_rank], p["dt_proj.weight"])
            B, C = (xp.expand_dims(a, axis=-2) for a in _halves(low[..., sizes.dt_rank :], sizes.d_state))
            if mask is not None:  # softplus(−∞ + bias) = 0: the state stays as it is
                delta = xp.where(mask[..., None], delta, -math.inf)
            y, ssm = scan_kernel(
                u, delta, A, B, C, p["D"], z, p["dt_proj.bias"], ssm, resets,
                delta_softplus=True, reverse=False, implementation=implementation,
            )  # fmt: skip
            return (conv, ssm), product(y, p["out_proj.weight"], p["out_proj.bias"])

        (conv, ssm), out = fold_blocks(advance, (conv, ssm), [x, *flags], ROWS, xp=xp)
        assert out is not None
        out = time.filled(out)
    out = form.leave(0, out)
    return (out, {"conv": form.leave(1, conv), "ssm": form.leave(2, ssm)}) if return_state else out


def _halves(x: Array, first: int) -> tuple[Array, Array]:
    """The first numbers of the last axis, and the others."""
    return x[..., :first], x[..., first:]


def _sizes(params: Mapping[str, Any]) -> Sizes:
    d_inner, _, width = params["conv1d.weight"].shape
    d_state, dt_rank = params["A_log"].shape[1], params["dt_proj.weight"].shape[1]
    return Sizes(params["in_proj.weight"].shape[1], d_inner, width, d_state, dt_rank)


def shapes_of(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """The shape of each parameter of a block."""
    d_model, d_inner, width, d_state, dt_rank = sizes
    return {
        "in_proj.weight": (2 * d_inner, d_model),
        "conv1d.weight": (d_inner, 1, width),
        "x_proj.weight": (dt_rank + 2 * d_state, d_inner),
        "dt_proj.weight": (d_inner, dt_rank),
        "dt_proj.bias": (d_inner,),
        "A_log": (d_inner, d_state),
        "D": (d_inner,),
        "out_proj.weight": (d_model, d_inner),
        "in_proj.bias": (2 * d_inner,),
        "conv1d.bias": (d_inner,),
        "out_proj.bias": (d_model,),
    }


def check_parameters(params: Mapping[str, Array | None]) -> Sizes:
    """The sizes of parameters whose keys are checked; ValueError unless all shapes fit."""
    for name, axes in (("in_proj.weight", 2), ("conv1d.weight", 3), ("dt_proj.weight", 2), ("A_log", 2)):
        x = params[name]
        assert x is not None
        if x.ndim != axes or 0 in x.shape:
            msg = f"params[{name!r}] has shape {tuple(x.shape)}, expected {axes} axes, none of length 0"
            raise ValueError(msg)
    sizes = _sizes(params)
    why = (
        f"d_model = {sizes.d_model} as in_proj.weight has, d_inner = {sizes.d_inner} and width = {sizes.width} as "
        f"conv1d.weight, d_state = {sizes.d_state} as A_log, dt_rank = {sizes.dt_rank} as dt_proj.weight"
    )
    check_shapes(params, shapes_of(sizes), why)
    return sizes


def checked_form(x: Array, params: Mapping[str, Array | None], state: Mapping[str, Array]) -> Form:
    """The form of a call, after checks of its arrays."""
    xp = check_block(x, params, state)
    sizes = check_parameters(params)
    tails = {"conv": (sizes.width - 1, sizes.d_inner), "ssm": (sizes.d_inner, sizes.d_state)}
    return block_form(xp, x, params, state, sizes.d_model, "in_proj.weight", tails)
