"""The scan of Mamba-2 in other forms: as one of Mamba-1, and with its convolution by the generic forms."""

from __future__ import annotations

import torch
from torch import Tensor

from subquad.scans import causal_conv1d, selective_scan
from subquad_torch.layouts import Layout
from subquad_torch.mamba_ssm.ops.split import NO_LIMIT, chunk_scan


def ssd_selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = NO_LIMIT,
) -> Tensor:
    """The scan of Mamba-2 as one of Mamba-1, which also takes step sizes, rates and biases for each channel.

    Parameters
    ----------
    x : Tensor, shape (batch, seqlen, nheads, headdim)
        Input.
    dt : Tensor, shape (batch, seqlen, nheads) or (batch, seqlen, nheads, headdim)
        Step sizes.
    A : Tensor, shape (nheads,) or (nheads · headdim, dstate)
        Rates.
    B, C : Tensor, shape (batch, seqlen, ngroups, dstate)
        Input and output maps.
    D : Tensor, shape (nheads,) or (nheads, headdim), optional
        Skip connection.
    z : Tensor, shape of x, optional
        Gate.
    dt_bias : Tensor, shape (nheads,) or (nheads, headdim), optional
        Added to `dt`.
    dt_softplus : bool, default False
        Whether softplus is applied to the step sizes.
    dt_limit : (float, float), default (0, inf)
        Least and greatest step size; the default clips nothing.

    Returns
    -------
    Tensor, shape of x
        The output.

    Raises
    ------
    TypeError, ValueError
        As `mamba_chunk_scan_combined`.
    """
    layout = Layout()
    layout.check("x", x, "batch seqlen nheads headdim")
    layout.check("dt", dt, "batch seqlen nheads", "batch seqlen nheads headdim")
    for name, given in (("B", B), ("C", C)):
        layout.check(name, given, "batch seqlen ngroups dstate")
    nheads, headdim, dstate = (layout[axis] for axis in ("nheads", "headdim", "dstate"))
    layout.check("A", A, "nheads", f"{nheads * headdim} dstate")
    layout.check("D", D, "nheads", "nheads headdim")
    layout.check("z", z, "batch seqlen nheads headdim")
    layout.check("dt_bias", dt_bias, "nheads", "nheads headdim")

    def channels(a: Tensor | None, axes: int) -> Tensor | None:
        """(…, nheads · headdim) of numbers for each channel, or for each head."""
        if a is None:
            return None
        return (a if a.ndim == axes else a[..., None].expand(*a.shape, headdim)).flatten(-2)

    rates = A if A.ndim == 2 else A.repeat_interleave(headdim)[:, None].expand(-1, dstate)
    y = selective_scan(
        x.flatten(-2), channels(dt, 4), rates, B, C, channels(D, 2), z=channels(z, 4), delta_bias=channels(dt_bias, 2),
        delta_softplus=dt_softplus, delta_limits=None if tuple(dt_limit) == NO_LIMIT else dt_limit,
    )  # fmt: skip
    return y.unflatten(-1, (nheads, headdim))


def mamba_conv1d_scan_ref(
    xBC: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt: Tensor,
    A: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = NO_LIMIT,
    activation: str | None = "silu",
    headdim: int | None = None,
    ngroups: int = 1,
) -> Tensor:
    """Convolution and scan of Mamba-2 on xBC (batch, seqlen, conv_dim), by the generic forms of the kernels."""
    nheads = A.shape[0]
    if headdim is None and (z is not None or (D is not None and D.ndim == 2)):
        headdim = D.shape[1] if D is not None and D.ndim == 2 else z.shape[-1] // nheads  # type: ignore[union-attr]
    if headdim is None:
        msg = "headdim is None, expected it where neither z nor a D of shape (nheads, headdim) tells it"
        raise ValueError(msg)
    dim = nheads * headdim
    u = causal_conv1d(xBC, conv1d_weight, conv1d_bias, activation=activation, implementation="generic")
    maps = (u.shape[-1] - dim) // 2
    x, B, C = torch.split(u, [dim, maps, u.shape[-1] - dim - maps], dim=-1)
    return chunk_scan(
        x.unflatten(-1, (nheads, headdim)), dt, A, *(m.unflatten(-1, (ngroups, -1)) for m in (B, C)), D,
        chunk_size=chunk_size, z=None if z is None else z.unflatten(-1, (nheads, headdim)), dt_bias=dt_bias,
        dt_softplus=dt_softplus, dt_limit=dt_limit, implementation="generic",
    ).out.flatten(-2)  # fmt: skip
