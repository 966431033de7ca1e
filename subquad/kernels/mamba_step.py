"""One step of a Mamba block for a few sequences, in terms of the kernels that it consists of."""

from __future__ import annotations

from subquad.backend import Array, Like
from subquad.core.beside import namespace_of
from subquad.core.kernel import kernel
from subquad.kernels.causal_conv1d import causal_conv1d
from subquad.kernels.project import project
from subquad.kernels.selective_scan import selective_scan


def outputs(
    x: Array, in_proj: Array, in_bias: Array | None, taps: Array, taps_bias: Array | None, x_proj: Array,
    dt_proj: Array, dt_bias: Array, A_log: Array, D: Array, out_proj: Array, out_bias: Array | None, conv: Array,
    ssm: Array, /,
) -> tuple[Like, ...]:  # fmt: skip
    """Shapes and dtypes of the outputs of `mamba_step`: the output, and the states after the step."""
    shape = (x.shape[0], out_proj.shape[0])
    return Like(shape, x.dtype), Like(tuple(conv.shape), x.dtype), Like(tuple(ssm.shape), x.dtype)


@kernel(outputs=outputs)
def mamba_step(
    x: Array, in_proj: Array, in_bias: Array | None, taps: Array, taps_bias: Array | None, x_proj: Array,
    dt_proj: Array, dt_bias: Array, A_log: Array, D: Array, out_proj: Array, out_bias: Array | None, conv: Array,
    ssm: Array, /,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """(out, conv, ssm) after one step, as `subquad.mamba` computes them; all of one real dtype but the four matrices.

        x                   (batch, d_model)
        in_proj, in_bias    (2 d_inner, d_model), (2 d_inner,)
        taps, taps_bias     (d_inner, width), (d_inner,)
        x_proj              (dt_rank + 2 d_state, d_inner)
        dt_proj, dt_bias    (d_inner, dt_rank), (d_inner,)
        A_log, D            (d_inner, d_state), (d_inner,)
        out_proj, out_bias  (d_model, d_inner), (d_model,)
        conv, ssm           (batch, width − 1, d_inner), (batch, d_inner, d_state)

    Only the biases `in_bias`, `taps_bias` and `out_bias` may be None.
    """
    xp = namespace_of(x)
    (d_inner, rank), d_state = dt_proj.shape, A_log.shape[1]
    _, _ = x.shape  # one sequence after the other where a transform adds an axis
    both = project(x, in_proj, in_bias)
    u, z = (xp.expand_dims(part, axis=1) for part in (both[:, :d_inner], both[:, d_inner:]))
    u, conv = causal_conv1d(u, taps, taps_bias, conv, None, silu=True, reverse=False)
    low = project(u[:, 0, :], x_proj, None)
    delta = xp.expand_dims(project(low[:, :rank], dt_proj, None), axis=1)
    B, C = (part[:, None, None, :] for part in (low[:, rank : rank + d_state], low[:, rank + d_state :]))
    y, ssm = selective_scan(
        u, delta, -xp.exp(A_log), B, C, D, z, dt_bias, ssm, None, delta_softplus=True, reverse=False
    )
    return project(y[:, 0, :], out_proj, out_bias), conv, ssm
