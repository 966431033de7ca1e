"""One step of a selective scan on a state that is written in place, by the names of ``mamba_ssm``."""

from __future__ import annotations

import torch
from torch import Tensor

from subquad.scans import selective_scan_step, ssd_step
from subquad_torch.layouts import Layout, check_integers

__all__ = ["selective_state_update", "selective_state_update_ref"]


@torch.no_grad()
def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
) -> Tensor:
    """Take one step of a selective scan, and write the state in place.

        Δ = softplus(dt + dt_bias),    state ← exp(Δ A) state + Δ B x,    out = (C·state + D x) silu(z)

    Parameters
    ----------
    state : Tensor, shape (entries, dim, dstate) or (entries, nheads, dim, dstate)
        The states, written in place, in any floating dtype: batch of them, or, with `state_batch_indices`, any number.
    x, dt : Tensor, shape (batch, dim) or (batch, nheads, dim)
        Input and step sizes.
    A : Tensor, shape (dim, dstate) or (nheads, dim, dstate)
        State matrix.
    B, C : Tensor, shape (batch, dstate) or (batch, ngroups, dstate)
        Input and output maps; head i reads group i // (nheads / ngroups).
    D : Tensor, shape (dim,) or (nheads, dim), optional
        Skip connection.
    z : Tensor, shape of x, optional
        Gate.
    dt_bias : Tensor, shape (dim,) or (nheads, dim), optional
        Added to `dt`.
    dt_softplus : bool, default False
        Whether softplus is applied to the step sizes.
    state_batch_indices : Tensor of int, shape (batch,), optional
        The entry of each item. A negative one is padding: its output is 0, and nothing is written.

    Returns
    -------
    Tensor, shape of x
        The output, in the dtype of `x`, without gradients, as in the original.

    Raises
    ------
    TypeError, ValueError
        If an argument is no tensor or has another shape than expected; the message names it.

    Notes
    -----
    Where `A`, `dt` and `dt_bias` are expanded over dim and dstate, with strides of 0, as Mamba-2 has them, the step is
    `subquad.ssd_step`, otherwise `subquad.selective_scan_step`. softplus keeps the digits of small steps, which
    log(1 + exp(x)) in the original's kernel loses below about −16.
    """
    return _update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_batch_indices, "auto")


@torch.no_grad()
def selective_state_update_ref(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
) -> Tensor:
    """`selective_state_update` in plain operations of PyTorch: the generic form of the kernel."""
    return _update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, None, "generic")


def _update(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    dt_bias: Tensor | None, dt_softplus: bool, state_batch_indices: Tensor | None, implementation: str,
) -> Tensor:  # fmt: skip
    layout = Layout()
    layout.check("x", x, "batch dim", "batch nheads dim")
    heads = "nheads " if x.ndim == 3 else ""
    layout.check("dt", dt, f"batch {heads}dim")
    entries = "batch" if state_batch_indices is None else "entries"
    layout.check("state", state, f"{entries} {heads}dim dstate")
    layout.check("A", A, f"{heads}dim dstate")
    layout.check("B", B, "batch dstate", "batch ngroups dstate")
    layout.check("C", C, "batch dstate" if B.ndim == 2 else "batch ngroups dstate")
    layout.check("D", D, f"{heads}dim")
    layout.check("z", z, f"batch {heads}dim")
    layout.check("dt_bias", dt_bias, f"{heads}dim")
    layout.check("state_batch_indices", state_batch_indices, "batch")
    check_integers("state_batch_indices", state_batch_indices)
    count, groups = layout.sizes.get("nheads", 1), layout.sizes.get("ngroups", 1)
    if count % groups:
        msg = f"B has {groups} groups, expected a divisor of the {count} heads of x"
        raise ValueError(msg)
    keep = None if state_batch_indices is None else state_batch_indices >= 0
    places = None if state_batch_indices is None else state_batch_indices.long()
    before = state if places is None else state[places.clamp(min=0)]
    if x.ndim == 3 and _is_tied(A, 2) and _is_tied(dt, 1) and (dt_bias is None or _is_tied(dt_bias, 1)):
        B, C = (m if m.ndim == 3 else m[:, None, :] for m in (B, C))
        rate = A[:, 0, 0] if A[0].numel() else A.new_zeros(count)
        out, after = ssd_step(
            before, x, dt[..., 0], rate, B, C, D, z=z, delta_bias=None if dt_bias is None else dt_bias[:, 0],
            delta_softplus=dt_softplus, mask=keep, implementation=implementation,
        )  # fmt: skip
    else:
        rows = [None if a is None else a.flatten(1) for a in (x, dt, z)]
        columns = [None if a is None else a.flatten(0, -1) for a in (D, dt_bias)]
        out, after = selective_scan_step(
            before.flatten(1, -2), rows[0], rows[1], A.flatten(0, -2), B, C, columns[0], z=rows[2],
            delta_bias=columns[1], delta_softplus=dt_softplus, mask=keep, implementation=implementation,
        )  # fmt: skip
        out, after = out.reshape(x.shape), after.reshape(before.shape)
    if places is None or keep is None:
        state.copy_(after)
    else:
        state[places[keep]] = after[keep].to(state.dtype)
    return out


def _is_tied(x: Tensor, axes: int) -> bool:
    """Whether the numbers along the last axes are one number, as in a tensor that was expanded."""
    return all(stride == 0 for stride in x.stride()[-axes:])
