"""mamba_ssm and causal_conv1d by their published names: functions against loops in float64, caches, errors."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest

torch = pytest.importorskip("torch")
from torch.nn import functional  # noqa: E402

from subquad_torch.causal_conv1d import causal_conv1d_fn, causal_conv1d_update  # noqa: E402
from subquad_torch.causal_conv1d.causal_conv1d_interface import causal_conv1d_ref, causal_conv1d_update_ref  # noqa: E402
from subquad_torch.causal_conv1d.causal_conv1d_varlen import causal_conv1d_varlen_states  # noqa: E402
from subquad_torch.causal_conv1d.cpp_functions import (  # noqa: E402
    causal_conv1d_bwd_function,
    causal_conv1d_fwd_function,
)
from subquad_torch.mamba_ssm import mamba_inner_fn, selective_scan_fn  # noqa: E402
from subquad_torch.mamba_ssm.ops.selective_scan_interface import mamba_inner_ref, selective_scan_ref  # noqa: E402
from subquad_torch.mamba_ssm.ops.triton import layer_norm, layernorm_gated, ssd_combined  # noqa: E402
from subquad_torch.mamba_ssm.ops.triton.selective_state_update import (  # noqa: E402
    selective_state_update,
    selective_state_update_ref,
)
from subquad_torch.mamba_ssm.ops.triton.ssd_combined import (  # noqa: E402
    mamba_chunk_scan_combined,
    mamba_split_conv1d_scan_combined,
)

Tensor = Any
EXACT = {"rtol": 1e-9, "atol": 1e-11}  # of float64, over some tens of steps


def randn(*shape: int, seed: int = 0, dtype: Any = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def clone(*tensors: Tensor) -> list[Tensor]:
    return [None if x is None else x.detach().clone().requires_grad_() for x in tensors]


# --- definitions: one step after another ----------------------------------------------------------------------------


def scan_loop(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """(out, last state) of u (batch, dim, seqlen), for Δ as it is and B, C (batch, dim, dstate, seqlen)."""
    h, outs = torch.zeros(*u.shape[:2], A.shape[1], dtype=A.dtype), []
    for t in range(u.shape[2]):
        step = delta[:, :, t, None]
        h = torch.exp(step * A) * h + step * B[..., t] * u[:, :, t, None]
        y = (h * C[..., t]).sum(-1)
        outs.append(2 * y.real if y.is_complex() else y)
    out = torch.stack(outs, dim=-1)
    out = out if D is None else out + D[:, None] * u
    return out if z is None else out * functional.silu(z), h


def ssd_loop(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor, seq_idx: Any = None) -> Any:
    """(out, states after each step) of x (batch, seqlen, nheads, headdim), for Δ as it is."""
    heads = x.shape[2] // B.shape[2]
    B, C = (m.repeat_interleave(heads, dim=2) for m in (B, C))
    outs, states = [], []
    for t in range(x.shape[1]):
        if seq_idx is not None and t:
            h = torch.where((seq_idx[:, t] == seq_idx[:, t - 1])[:, None, None, None], h, 0.0)
        step = dt[:, t, :, None, None]
        h = torch.exp(step * A[:, None, None]) * h + step * x[:, t, :, :, None] * B[:, t, :, None, :]
        outs.append((h * C[:, t, :, None, :]).sum(-1))
        states.append(h)
    return torch.stack(outs, dim=1), states


def conv_loop(x: Tensor, weight: Tensor, bias: Tensor, before: Tensor | None = None) -> Tensor:
    width = weight.shape[1]
    before = x.new_zeros(*x.shape[:2], width - 1) if before is None else before
    padded = torch.cat([before, x], dim=-1)
    out = sum(weight[:, k, None] * padded[..., k : k + x.shape[-1]] for k in range(width))
    return out if bias is None else out + bias[:, None]


# --- selective scan -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [selective_scan_fn, selective_scan_ref])
@pytest.mark.parametrize("is_complex", [False, True])
@pytest.mark.parametrize("maps", ["constant", "steps", "groups"])
def test_selective_scan_is_the_loop(function: Any, is_complex: bool, maps: str) -> None:
    batch, dim, n, dstate, groups = 2, 4, 7, 3, 2
    u, delta, z = (randn(batch, dim, n, seed=i) for i in range(3))
    A = -torch.rand(dim, dstate, dtype=torch.float64)
    A = torch.complex(A, randn(dim, dstate)) if is_complex else A
    D, bias = randn(dim, seed=4), randn(dim, seed=5)
    last = n * (2 if is_complex else 1)
    shape = {"constant": (dim, dstate), "steps": (batch, dstate, last), "groups": (batch, groups, dstate, last)}[maps]
    B, C = (randn(*shape, seed=seed, dtype=A.dtype if maps == "constant" else torch.float64) for seed in (6, 7))
    given = clone(u, delta, A, B, C, D, z, bias)
    out, state = function(*given[:7], delta_bias=given[7], delta_softplus=True, return_last_state=True)

    twin = clone(u, delta, A, B, C, D, z, bias)
    wide = []
    for m in twin[3:5]:
        if maps != "constant" and is_complex:
            m = torch.complex(m[..., 0::2], m[..., 1::2])
        if maps == "constant":
            m = m[None, :, :, None].expand(batch, -1, -1, n)
        wide.append(
            m.repeat_interleave(dim // groups, dim=1) if maps == "groups" else m.expand(batch, dim, dstate, n)
            if m.ndim == 4 else m[:, None].expand(-1, dim, -1, -1)
        )  # fmt: skip
    steps = functional.softplus(twin[1] + twin[7][:, None])
    right, last_state = scan_loop(twin[0], steps, twin[2], *wide, twin[5], twin[6])
    torch.testing.assert_close(out, right, **EXACT)
    torch.testing.assert_close(state, last_state, **EXACT)
    for y in ((out, state), (right, last_state)):  # the state has a gradient too, which the original leaves out
        (y[0].sin().sum() + y[1].abs().square().sum()).backward()
    for x, other in zip(given, twin, strict=True):
        torch.testing.assert_close(x.grad, other.grad, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes_are_those_of_the_original(dtype: Any) -> None:
    u = randn(2, 4, 6, dtype=dtype)
    out, state = selective_scan_fn(u, u.abs(), -torch.ones(4, 3), u[:, :3], u[:, :3], return_last_state=True)
    assert (out.dtype, state.dtype) == (dtype, torch.float32)
    x = randn(2, 6, 4, 3, dtype=dtype)
    dt, B = x[..., 0].float(), x[:, :, :1]
    out, state = mamba_chunk_scan_combined(x, dt, -torch.ones(4), B, B, 4, return_final_states=True)
    assert (out.dtype, state.dtype) == (dtype, torch.float32)
    out, state = causal_conv1d_fn(u, torch.ones(4, 3), return_final_states=True)
    assert (out.dtype, state.dtype, state.shape) == (dtype, dtype, (2, 4, 2))


@pytest.mark.parametrize("is_complex", [False, True])
@pytest.mark.parametrize("given", ["", "B", "BC"])
def test_mamba_inner_is_its_parts(is_complex: bool, given: str) -> None:
    batch, dim, n, dstate, rank, d_model = 2, 6, 9, 4, 2, 5
    dtype = torch.complex128 if is_complex else torch.float64
    per_map = dstate * (2 if is_complex else 1)
    A = -torch.rand(dim, dstate, dtype=torch.float64)
    A = torch.complex(A, randn(dim, dstate)) if is_complex else A
    B, C = (randn(dim, dstate, seed=i, dtype=dtype) if name in given else None for i, name in enumerate("BC", 1))
    xz, taps, shift = randn(batch, 2 * dim, n), randn(dim, 1, 3), randn(dim)
    x_proj = randn(rank + per_map * (2 - len(given)), dim) / 3
    dt_proj, out_proj, out_bias = randn(dim, rank), randn(d_model, dim), randn(d_model)
    B_bias, C_bias = (None if name in given else randn(per_map, seed=9) for name in "BC")
    D, bias = randn(dim), randn(dim, seed=3)
    arguments = (xz, taps, shift, x_proj, dt_proj, out_proj, out_bias, A, B, C, D, bias, B_bias, C_bias)
    out = mamba_inner_fn(*arguments)
    torch.testing.assert_close(mamba_inner_ref(*arguments), out, **EXACT)

    x, z = xz.chunk(2, dim=1)
    x = functional.silu(conv_loop(x, taps[:, 0], shift))
    low = torch.einsum("rd,bdn->brn", x_proj, x)
    delta = functional.softplus(torch.einsum("dr,brn->bdn", dt_proj, low[:, :rank]) + bias[:, None])
    maps, rest = [], low[:, rank:]
    for m, b in ((B, B_bias), (C, C_bias)):
        if m is None:
            m, rest = rest[:, :per_map] + b[:, None], rest[:, per_map:]
            m = torch.complex(m[:, 0::2], m[:, 1::2]) if is_complex else m
            maps.append(m[:, None].expand(-1, dim, -1, -1))
        else:
            maps.append(m[None, :, :, None].expand(batch, -1, -1, n))
    right = torch.einsum("md,bdn->bnm", out_proj, scan_loop(x, delta, A, *maps, D, z)[0]) + out_bias
    torch.testing.assert_close(out, right, **EXACT)


def test_mamba_inner_norms() -> None:
    dim, dstate, rank = 4, 3, 2
    arguments = (
        randn(2, 8, 5), randn(dim, 1, 2), None, randn(rank + 2 * dstate, dim), randn(dim, rank), torch.eye(dim).double(),
        None, -torch.rand(dim, dstate, dtype=torch.float64),
    )  # fmt: skip
    weights = {"b_rms_weight": randn(dstate), "c_rms_weight": randn(dstate, seed=1), "dt_rms_weight": randn(dim)}
    out = mamba_inner_fn(*arguments, **weights, b_c_dt_rms_eps=1e-3)
    xz, taps, _, x_proj, dt_proj, _, _, A = arguments
    x, z = xz.chunk(2, dim=1)
    x = functional.silu(conv_loop(x, taps[:, 0], None))
    low = x.mT @ x_proj.mT
    parts = [low[..., rank : rank + dstate], low[..., rank + dstate :], low[..., :rank] @ dt_proj.mT]
    B, C, dt = (
        (p / (p.square().mean(-1, keepdim=True) + 1e-3).sqrt() * w).mT
        for p, w in zip(parts, weights.values(), strict=True)
    )
    maps = [m[:, None].expand(-1, dim, -1, -1) for m in (B, C)]
    right, _ = scan_loop(x, functional.softplus(dt), A, *maps, None, z)
    torch.testing.assert_close(out, right.mT, **EXACT)


@pytest.mark.parametrize("function", [selective_state_update, selective_state_update_ref])
@pytest.mark.parametrize("form", ["channels", "heads", "tied"])
def test_state_update_is_a_step_of_the_loop(function: Any, form: str) -> None:
    batch, heads, dim, dstate, groups = 3, 4, 5, 6, 2
    lead = () if form == "channels" else (heads,)
    state, x, z = randn(batch, *lead, dim, dstate), randn(batch, *lead, dim), randn(batch, *lead, dim, seed=1)
    dt, A, bias = (
        randn(batch, *lead, dim, seed=2),
        -torch.rand(*lead, dim, dstate, dtype=torch.float64),
        randn(*lead, dim),
    )
    if form == "tied":
        dt, bias = dt[..., :1].expand(-1, -1, dim), bias[:, :1].expand(-1, dim)
        A = A[:, :1, :1].expand(-1, dim, dstate)
    B, C = (randn(*((batch, dstate) if form == "channels" else (batch, groups, dstate)), seed=i) for i in (3, 4))
    D, before = randn(*lead, dim, seed=5), state.clone()
    out = function(state, x, dt, A, B, C, D, z=z, dt_bias=bias, dt_softplus=True)
    B, C = (m if form == "channels" else m.repeat_interleave(heads // groups, dim=1) for m in (B, C))
    step = functional.softplus(dt + bias)[..., None]
    after = torch.exp(step * A) * before + step * B[..., None, :] * x[..., None]
    right = ((after * C[..., None, :]).sum(-1) + D * x) * functional.silu(z)
    torch.testing.assert_close(state, after, **EXACT)
    torch.testing.assert_close(out, right, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_update_of_entries(dtype: Any) -> None:
    """Entries of a cache, in an order of their own; a negative one is padding."""
    cache, x, A = randn(7, 4, 3, dtype=dtype), randn(3, 4, dtype=dtype), -torch.ones(4, 3)
    B, before = randn(3, 3, dtype=dtype), cache.clone()
    out = selective_state_update(cache, x, x, A, B, B, state_batch_indices=torch.tensor([5, -1, 2], dtype=torch.int32))
    alone = before[[5, 2]]
    right = selective_state_update(alone, x[[0, 2]], x[[0, 2]], A, B[[0, 2]], B[[0, 2]])
    assert torch.equal(out[[0, 2]], right)
    assert torch.equal(cache[[5, 2]], alone)
    assert not out[1].any()
    untouched = [0, 1, 3, 4, 6]
    assert torch.equal(cache[untouched], before[untouched])


# --- convolution ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [causal_conv1d_fn, causal_conv1d_ref])
@pytest.mark.parametrize("n", [1, 2, 9])
def test_convolution_is_the_sum(function: Any, n: int) -> None:
    given = clone(randn(2, 5, n), randn(5, 4), randn(5), randn(2, 5, 3, seed=1))
    x, weight, bias, before = given
    out, last = function(x, weight, bias, initial_states=before, return_final_states=True, activation="silu")
    twin = clone(*given)
    right = functional.silu(conv_loop(*twin))
    last_right = torch.cat([twin[3], twin[0]], dim=-1)[..., -3:]
    torch.testing.assert_close(out, right, **EXACT)
    torch.testing.assert_close(last, last_right, **EXACT)
    for y, state in ((out, last), (right, last_right)):
        (y.sin().sum() + state.square().sum()).backward()
    for a, b in zip(given, twin, strict=True):
        torch.testing.assert_close(a.grad, b.grad, **EXACT)


def test_convolution_of_documents_and_padding() -> None:
    x, weight, bias = randn(1, 3, 10), randn(3, 4), randn(3)
    seq_idx = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, -1, -1]], dtype=torch.int32)
    out = causal_conv1d_fn(x, weight, bias, seq_idx=seq_idx, activation="swish")
    for first, end in ((0, 3), (3, 8)):
        alone = causal_conv1d_fn(x[..., first:end], weight, bias, activation="silu")
        torch.testing.assert_close(out[..., first:end], alone, **EXACT)
    assert not out[..., 8:].any()
    x[..., 8:] = math.nan
    assert torch.equal(causal_conv1d_fn(x, weight, bias, seq_idx=seq_idx, activation="swish"), out)


def test_final_states_are_written() -> None:
    x, held = randn(2, 3, 6), torch.full((2, 3, 2), math.nan, dtype=torch.float64)
    _, last = causal_conv1d_fn(x, randn(3, 3), return_final_states=True, final_states_out=held)
    assert last is held
    assert torch.equal(held, x[..., -2:])


@pytest.mark.parametrize("function", [causal_conv1d_update, causal_conv1d_update_ref])
@pytest.mark.parametrize("places", [3, 5, 8])
@pytest.mark.parametrize("chunk", [1, 2, 7])
@pytest.mark.parametrize("ring", [False, True])
def test_updates_are_the_whole(function: Any, places: int, chunk: int, ring: bool) -> None:
    x, weight, bias = randn(2, 4, 14), randn(4, 4), randn(4)
    whole, cache = causal_conv1d_fn(x, weight, bias, activation="silu"), torch.zeros(2, 4, places, dtype=torch.float64)
    seen, outs = torch.zeros(2, dtype=torch.int32), []
    for part in x.split(chunk, dim=-1):
        token = part[..., 0] if chunk == 1 else part
        outs.append(function(token, cache, weight, bias, "silu", seen if ring else None).reshape(2, 4, -1))
        seen += part.shape[-1]
    torch.testing.assert_close(torch.cat(outs, dim=-1), whole, **EXACT)
    at = torch.arange(14 - places, 14)
    assert torch.equal(cache[..., at % places] if ring else cache, x[..., at])


def test_updates_of_entries() -> None:
    cache, x, weight = randn(6, 3, 4), randn(3, 3, 2), randn(3, 4)
    before, entries = cache.clone(), torch.tensor([4, -1, 1], dtype=torch.int32)
    out = causal_conv1d_update(x, cache, weight, conv_state_indices=entries)
    alone = before[[4, 1]]
    assert torch.equal(out[[0, 2]], causal_conv1d_update(x[[0, 2]], alone, weight))
    assert torch.equal(cache[[4, 1]], alone)
    assert not out[1].any()
    assert torch.equal(cache[[0, 2, 3, 5]], before[[0, 2, 3, 5]])


def test_states_of_packed_sequences() -> None:
    x = randn(9, 2)
    states = causal_conv1d_varlen_states(x, torch.tensor([0, 1, 1, 9]), 3)
    assert torch.equal(states[0], torch.cat([torch.zeros(2, 2).double(), x[:1].mT], dim=1))
    assert not states[1].any()
    assert torch.equal(states[2], x[6:].mT)


def test_gradients_as_a_function() -> None:
    x, weight, bias, before = clone(randn(2, 3, 6), randn(3, 3), randn(3), randn(2, 3, 2))
    out, last = causal_conv1d_fn(x, weight, bias, None, before, True, None, "silu")
    dout, dlast = torch.ones_like(out), torch.ones_like(last)
    right = torch.autograd.grad((out, last), (x, weight, bias, before), (dout, dlast))
    held = torch.empty(2, 3, 2, dtype=torch.float64)
    assert torch.equal(causal_conv1d_fwd_function(x, weight, bias, None, before, held, True), out)
    assert torch.equal(held, last)
    dx = torch.empty_like(x)
    found = causal_conv1d_bwd_function(x, weight, bias, dout, None, before, dlast, dx, True, True)
    assert found[0] is dx
    for a, b in zip(found, right, strict=True):
        torch.testing.assert_close(a, b, **EXACT)


# --- Mamba-2 --------------------------------------------------------------------------------------------------------


def drawn_ssd(n: int = 11) -> tuple[Tensor, ...]:
    """x, dt, A, B, C, D, z, dt_bias, initial_states: 4 heads of 3 channels, 2 groups, 5 states."""
    x, z, dt = randn(2, n, 4, 3), randn(2, n, 4, 3, seed=1), randn(2, n, 4, seed=2)
    B, C = randn(2, n, 2, 5, seed=3), randn(2, n, 2, 5, seed=4)
    return x, dt, -torch.rand(4, dtype=torch.float64), B, C, randn(4, 3), z, randn(4, seed=5), randn(2, 4, 3, 5, seed=6)


@pytest.mark.parametrize("chunk_size", [4, 256])
def test_chunk_scan_is_the_loop(chunk_size: int) -> None:
    seq_idx = torch.tensor([[0] * 5 + [1] * 6, [0] * 11], dtype=torch.int32)
    given = clone(*drawn_ssd())
    x, dt, A, B, C, D, z, bias, start = given
    out, final = mamba_chunk_scan_combined(
        x, dt, A, B, C, chunk_size, D, z, bias, start, seq_idx, dt_softplus=True, dt_limit=(0.2, 1.5),
        return_final_states=True,
    )  # fmt: skip
    twin = clone(*given)
    x, dt, A, B, C, D, z, bias, start = twin
    y, states = ssd_loop(x, functional.softplus(dt + bias).clamp(0.2, 1.5), A, B, C, start, seq_idx)
    right = (y + D * x) * functional.silu(z)
    torch.testing.assert_close(out, right, **EXACT)
    torch.testing.assert_close(final, states[-1], **EXACT)
    for pair in ((out, final), (right, states[-1])):
        (pair[0].sin().sum() + pair[1].square().sum()).backward()
    for a, b in zip(given, twin, strict=True):
        torch.testing.assert_close(a.grad, b.grad, **EXACT)


def test_default_limits_clip_negative_steps() -> None:
    x, dt, A, B, C, *_ = drawn_ssd()
    right, _ = ssd_loop(x, dt.clamp(min=0), A, B, C, torch.zeros(2, 4, 3, 5).double())
    torch.testing.assert_close(mamba_chunk_scan_combined(x, dt, A, B, C, 8), right, **EXACT)
    unclipped, _ = ssd_loop(x, dt, A, B, C, torch.zeros(2, 4, 3, 5).double())
    for function in (ssd_combined.mamba_chunk_scan, ssd_combined.ssd_chunk_scan_combined_ref):
        torch.testing.assert_close(function(x, dt, A, B, C, 8), unclipped, **EXACT)


def test_states_of_packed_sequences_of_mamba2() -> None:
    x, dt, A, B, C, D, *_ = (a[:1] if a.ndim > 2 else a for a in drawn_ssd(12))
    cuts = torch.tensor([0, 4, 4, 9, 11], dtype=torch.int32)  # an empty sequence, and padding behind the last
    seq_idx = torch.tensor([[0] * 4 + [1] * 5 + [2] * 2 + [-1]], dtype=torch.int32)
    out, final, packed = mamba_chunk_scan_combined(
        x, dt, A, B, C, 4, D, seq_idx=seq_idx, cu_seqlens=cuts, dt_softplus=True, return_final_states=True,
        return_varlen_states=True,
    )  # fmt: skip
    assert packed.shape == (4, 4, 3, 5)
    assert final.shape == (1, 4, 3, 5)
    for i, (first, end) in enumerate([(0, 4), (4, 4), (4, 9), (9, 11)]):
        if first == end:
            assert not packed[i].any()
            continue
        part = [a[:, first:end] for a in (x, dt, B, C)]
        y, state = mamba_chunk_scan_combined(
            part[0], part[1], A, part[2], part[3], 4, D, dt_softplus=True, return_final_states=True
        )
        torch.testing.assert_close(out[:, first:end], y, **EXACT)
        torch.testing.assert_close(packed[i], state[0], **EXACT)
    varlen = mamba_chunk_scan_combined(
        x, dt, A, B, C, 4, D, seq_idx=seq_idx, cu_seqlens=cuts, dt_softplus=True, return_varlen_states=True
    )[1]
    assert torch.equal(varlen, packed)


def test_selective_form_takes_steps_of_channels() -> None:
    x, dt, A, B, C, D, z, bias, _ = drawn_ssd()
    right = ssd_combined.mamba_chunk_scan(x, dt, A, B, C, 8, D, z, bias, True)
    wide = dt[..., None].expand(-1, -1, -1, 3), A.repeat_interleave(3)[:, None].expand(-1, 5)
    for steps, rates, b in ((dt, A, bias), (*wide, bias[:, None].expand(-1, 3))):
        out = ssd_combined.ssd_selective_scan(x, steps, rates, B, C, D, z, b, True)
        torch.testing.assert_close(out, right, **EXACT)


@pytest.mark.parametrize("norm_before_gate", [False, True])
@pytest.mark.parametrize("mlp", [0, 3])
def test_split_is_its_parts(norm_before_gate: bool, mlp: int) -> None:
    heads, headdim, groups, dstate, n = 4, 3, 2, 5, 8
    dim, conv_dim = heads * headdim, heads * headdim + 2 * groups * dstate
    zxbcdt, taps, shift = randn(2, n, 2 * mlp + dim + conv_dim + heads), randn(conv_dim, 4), randn(conv_dim)
    bias, A, D = randn(heads), -torch.rand(heads, dtype=torch.float64), randn(heads)
    weight, last, last_bias = randn(dim), randn(7, mlp + dim), randn(7)
    start = randn(2, heads, headdim, dstate)
    options = {"headdim": headdim, "ngroups": groups, "norm_before_gate": norm_before_gate, "rmsnorm_eps": 1e-3}
    out, final = mamba_split_conv1d_scan_combined(
        zxbcdt, taps, shift, bias, A, D, 16, start, return_final_states=True, rmsnorm_weight=weight,
        outproj_weight=last, outproj_bias=last_bias, **options,
    )  # fmt: skip
    z0, x0, z, xBC, dt = zxbcdt.split([mlp, mlp, dim, conv_dim, heads], dim=-1)
    u = functional.silu(conv_loop(xBC.mT, taps, shift)).mT
    x, B, C = u.split([dim, groups * dstate, groups * dstate], dim=-1)
    x = x.unflatten(-1, (heads, headdim))
    y, states = ssd_loop(
        x, functional.softplus(dt + bias), A, *(m.unflatten(-1, (groups, dstate)) for m in (B, C)), start
    )
    y, gate = (y + D[:, None] * x).flatten(-2), functional.silu(z)
    y = y if norm_before_gate else y * gate
    parts = y.unflatten(-1, (groups, -1))
    y = (parts / (parts.square().mean(-1, keepdim=True) + 1e-3).sqrt()).flatten(-2) * weight
    y = y * gate if norm_before_gate else y
    y = torch.cat([functional.silu(z0) * x0, y], dim=-1)
    torch.testing.assert_close(out, y @ last.mT + last_bias, **EXACT)
    torch.testing.assert_close(final, states[-1], **EXACT)
    if not mlp:
        plain = ssd_combined.mamba_split_conv1d_scan_ref(
            zxbcdt,
            taps,
            shift,
            bias,
            A,
            D,
            16,
            rmsnorm_weight=weight,
            outproj_weight=last,
            outproj_bias=last_bias,
            **options,
        )
        fused = mamba_split_conv1d_scan_combined(
            zxbcdt,
            taps,
            shift,
            bias,
            A,
            D,
            16,
            rmsnorm_weight=weight,
            outproj_weight=last,
            outproj_bias=last_bias,
            **options,
        )
        torch.testing.assert_close(plain, fused, **EXACT)
        right = mamba_split_conv1d_scan_combined(zxbcdt, taps, shift, bias, A, D, 16, headdim=headdim, ngroups=groups)
        gated = ssd_combined.mamba_conv1d_scan_ref(
            xBC, taps, shift, dt, A, 16, D, z, bias, True, headdim=headdim, ngroups=groups
        )
        torch.testing.assert_close(gated, right, **EXACT)


# --- norms ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rms", [False, True])
def test_norm_of_a_stream(rms: bool) -> None:
    x, x1, residual, w, b, w1 = (randn(*s, seed=i) for i, s in enumerate([(2, 3, 8)] * 3 + [(8,)] * 3))
    outs = layer_norm.layer_norm_fn(
        x, w, b, residual, x1, w1, eps=1e-3, prenorm=True, is_rms_norm=rms, dropout_p=0.4, return_dropout_mask=True
    )
    y, y1, stream, mask, mask1 = outs
    assert 0 < mask.double().mean() < 1
    right = torch.where(mask, x, 0.0) / 0.6 + torch.where(mask1, x1, 0.0) / 0.6 + residual
    torch.testing.assert_close(stream, right, **EXACT)
    centred = right if rms else right - right.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-3).sqrt()
    torch.testing.assert_close(y, normed * w + b, **EXACT)
    torch.testing.assert_close(y1, normed * w1, **EXACT)
    ref = layer_norm.rms_norm_ref if rms else layer_norm.layer_norm_ref
    plain = ref(x, w, b, residual, x1, w1, None, 1e-3, 0.4, prenorm=True, dropout_mask=mask, dropout_mask1=mask1)
    for a, right in zip((y, y1, stream), plain, strict=True):
        torch.testing.assert_close(a, right, **EXACT)


def test_dtype_of_the_stream() -> None:
    x, w, scale = randn(2, 8, dtype=torch.bfloat16), torch.ones(8), torch.tensor([2.0, 3.0])
    for residual, fp32, dtype in ((None, False, x.dtype), (None, True, torch.float32), (x, True, x.dtype)):
        y, stream = layer_norm.rms_norm_fn(x, w, None, residual, prenorm=True, residual_in_fp32=fp32)
        assert (y.dtype, stream.dtype) == (torch.bfloat16, dtype)
    _, stream = layer_norm.layer_norm_fn(x, w, None, rowscale=scale, prenorm=True, residual_in_fp32=True)
    assert torch.equal(stream, x.float() * scale[:, None])
    out = layer_norm.layer_norm_linear_fn(x.float(), w, None, torch.eye(8), None)
    assert torch.equal(out, layer_norm.layer_norm_fn(x.float(), w, None))


@pytest.mark.parametrize("norm_before_gate", [False, True])
@pytest.mark.parametrize("module", [layernorm_gated.LayerNorm, layernorm_gated.RMSNorm])
def test_gated_norm(module: Any, norm_before_gate: bool) -> None:
    x, z = randn(3, 8), randn(3, 8, seed=1)
    norm = module(8, eps=1e-3, group_size=4, norm_before_gate=norm_before_gate, dtype=torch.float64)
    gate = functional.silu(z)
    parts = (x if norm_before_gate else x * gate).unflatten(-1, (2, 4))
    parts = parts if norm.bias is None else parts - parts.mean(-1, keepdim=True)
    right = (parts / (parts.square().mean(-1, keepdim=True) + 1e-3).sqrt()).flatten(-2)
    torch.testing.assert_close(norm(x, z), right * gate if norm_before_gate else right, **EXACT)
    assert (norm.bias is None) == (module is layernorm_gated.RMSNorm)


# --- errors ---------------------------------------------------------------------------------------------------------

U, ROW, ONE = torch.zeros(2, 3, 5), torch.zeros(3), torch.zeros(3, 2)
X = torch.zeros(1, 6, 2, 3)
SSD = (X, X[..., 0], torch.zeros(2), X[..., :1, :], X[..., :1, :])
NUMBERS = torch.zeros(1, 6, dtype=torch.int32)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: selective_scan_fn(U, U[:, :2], ONE, ONE, ONE), ValueError, "delta has shape (2, 2, 5), expected (batch, dim, seqlen) with dim = 3 as u has"),
        (lambda: selective_scan_fn(U, U, ONE, [1.0], ONE), TypeError, "B is a list, expected a tensor"),
        (lambda: selective_scan_fn(U, U, ONE.cfloat(), U[:, :2], ONE), ValueError, "B has shape (2, 2, 5), expected (batch, dstate, 2·seqlen)"),
        (lambda: selective_scan_fn(U, U, ONE, ONE, ONE, D=torch.zeros(4)), ValueError, "D has shape (4,)"),
        (lambda: mamba_inner_fn(torch.zeros(1, 6, 4), torch.zeros(3, 1, 4), None, torch.zeros(5, 3), torch.zeros(3, 1), ONE.T, None, ONE, checkpoint_lvl=2), ValueError, "checkpoint_lvl is 2"),
        (lambda: mamba_inner_fn(torch.zeros(1, 6, 4), torch.zeros(3, 1, 4), None, torch.zeros(3, 3), torch.zeros(3, 1), ONE.T, None, ONE, ONE, B_proj_bias=ROW[:2]), ValueError, "B_proj_bias is given beside B"),
        (lambda: mamba_inner_fn(torch.zeros(1, 6, 4), torch.zeros(3, 1, 4), None, torch.zeros(4, 3), torch.zeros(3, 1), ONE.T, None, ONE), ValueError, "x_proj_weight has shape (4, 3), expected (5, dim)"),
        (lambda: causal_conv1d_fn(U, torch.zeros(3, 4), None, "silu"), TypeError, "seq_idx is a str"),
        (lambda: causal_conv1d_fn(U, torch.zeros(3, 4), seq_idx=torch.zeros(2, 5)), TypeError, "seq_idx has dtype torch.float32, expected integers"),
        (lambda: causal_conv1d_fn(U, torch.zeros(3, 4), activation="gelu"), ValueError, "activation is 'gelu'"),
        (lambda: causal_conv1d_fn(U, torch.zeros(3, 4), final_states_out=torch.zeros(2, 3, 3)), ValueError, "final_states_out is given"),
        (lambda: causal_conv1d_fn(U, torch.zeros(3, 4), initial_states=torch.zeros(2, 3, 4)), ValueError, "initial_states has shape (2, 3, 4), expected (batch, dim, 3)"),
        (lambda: causal_conv1d_update(U, torch.zeros(2, 3, 2), torch.zeros(3, 4)), ValueError, "conv_state has 2 inputs, expected at least"),
        (lambda: causal_conv1d_varlen_states(ONE, torch.tensor([0, 2, 1]), 2), ValueError, "cu_seqlens is [0, 2, 1]"),
        (lambda: selective_state_update(U, ROW[None], ROW[None], ONE, ONE[:1], ONE[:1]), ValueError, "state has shape (2, 3, 5)"),
        (lambda: mamba_chunk_scan_combined(*SSD, 0), ValueError, "chunk_size is 0"),
        (lambda: mamba_chunk_scan_combined(*SSD, 4, state_dtype=torch.float64), ValueError, "state_dtype is torch.float64"),
        (lambda: mamba_chunk_scan_combined(*SSD, 4, return_varlen_states=True), ValueError, "return_varlen_states is True and cu_seqlens None"),
        (lambda: mamba_chunk_scan_combined(*SSD, 4, cu_seqlens=torch.tensor([0, 2, 6])), ValueError, "cu_seqlens has 2 sequences and seq_idx is None"),
        (lambda: mamba_chunk_scan_combined(*SSD, 4, cu_seqlens=torch.tensor([0, 2, 6]), seq_idx=NUMBERS), ValueError, "the same number on both sides of place 2"),
        (lambda: mamba_chunk_scan_combined(*SSD, 4, dt_limit=(2.0, 1.0)), ValueError, "delta_limits"),
        (lambda: mamba_split_conv1d_scan_combined(torch.zeros(1, 4, 9), torch.zeros(6, 2), None, torch.zeros(2), torch.zeros(2), torch.zeros(2), 4), ValueError, "headdim is None and D has shape (2,)"),
        (lambda: mamba_split_conv1d_scan_combined(torch.zeros(1, 4, 9), torch.zeros(6, 2), None, torch.zeros(2), torch.zeros(2), torch.zeros(2), 4, headdim=2), ValueError, "zxbcdt has 9 channels"),
        (lambda: mamba_split_conv1d_scan_combined(torch.zeros(1, 4, 12), torch.zeros(6, 2), None, torch.zeros(2), torch.zeros(2), torch.zeros(2), 4, headdim=2, outproj_bias=ROW), ValueError, "outproj_bias is given"),
        (lambda: layer_norm.layer_norm_fn(ONE, ROW[:2], None, bias1=ROW[:2]), ValueError, "bias1 is given"),
        (lambda: layer_norm.layer_norm_fn(ONE, ROW[:2], None, dropout_p=1.0), ValueError, "dropout_p is 1.0"),
        (lambda: layer_norm.rms_norm_fn(ONE, ROW[:2], None, residual=ROW), ValueError, "residual has shape (3,), expected that of x, (3, 2)"),
        (lambda: layernorm_gated.rmsnorm_fn(ONE, ROW[:2], None, group_size=3), ValueError, "group_size is 3, expected a divisor of the 2 channels"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(call: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        call()
