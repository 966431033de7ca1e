"""The scan of Mamba-2 with its states, and what is inside of a Mamba-2 block between the outer projections."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from subquad.scans import causal_conv1d, ssd
from subquad_torch.causal_conv1d.causal_conv1d_interface import padding_of
from subquad_torch.causal_conv1d.causal_conv1d_varlen import check_places
from subquad_torch.layouts import Layout, check_integers
from subquad_torch.mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn

NO_LIMIT = (0.0, float("inf"))


class Scanned(NamedTuple):
    """The output of a scan and its states; those of packed sequences where they were asked for."""

    out: Tensor
    final_states: Tensor
    varlen_states: Tensor | None


class Split(NamedTuple):
    """The output of the inside of a block, the inputs of its convolution, and the states of its scan."""

    out: Tensor
    inputs: Tensor
    final_states: Tensor
    varlen_states: Tensor | None


def chunk_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, *, chunk_size: int,
    z: Tensor | None = None, dt_bias: Tensor | None = None, initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None, cu_seqlens: Tensor | None = None, dt_softplus: bool = False,
    dt_limit: tuple[float, float] | None = NO_LIMIT, return_varlen_states: bool = False,
    state_dtype: torch.dtype | None = None, implementation: str = "auto",
) -> Scanned:  # fmt: skip
    """The scan of `mamba_chunk_scan_combined`, whose arguments these are; `dt_limit` None does not clip."""
    layout = Layout()
    layout.check("x", x, "batch seqlen nheads headdim")
    layout.check("dt", dt, "batch seqlen nheads")
    layout.check("A", A, "nheads")
    for name, given in (("B", B), ("C", C)):
        layout.check(name, given, "batch seqlen ngroups dstate")
    layout.check("D", D, "nheads", "nheads headdim")
    layout.check("z", z, "batch seqlen nheads headdim")
    layout.check("dt_bias", dt_bias, "nheads")
    layout.check("initial_states", initial_states, "batch nheads headdim dstate")
    layout.check("seq_idx", seq_idx, "batch seqlen")
    check_integers("seq_idx", seq_idx)
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1:
        msg = f"chunk_size is {chunk_size!r}, expected an integer of at least 1"
        raise ValueError(msg)
    if state_dtype is not None and (not isinstance(state_dtype, torch.dtype) or not state_dtype.is_floating_point):
        msg = f"state_dtype is {state_dtype!r}, expected a floating dtype of PyTorch"
        raise TypeError(msg)
    if state_dtype == torch.float64 and x.dtype != torch.float64:
        msg = f"state_dtype is {state_dtype} for x of {x.dtype}, whose states are float32: pass float64 inputs"
        raise ValueError(msg)
    places = _places(layout, seq_idx, cu_seqlens, return_varlen_states)
    # softplus gives nothing below 0: then the default limits clip nothing
    limits = None if dt_limit is not None and dt_softplus and tuple(dt_limit) == NO_LIMIT else dt_limit
    ends = sorted({end for start, end in pairwise(places) if end > start})
    out, final, *rest = ssd(
        x, dt, A, B, C, D, z=z, delta_bias=dt_bias, delta_softplus=dt_softplus, delta_limits=limits,
        initial_state=initial_states, segments=seq_idx, return_state=True, states_at=ends if ends else None,
        implementation=implementation,
    )  # fmt: skip
    if not return_varlen_states:
        return Scanned(out, final, None)
    nothing = torch.zeros_like(final[0])
    found = [rest[0][ends.index(end), 0] if end > start else nothing for start, end in pairwise(places)]
    return Scanned(out, final, torch.stack(found) if found else final[:0])


def split_scan(
    zxbcdt: Tensor, conv1d_weight: Tensor, conv1d_bias: Tensor | None, dt_bias: Tensor, A: Tensor, D: Tensor | None,
    *, chunk_size: int, headdim: int | None = None, ngroups: int = 1, history: Tensor | None = None,
    initial_states: Tensor | None = None, seq_idx: Tensor | None = None, cu_seqlens: Tensor | None = None,
    return_varlen_states: bool = False, dt_limit: tuple[float, float] = NO_LIMIT, activation: str | None = "silu",
    rmsnorm_weight: Tensor | None = None, rmsnorm_eps: float = 1e-6, norm_before_gate: bool = True,
    state_dtype: torch.dtype | None = None, implementation: str = "auto",
) -> Split:  # fmt: skip
    """Convolution, scan, gate and norm of what the first projection gives.

    The arguments are those of `mamba_split_conv1d_scan_combined`, and `history` (batch, width - 1, channels), the
    inputs of the convolution before the first.
    """
    layout = Layout()
    layout.check("zxbcdt", zxbcdt, "batch seqlen channels")
    layout.check("dt_bias", dt_bias, "nheads")
    layout.check("A", A, "nheads")
    layout.check("D", D, "nheads", "nheads headdim")
    layout.check("conv1d_weight", conv1d_weight, "conv_dim width")
    layout.check("conv1d_bias", conv1d_bias, "conv_dim")
    headdim = layout.sizes.get("headdim") if headdim is None else headdim
    if headdim is None or layout.sizes.get("headdim", headdim) != headdim:
        shape = None if D is None else tuple(D.shape)
        msg = f"headdim is {headdim} and D has shape {shape}, expected headdim, or D of shape (nheads, headdim)"
        raise ValueError(msg)
    nheads, maps = layout["nheads"], layout["conv_dim"] - layout["nheads"] * headdim
    dim = nheads * headdim
    mlp = zxbcdt.shape[-1] - layout["conv_dim"] - dim - nheads
    if ngroups < 1 or nheads % ngroups or maps < 0 or maps % (2 * ngroups) or mlp < 0 or mlp % 2:
        msg = (
            f"zxbcdt has {zxbcdt.shape[-1]} channels, conv1d_weight {layout['conv_dim']} and dt_bias {nheads} heads "
            f"of headdim = {headdim}, with ngroups = {ngroups}, expected conv_dim = nheads headdim + 2 ngroups dstate "
            f"and 2 d_mlp + nheads headdim + conv_dim + nheads channels, where ngroups divides nheads"
        )
        raise ValueError(msg)
    layout.check("rmsnorm_weight", rmsnorm_weight, str(dim))
    z0, x0, z, inputs, dt = torch.split(zxbcdt, [mlp // 2, mlp // 2, dim, layout["conv_dim"], nheads], dim=-1)
    u = causal_conv1d(
        inputs, conv1d_weight, conv1d_bias, activation=activation, initial_state=history, segments=seq_idx,
        mask=None if seq_idx is None else padding_of(seq_idx), implementation=implementation,
    )  # fmt: skip
    x, B, C = torch.split(u, [dim, maps // 2, maps // 2], dim=-1)
    gate = z.unflatten(-1, (nheads, headdim)) if rmsnorm_weight is None else None
    y, final, varlen = chunk_scan(
        x.unflatten(-1, (nheads, headdim)), dt, A, *(m.unflatten(-1, (ngroups, -1)) for m in (B, C)), D,
        chunk_size=chunk_size, z=gate, dt_bias=dt_bias, initial_states=initial_states, seq_idx=seq_idx,
        cu_seqlens=cu_seqlens, dt_softplus=True, dt_limit=dt_limit, return_varlen_states=return_varlen_states,
        state_dtype=state_dtype, implementation=implementation,
    )  # fmt: skip
    out = y.flatten(-2)
    if rmsnorm_weight is not None:
        out = rmsnorm_fn(out, rmsnorm_weight, None, z, rmsnorm_eps, dim // ngroups, norm_before_gate)
    if mlp:
        out = torch.cat([functional.silu(z0) * x0, out], dim=-1)
    return Split(out, inputs, final, varlen)


def _places(layout: Layout, seq_idx: Tensor | None, cu_seqlens: Tensor | None, return_varlen_states: bool) -> list[int]:
    """Where sequences begin and end, if their states are asked for; ValueError where nothing keeps them apart."""
    if cu_seqlens is None:
        if return_varlen_states:
            msg = "return_varlen_states is True and cu_seqlens None, expected the places where the sequences begin"
            raise ValueError(msg)
        return []
    places = check_places(cu_seqlens, layout["seqlen"])
    if layout["batch"] != 1:
        msg = f"cu_seqlens is given for a batch of {layout['batch']}, expected 1: sequences one after another"
        raise ValueError(msg)
    inner = sorted({start for start, end in pairwise(places) if 0 < start < end})
    numbers = None if seq_idx is None else seq_idx[0].tolist()
    joined = [i for i in inner if numbers is None or numbers[i] == numbers[i - 1]]
    if joined:
        given = "None" if numbers is None else f"the same number on both sides of place {joined[0]}"
        msg = (
            f"cu_seqlens has {len(inner) + 1} sequences and seq_idx is {given}, expected a seq_idx (1, seqlen) that "
            f"changes where a sequence begins: it keeps the sequences apart"
        )
        raise ValueError(msg)
    return places if return_varlen_states else []
