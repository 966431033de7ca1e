"""The scan of outer products with a gate on its output, in plain Array API.

S[t] = diag(exp g[t]) S[t−1] + w[t] k[t] v[t]ᵀ,    o[t] = (scale · S[t]ᵀ q[t] + skip ∘ v[t]) ∘ silu(z[t])
"""

from __future__ import annotations

from subquad.backend import Array, Like
from subquad.core.beside import namespace_of
from subquad.core.kernel import kernel
from subquad.kernels.outer_scan import outer_scan
from subquad.kernels.outer_scan import outputs as outputs_of_scan
from subquad.kernels.selective_scan import skip_and_gate


def outputs(*arrays: Array, scale: float, reverse: bool) -> tuple[Like, ...]:
    """Shapes and dtypes of the outputs of `gated_outer_scan`."""
    return outputs_of_scan(*arrays[:-1], scale=scale, reverse=reverse)


@kernel(outputs=outputs, reads_half=True)
def gated_outer_scan(
    q: Array,
    k: Array,
    v: Array,
    g: Array | None,
    weight: Array | None,
    bonus: Array | None,
    skip: Array | None,
    initial_state: Array | None,
    resets: Array | None,
    z: Array,
    /,
    *,
    scale: float,
    reverse: bool,
) -> tuple[Array, Array]:
    """(o silu(z), last state) of the scan `outer_scan`, whose arrays and keywords come before z (batch, n, heads, d_v).

    z may have half precision too; the gated output is rounded once. Where gradients are recorded, callers take the scan
    and the gate apart: the gradient of the scan is a kernel, and reads its output before the gate.
    """
    given = q, k, v, g, weight, bonus, skip, initial_state, resets
    o, state = outer_scan.generic(*given, scale=scale, reverse=reverse)
    return skip_and_gate(namespace_of(q), o, v, None, z), state
