"""The Mamba-2 block (Dao & Gu, 2024, figure 6): projection, convolution, scan by heads, gated norm, projection."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from functools import partial
from types import ModuleType
from typing import Any, Literal, NamedTuple, overload

from subquad.backend import Array
from subquad.blocks.form import block_form, check_block
from subquad.blocks.parameters import check_shapes, convolve, project, take_parameters
from subquad.core.beside import place_of
from subquad.core.block_loop import fold_blocks
from subquad.core.checks import check_count, check_flag, check_positive
from subquad.core.states import State, StateSpec
from subquad.kernels.outer_scan import outer_scan
from subquad.kernels.selective_scan import skip_and_gate, step_sizes
from subquad.scans.call import Form, check_limits, form_of
from subquad.scans.timeline import timeline

REQUIRED = ("in_proj.weight", "conv1d.weight", "dt_bias", "A_log", "D", "out_proj.weight")
OPTIONAL = ("norm.weight", "in_proj.bias", "conv1d.bias", "out_proj.bias")
STATE = StateSpec({"conv": ("width - 1", "d_inner + 2 groups d_state"), "ssm": ("heads", "p", "d_state")}, None)
ROWS = 1024  # steps that go through the block together, so that temporaries do not grow with n


class Sizes(NamedTuple):
    """The sizes of a Mamba-2 block."""

    d_model: int
    d_inner: int
    width: int
    groups: int
    d_state: int
    heads: int


@overload
def mamba2(
    x: Array, params: Mapping[str, Array], /, *, groups: int = 1, delta_limits: tuple[float, float] | None = None,
    norm_eps: float = 1e-5, norm_before_gate: bool = False, state: State | None = None,
    return_state: Literal[False] = False, segments: Array | None = None, mask: Array | None = None,
    implementation: str = "auto",
) -> Array: ...  # fmt: skip
@overload
def mamba2(
    x: Array, params: Mapping[str, Array], /, *, groups: int = 1, delta_limits: tuple[float, float] | None = None,
    norm_eps: float = 1e-5, norm_before_gate: bool = False, state: State | None = None, return_state: Literal[True],
    segments: Array | None = None, mask: Array | None = None, implementation: str = "auto",
) -> tuple[Array, State]: ...  # fmt: skip
def mamba2(
    x: Array, params: Mapping[str, Array], /, *, groups: int = 1, delta_limits: tuple[float, float] | None = None,
    norm_eps: float = 1e-5, norm_before_gate: bool = False, state: State | None = None, return_state: bool = False,
    segments: Array | None = None, mask: Array | None = None, implementation: str = "auto",
) -> Any:  # fmt: skip
    """Compute a Mamba-2 block, a pure function of its input and of parameters with the keys of a checkpoint.

        z, u, delta = in_proj(x)
        u, B, C = silu(causal_conv1d(u))
        y = ssd(u, softplus(delta + dt_bias), −exp(A_log), B, C, D)
        out = out_proj(norm.weight ∘ rms_norm(y silu(z)))

    Parameters
    ----------
    x : array, shape (..., n, d_model)
        Input sequence, of a real floating dtype. The norm and the residual connection around a
        block are not part of it.
    params : mapping of str to array
        The parameters, of the library of `x`; W are matrices of (outputs, inputs), and conv_dim is d_inner + 2 groups
        d_state:

        =================== ===================================== ==========================
        key                 shape
        =================== ===================================== ==========================
        in_proj.weight      (d_inner + conv_dim + heads, d_model) W of z, of u, B, C, of delta
        conv1d.weight       (conv_dim, 1, width)                  the taps of each channel
        conv1d.bias         (conv_dim,)                           optional
        dt_bias             (heads,)                              before softplus
        A_log               (heads,)                              A = −exp(A_log)
        D                   (heads,) or (d_inner,)                skip connection
        norm.weight         (d_inner,)                            optional: no norm without it
        out_proj.weight     (d_model, d_inner)
        in_proj.bias        (d_inner + conv_dim + heads,)         optional
        out_proj.bias       (d_model,)                            optional
        =================== ===================================== ==========================
    groups : int, default 1
        Number of groups of heads that share B and C, and of groups of channels that are normalised together.
    delta_limits : (float, float), optional
        The step sizes are clipped to this range, after softplus.
    norm_eps : float, default 1e-5
        Added to the mean square in the norm.
    norm_before_gate : bool, default False
        Normalise y first and multiply by silu(z) then.
    state : dict of array, optional
        What an earlier call returned: "conv" (..., width - 1, conv_dim), the last inputs of the convolution, and "ssm"
        (..., heads, p, d_state), the state of the scan. Default: zeros.
    return_state : bool, default False
        Return (out, state) instead of out.
    segments : array of int, shape (..., n), optional
        Numbers of documents: both states start anew before a step whose number differs from that of the step before.
    mask : array of bool, shape (..., n), optional
        False for a padded step, which leaves both states as they are and gives 0.
    implementation : str, default "auto"
        "auto", "generic", or the name of an override of both kernels, `causal_conv1d` and `outer_scan`.

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
        If a key of `params` or `state` is missing or unknown, or shapes, `groups` or devices do not fit; the message
        names it.

    See Also
    --------
    init_mamba2 : Draw the parameters.
    ssd : The scan of the block.
    causal_conv1d : The convolution of the block.
    mamba : The first version.

    Notes
    -----
    The parameters are those of ``Mamba2`` of mamba-ssm and of ``Mamba2Mixer`` of transformers: a layer's part of a
    state_dict, its prefix cut off, works as it is, with `groups` as the model has it. The sequence goes through the
    block 1024 steps at a time, so that temporaries do not grow with n. float16 and bfloat16 are computed in float32.
    Kernels: `causal_conv1d`, `outer_scan`.

    References
    ----------
    .. [1] T. Dao, A. Gu, "Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State
       Space Duality", 2024, section 7.

    Examples
    --------
    A sequence in one call, and token by token:

    >>> import numpy as np, subquad
    >>> params = subquad.init_mamba2(16, d_state=8, headdim=4, like=np.ones(1))
    >>> x = np.random.default_rng(0).standard_normal((2, 10, 16))
    >>> out, state = subquad.mamba2(x, params), None
    >>> for t in range(10):
    ...     token, state = subquad.mamba2(x[:, t : t + 1], params, state=state, return_state=True)
    >>> bool(np.allclose(token[:, 0], out[:, -1]))
    True
    """
    given = take_parameters(params, REQUIRED, OPTIONAL)
    before = {} if state is None else STATE.check("state", state)
    groups, limits = check_count("groups", groups), check_limits(delta_limits)
    eps, first = check_positive("norm_eps", norm_eps), check_flag("norm_before_gate", norm_before_gate)
    arrays = (x, *given.values(), *(before.get(f"state[{name!r}]") for name in STATE.fields))
    form = form_of(f"mamba2 {groups}", arrays, lambda: _form(x, given, before, groups))
    return_state = check_flag("return_state", return_state)
    *batch, n, _ = form.shape_of(0)
    time = timeline("x", x, tuple(batch), n, segments=segments, mask=mask, xp=form.xp)
    xp, (x, *weights, conv, ssm) = form.xp, form.enter(arrays)
    p: dict[str, Any] = dict(zip(given, weights, strict=True))
    sizes = _sizes(p, groups)
    flags = [None if a is None else xp.expand_dims(a, axis=-1) for a in (time.resets, time.mask)]
    with form.computing(x):
        x, A = time.filled(x), -xp.exp(p["A_log"])
        parts, product = _parts(p, sizes), partial(project, implementation=implementation)
        taps, D = p["conv1d.weight"][:, 0, :], xp.reshape(p["D"], (sizes.heads, -1))

        def advance(carry: Any, x: Array, resets: Any, mask: Any) -> tuple[Any, Array]:
            conv, ssm = carry
            resets, mask = (None if a is None else a[..., 0] for a in (resets, mask))
            z, u, delta = (product(x, weight, bias) for weight, bias in parts)
            u, conv = convolve(xp, u, taps, p["conv1d.bias"], conv, resets, mask, implementation)
            delta = step_sizes(xp, delta, p["dt_bias"], True, limits)
            if mask is not None:
                delta = xp.where(mask[..., None], delta, 0.0)
            y, ssm = _scan(xp, sizes, u, delta, A, D, ssm, resets, implementation)
            y = gated_norm(xp, y, z, p["norm.weight"], groups=groups, eps=eps, norm_before_gate=first)
            return (conv, ssm), product(y, p["out_proj.weight"], p["out_proj.bias"])

        conv, ssm = _start(xp, x, sizes, conv, ssm)
        (conv, ssm), out = fold_blocks(advance, (conv, ssm), [x, *flags], ROWS, xp=xp)
        assert out is not None
        out, ssm = time.filled(out), xp.matrix_transpose(ssm)
    out = form.leave(0, out)
    return (out, {"conv": form.leave(1, conv), "ssm": form.leave(2, ssm)}) if return_state else out


def gated_norm(
    xp: ModuleType, y: Array, z: Array, weight: Array | None, *, groups: int, eps: float, norm_before_gate: bool
) -> Array:
    """weight ∘ y silu(z) / √(mean square of y silu(z) + eps) over each group of channels; no norm without a weight.

    With `norm_before_gate`, weight ∘ y / √(mean square of y + eps) · silu(z).
    """
    if weight is None or not norm_before_gate:
        y = skip_and_gate(xp, y, y, None, z)
    if weight is None:
        return y
    shape = tuple(y.shape)
    parts = xp.reshape(y, (*shape[:-1], groups, shape[-1] // groups))
    parts = parts / xp.sqrt(xp.mean(parts * parts, axis=-1, keepdims=True) + eps)
    y = xp.reshape(parts, shape) * weight
    return skip_and_gate(xp, y, y, None, z) if norm_before_gate else y


def _scan(
    xp: ModuleType, sizes: Sizes, u: Array, delta: Array, A: Array, D: Array, state: Array, resets: Array | None,
    implementation: str,
) -> tuple[Array, Array]:  # fmt: skip
    """(y (batch, n, d_inner), last state) of the outputs of the convolution, as `ssd` computes them."""
    (batch, n, _), (_, d_inner, _, groups, d_state, heads) = u.shape, sizes
    maps = groups * d_state
    x = xp.reshape(u[..., :d_inner], (batch, n, heads, d_inner // heads))
    B = xp.reshape(u[..., d_inner : d_inner + maps], (batch, n, groups, d_state))
    C = xp.reshape(u[..., d_inner + maps :], (batch, n, groups, d_state))
    g = xp.expand_dims(delta * A, axis=-1)
    y, state = outer_scan(
        C, B, x, g, delta, None, D, state, resets, scale=1.0, reverse=False, implementation=implementation
    )
    return xp.reshape(y, (batch, n, d_inner)), state


def _start(xp: ModuleType, x: Array, sizes: Sizes, conv: Array | None, ssm: Array | None) -> tuple[Array, Array]:
    """The states before the first step, that of the scan as its kernel has it."""
    if conv is not None and ssm is not None:
        return conv, xp.matrix_transpose(ssm)
    batch, (_, d_inner, width, groups, d_state, heads) = x.shape[0], sizes
    shapes = (batch, width - 1, d_inner + 2 * groups * d_state), (batch, heads, d_state, d_inner // heads)
    conv, ssm = (xp.zeros(shape, dtype=x.dtype, device=place_of(x)) for shape in shapes)
    return conv, ssm


def _parts(params: Mapping[str, Any], sizes: Sizes) -> list[tuple[Array, Array | None]]:
    """Weight and bias of z, of the input of the convolution, and of delta."""
    weight, bias = params["in_proj.weight"], params["in_proj.bias"]
    ends = (0, sizes.d_inner, weight.shape[0] - sizes.heads, weight.shape[0])
    spans = [slice(*span) for span in itertools.pairwise(ends)]
    return [(weight[span, :], None if bias is None else bias[span]) for span in spans]


def _sizes(params: Mapping[str, Any], groups: int) -> Sizes:
    (d_model, d_inner), (conv_dim, _, width) = params["out_proj.weight"].shape, params["conv1d.weight"].shape
    return Sizes(d_model, d_inner, width, groups, (conv_dim - d_inner) // (2 * groups), params["dt_bias"].shape[0])


def shapes_of(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """The shape of each parameter of a block."""
    d_model, d_inner, width, groups, d_state, heads = sizes
    conv_dim = d_inner + 2 * groups * d_state
    return {
        "in_proj.weight": (d_inner + conv_dim + heads, d_model),
        "conv1d.weight": (conv_dim, 1, width),
        "dt_bias": (heads,),
        "A_log": (heads,),
        "D": (heads,),
        "out_proj.weight": (d_model, d_inner),
        "norm.weight": (d_inner,),
        "in_proj.bias": (d_inner + conv_dim + heads,),
        "conv1d.bias": (conv_dim,),
        "out_proj.bias": (d_model,),
    }


def check_parameters(params: Mapping[str, Array | None], groups: int) -> Sizes:
    """The sizes of parameters whose keys are checked; ValueError unless all shapes and `groups` fit."""
    for name, axes in (("out_proj.weight", 2), ("conv1d.weight", 3), ("dt_bias", 1)):
        x = params[name]
        assert x is not None
        if x.ndim != axes or 0 in x.shape:
            msg = f"params[{name!r}] has shape {tuple(x.shape)}, expected {axes} axes, none of length 0"
            raise ValueError(msg)
    sizes = _sizes(params, groups)
    _, d_inner, width, _, d_state, heads = sizes
    if d_inner % heads or heads % groups or d_inner % groups:
        msg = (
            f"groups is {groups}, heads (length of dt_bias) {heads} and d_inner (rows of out_proj.weight) {d_inner}: "
            f"groups must divide heads, and heads d_inner"
        )
        raise ValueError(msg)
    why = (
        f"d_model = {sizes.d_model} and d_inner = {d_inner} as out_proj.weight has, heads = {heads} as dt_bias, width "
        f"= {width} as conv1d.weight, whose channels with groups = {groups} give d_state = {d_state}"
    )
    shapes = shapes_of(sizes)
    if params["D"] is not None and tuple(params["D"].shape) == (d_inner,):
        shapes["D"] = (d_inner,)
    if d_state < 1:
        msg = f"params['conv1d.weight'] has too few channels, expected d_inner + 2 groups d_state: {why}"
        raise ValueError(msg)
    check_shapes(params, shapes, why)
    return sizes


def _form(x: Array, params: Mapping[str, Array | None], state: Mapping[str, Array], groups: int) -> Form:
    """The form of a call, after checks of its arrays."""
    xp = check_block(x, params, state)
    d_model, d_inner, width, _, d_state, heads = check_parameters(params, groups)
    tails = {"conv": (width - 1, d_inner + 2 * groups * d_state), "ssm": (heads, d_inner // heads, d_state)}
    return block_form(xp, x, params, state, d_model, "out_proj.weight", tails)
