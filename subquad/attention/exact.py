"""Exact softmax attention.

    out = softmax(s q kᵀ) v

O(n n_kv (d + d_v)) time, and O(n d_v) extra memory in the generic form, which is an online softmax over blocks of keys.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from subquad.attention.call import AttentionCall
from subquad.attention.method import Method
from subquad.attention.remembered import OneKernel
from subquad.attention.restrictions import NAMES, sight_of
from subquad.backend import Array
from subquad.core.block_loop import BLOCK_ELEMENTS
from subquad.kernels.block_attention import block_attention
from subquad.kernels.softmax_attention import MANY_KEYS, softmax_attention
from subquad.kernels.visibility import CAUSAL
from subquad.registry import register


@register("exact", cost="n n_kv (d + d_v)")
@dataclass(frozen=True, repr=False, eq=False)
class Exact(Method):
    """Exact softmax attention, out = softmax(s q kᵀ) v.

    Parameters
    ----------
    implementation : str, default "auto"
        "auto" takes the first override of the library's backend that accepts the call, "generic" the blocked online
        softmax. The name of an override forces that override: ValueError, with the reasons, if it cannot take the call.

    Notes
    -----
    O(n n_kv (d + d_v)) operations; the generic form needs O(n d_v) extra memory. Kernel: `softmax_attention`. The
    method keeps no state: `summarize`, `merge`, `attend` and `step` raise NotImplementedError.

    References
    ----------
    .. [1] A. Vaswani et al., "Attention Is All You Need", 2017, eq. (1).
    .. [2] T. Dao et al., "FlashAttention", 2022, section 3.1.

    Examples
    --------
    >>> import numpy as np, subquad
    >>> q = k = np.zeros((3, 2))
    >>> subquad.attention(q, k, np.array([[1.0], [2.0], [6.0]]), "exact")[:, 0]
    array([3., 3., 3.])
    """

    restrictions = frozenset(NAMES)
    reads = restrictions

    implementation: str = "auto"

    def _reads_half(self, *, streaming: bool = False) -> bool:
        return True

    def _kernel(self, call: AttentionCall) -> OneKernel:
        # one query stands at the end and sees all keys
        hides = call.causal and not call.arrangement.backend.holds(call.q.shape[-2] == 1)
        return OneKernel(
            softmax_attention, self.implementation, {"scale": call.scale, "visible": CAUSAL if hides else None}
        )

    def _evaluate(self, call: AttentionCall) -> Array:
        return call.run_one(self, self._kernel(call))

    def _extra_bytes(self, call: AttentionCall) -> int | None:
        heads, (n_kv, d), d_v = max(1, math.prod(call.batch())), call.k.shape[-2:], call.v.shape[-1]
        block = max(BLOCK_ELEMENTS, 64 * heads * MANY_KEYS)
        copies = (0 if call.key_mask is None else 2) + call.causal  # of k and v, which some libraries make
        return (8 * block + copies * heads * n_kv * (d + d_v)) * (call.xp.finfo(call.arrangement.compute).bits // 8)

    def _evaluate_with_lse(self, call: AttentionCall) -> tuple[Array, Array]:
        xp, given = call.xp, call.restrictions
        if given.sinks is not None:  # an output that is changed must not be rounded before
            call = call.widened()
        _, start, stop = sight_of(call)
        hidden = None, None, None, None, None
        out, lse = block_attention(
            call.q, call.k, call.v, start, stop, *hidden, given.mask, given.bias, scale=call.scale, size=1,
            softcap=given.softcap, key_mask=call.key_mask, implementation=self.implementation,
        )  # fmt: skip
        if given.sinks is not None:  # one more logit in the denominator, whose value is 0
            total = xp.logaddexp(lse[..., None], given.sinks)
            out, lse = out * xp.exp(lse[..., None] - total), total[..., 0]
        return out, lse
