"""One step through Mamba blocks for a few sequences, in terms of the kernels that a block consists of."""

from __future__ import annotations

from typing import NamedTuple

from subquad.backend import Array, Like
from subquad.core.beside import namespace_of
from subquad.core.kernel import kernel
from subquad.kernels.causal_conv1d import causal_conv1d
from subquad.kernels.project import project
from subquad.kernels.selective_scan import selective_scan


class Block(NamedTuple):
    """The arrays of a block; those with a default may be None. W are matrices (outputs, inputs)."""

    norm: Array | None  # (d_model,)
    in_proj: Array  # (2 d_inner, d_model)
    in_bias: Array | None  # (2 d_inner,)
    taps: Array  # (d_inner, width)
    taps_bias: Array | None  # (d_inner,)
    x_proj: Array  # (dt_rank + 2 d_state, d_inner)
    dt_proj: Array  # (d_inner, dt_rank)
    dt_bias: Array  # (d_inner,)
    A_log: Array  # (d_inner, d_state)
    D: Array  # (d_inner,)
    out_proj: Array  # (d_model, d_inner)
    out_bias: Array | None  # (d_model,)
    conv: Array  # (batch, width − 1, d_inner)
    ssm: Array  # (batch, d_inner, d_state)


def blocks_of(arrays: tuple[Array | None, ...]) -> list[Block]:
    """The blocks of a call, whose arrays follow one another."""
    count = len(Block._fields)
    return [Block(*arrays[i : i + count]) for i in range(0, len(arrays), count)]


def outputs(x: Array, /, *arrays: Array | None, eps: float) -> tuple[Like, ...]:
    """Shapes and dtypes of the outputs of `mamba_step`: the output, and the states of each block after the step."""
    blocks = blocks_of(arrays)
    states = [Like(tuple(a.shape), x.dtype) for block in blocks for a in (block.conv, block.ssm)]
    return Like((x.shape[0], blocks[-1].out_proj.shape[0]), x.dtype), *states


@kernel(outputs=outputs)
def mamba_step(x: Array, /, *arrays: Array | None, eps: float) -> tuple[Array, ...]:
    """(out, conv, ssm, conv, ssm, …) after one step of x (batch, d_model) through blocks, as `subquad.mamba` has them.

        x ← x + block(norm ∘ x / √(mean(x²) + eps))        for each block; block(x) for one without a norm

    `arrays` are those of the first `Block`, of the second and so on, of equal shapes, all of the dtype of x but the
    four matrices of a block.
    """
    xp = namespace_of(x)
    _, _ = x.shape  # one sequence after the other where a transform adds an axis
    states: list[Array] = []
    for block in blocks_of(arrays):
        source = x
        if block.norm is not None:
            source = x / xp.sqrt(xp.mean(x * x, axis=-1, keepdims=True) + eps) * block.norm
        out, conv, ssm = _step(source, block)
        x = out if block.norm is None else x + out
        states += [conv, ssm]
    return x, *states


def _step(x: Array, p: Block) -> tuple[Array, Array, Array]:
    """(out, conv, ssm) of one block."""
    xp = namespace_of(x)
    (d_inner, rank), d_state = p.dt_proj.shape, p.A_log.shape[1]
    both = project(x, p.in_proj, p.in_bias)
    u, z = (xp.expand_dims(part, axis=1) for part in (both[:, :d_inner], both[:, d_inner:]))
    u, conv = causal_conv1d(u, p.taps, p.taps_bias, p.conv, None, silu=True, reverse=False)
    low = project(u[:, 0, :], p.x_proj, None)
    delta = xp.expand_dims(project(low[:, :rank], p.dt_proj, None), axis=1)
    B, C = (part[:, None, None, :] for part in (low[:, rank : rank + d_state], low[:, rank + d_state :]))
    y, ssm = selective_scan(
        u, delta, -xp.exp(p.A_log), B, C, p.D, z, p.dt_bias, p.ssm, None, delta_softplus=True, reverse=False
    )
    return project(y[:, 0, :], p.out_proj, p.out_bias), conv, ssm
