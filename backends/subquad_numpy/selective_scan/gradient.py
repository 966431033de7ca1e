"""The gradient of the selective scan: states are computed again from checkpoints, one tile of time after the other.

Let g be the gradient of C · h + D u, G[t] the gradient of h[t], and x = Δ A. Then

    G[t] = C[t] g[t] + exp(x[t+1]) G[t+1],        ∂x[t] = exp(x[t]) h[t-1] G[t]
    ∂B[t] = Σ_c Δ u G,    ∂C[t] = Σ_c g h,    ∂A = Σ_t Δ ∂x,    ∂Δ = Σ_s (A ∂x + u B G),    ∂u = D g + Σ_s Δ B G

At a reset of step t, 0 stands for h[t-1], and for exp(x[t]) G[t] in G[t-1].

The gradient by a complex number is ∂/∂Re + i ∂/∂Im of the real loss, as in PyTorch; JAX uses its conjugate.
"""

from typing import Any

import numpy as np

from subquad_numpy.codegen import inline, load, pointer, shifted, store, total
from subquad_numpy.codegen.copies import store_transposed
from subquad_numpy.codegen.turn import totals_of_quarters
from subquad_numpy.runtime.arguments import fields
from subquad_numpy.selective_scan.four import AT_ONCE
from subquad_numpy.selective_scan.layout import HEAD

# Arrays of the argument record. What the kernel reads has the shapes of y, state; what it writes has these shapes:
#     OF_ROWS      the shapes of u, delta, z, initial_state
#     OVER_TIME    (batch, d, d_state), (batch, d), (batch, d): sums over time of each batch item, in float64
#     OF_MAPS      (parts of a group, batch, n, groups, d_state) from each part of the channels; a constant map as A
OF_OUTPUTS, OF_ROWS = ("grad_y", "grad_state"), ("grad_u", "grad_delta", "grad_z", "grad_initial_state")
OVER_TIME = ("grad_A", "grad_D", "grad_delta_bias")
OF_MAPS = ("grad_B", "grad_C")
BACKWARD_RECORD = fields(
    HEAD, {"part": None}, dict.fromkeys((*OF_OUTPUTS, *OF_ROWS, *OVER_TIME, *OF_MAPS, "checkpoints"), 0)
)
"""The argument record of a gradient kernel.

A block is of whole parts, of so many channels each; complex states have one part a block. `checkpoints` are those of
the forward pass, or address 0.
"""

APART = 5  # lines between matrices: a load waits for a store 4096 bytes away, which a machine takes for the same place


@inline
def written_by(f: Any, zero: Any) -> Any:
    """Pointers to the arrays of `OF_ROWS` but the last one, and to those of `OF_MAPS`."""
    return (
        *(pointer(f.grad_u, zero), pointer(f.grad_delta, zero), pointer(f.grad_z, zero)),
        *(pointer(f.grad_B, zero), pointer(f.grad_C, zero)),
    )


@inline
def row_of_sums(f: Any, item: int, time: int, group: int, part_of_group: int) -> int:
    """The row of grad_B and grad_C of a step and a part."""
    return ((part_of_group * f.batch + item) * f.n + time) * f.groups + group


@inline
def write_quarters(sums: Any, d_state: int, lanes: int, target: Any, row: int) -> None:
    """Write the sums over channels of one step from `quarters` of four states each."""
    whole = d_state // lanes * lanes
    for s in range(0, whole, lanes):
        store(target, row * d_state + s, totals_of_quarters(sums, s // AT_ONCE * lanes))
    for s in range(whole, d_state):
        total = sums[s // AT_ONCE * lanes + s % AT_ONCE]
        for k in range(AT_ONCE, lanes, AT_ONCE):
            total = total + sums[s // AT_ONCE * lanes + s % AT_ONCE + k]
        target[row * d_state + s] = total


@inline
def write_sums(sums: Any, row_sums: int, d_state: int, lanes: int, target: Any, row: int) -> None:
    """Write the sums over channels of one step: one vector for each state, of real parts, then of imaginary parts."""
    for s in range(d_state):
        target[(row * d_state + s) * 2] = total(load(sums, s * lanes))
        target[(row * d_state + s) * 2 + 1] = total(load(sums, row_sums + s * lanes))


@inline
def write_task(
    f: Any, zero: Any, item: int, c0: int, width: int, lanes: int, parts: int, matrix: int, Gr: Any, sum_A: Any,
    sum_B: Any, sum_C: Any, sum_D: Any, sum_bias: Any, constant_B: bool, constant_C: bool,
) -> None:  # fmt: skip
    """Write what a block of channels has once all its steps are done: sums over time, and the first state's gradient.

    `Gr` and the sums by A, B and C have `parts` matrices each.
    """
    zero64, d_state = np.float64(0), f.d_state
    grad_D, grad_bias = pointer(f.grad_D, zero64), pointer(f.grad_delta_bias, zero64)
    for p in range(parts):
        row, at = (item * f.d + c0) * d_state * parts + p, p * matrix
        to_state, to_A = pointer(f.grad_initial_state, zero), pointer(f.grad_A, zero64)
        store_transposed(to_state, row, parts, width, d_state, lanes, shifted(Gr, at))
        store_transposed(to_A, row, parts, width, d_state, lanes, shifted(sum_A, at))
        if constant_B:
            store_transposed(pointer(f.grad_B, zero64), row, parts, width, d_state, lanes, shifted(sum_B, at))
        if constant_C:
            store_transposed(pointer(f.grad_C, zero64), row, parts, width, d_state, lanes, shifted(sum_C, at))
    for i in range(width):
        grad_D[item * f.d + c0 + i] = sum_D[i]
        grad_bias[item * f.d + c0 + i] = sum_bias[i]
