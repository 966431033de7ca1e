"""Attention with squared products as weights (an example of a method of one's own).

    out[i] = Σ_j (q[i]·k[j])² v[j] / Σ_j (q[i]·k[j])²

(q·k)² = φ(q)·φ(k) for φ(x) = x ⊗ x, so O(n d² d_v) time.
"""

from __future__ import annotations

from dataclasses import dataclass

from array_api_compat import array_namespace

from subquad.attention.call import AttentionCall
from subquad.attention.feature_method import FeatureMethod, Mapped
from subquad.backend import Array
from subquad.kernels.feature_map import Rowwise
from subquad.registry import register


@register("squared", cost="n d² d_v")
@dataclass(frozen=True, repr=False, eq=False)
class Squared(FeatureMethod):
    """Attention with weights (q·k)², which `scale` does not change."""

    def _map(self, call: AttentionCall) -> Mapped:
        d = call.like.shape[-1]
        return Rowwise(outer_square, 1.0, 1.0, d * d), ()


def outer_square(x: Array) -> Array:
    """x ⊗ x of each row: (..., n, d) → (..., n, d²)."""
    xp = array_namespace(x)
    return xp.reshape(x[..., :, None] * x[..., None, :], (*x.shape[:-1], x.shape[-1] ** 2))
