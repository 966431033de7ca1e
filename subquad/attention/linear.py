"""Linear attention (Katharopoulos et al., "Transformers are RNNs", 2020).

    out[i] = φ(q[i])ᵀ Σ_j φ(k[j]) v[j]ᵀ / φ(q[i])ᵀ Σ_j φ(k[j]),    φ(x) = elu(x) + 1

O(n m d_v) time for m features, O(m d_v) extra memory. Linear attention is a layer of its own, not an approximation of
softmax attention.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from subquad.attention.call import AttentionCall
from subquad.attention.feature_method import FeatureMethod, Mapped
from subquad.backend import Array
from subquad.core.beside import place_of
from subquad.kernels.feature_map import Elu, Rowwise, map_rows
from subquad.registry import register


@register("linear", cost="n d d_v")
@dataclass(frozen=True, repr=False, eq=False)
class Linear(FeatureMethod):
    """Linear attention, with the feature map φ(x) = elu(x) + 1 or one that the user gives.

        out[i] = φ(q[i])ᵀ Σ_j φ(k[j]) v[j]ᵀ / φ(q[i])ᵀ Σ_j φ(k[j])

    Parameters
    ----------
    feature_map : "elu" or callable, default "elu"
        φ: "elu" is elu(x) + 1, with m = d features. A callable takes rows (..., n, d) and returns features
        (..., n, m) for any m; each row of features may depend on its own row alone.

    Notes
    -----
    O(n m d_v) operations and O(m d_v) extra memory. `scale` is 1 by default, as in the paper; φ is applied to √scale q
    and √scale k. A map that is not positive may let the denominator vanish or change its sign; a row whose denominator
    is exactly 0 is 0. Kernels: `feature_whole`, or `feature_step` if causal.

    References
    ----------
    .. [1] A. Katharopoulos et al., "Transformers are RNNs", 2020, eqs. (4)–(7).

    Examples
    --------
    >>> import numpy as np, subquad
    >>> q = k = np.zeros((3, 2))
    >>> subquad.attention(q, k, np.array([[1.0], [2.0], [6.0]]), "linear", causal=True)[:, 0]
    array([1. , 1.5, 3. ])
    """

    feature_map: str | Callable[[Array], Array] = "elu"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not callable(self.feature_map) and not (isinstance(self.feature_map, str) and self.feature_map == "elu"):
            msg = f'feature_map must be "elu" or a function of an array, got {self.feature_map!r}'
            raise ValueError(msg)

    @property
    def of_logits(self) -> bool:
        return False

    def default_scale(self, scale: float | None) -> float | None:
        return 1.0 if scale is None else scale

    def _reads_half(self, *, streaming: bool = False) -> bool:
        return not callable(self.feature_map)

    def _keeps_map(self) -> bool:
        return not callable(self.feature_map)

    def _map(self, call: AttentionCall) -> Mapped:
        if not callable(self.feature_map):  # one object for all calls of a form: a kernel compares it by `is`
            return call.made_of(self, "phi", None, lambda: Elu(*_factors(call.scale))), ()
        (root, of_queries), like = _factors(call.scale), call.like
        # the map is tried on one row of zeros, to find its number of features m
        row = call.xp.zeros((1, like.shape[-1]), dtype=like.dtype, device=place_of(like))
        return Rowwise(self.feature_map, root, of_queries, map_rows(self.feature_map, row).shape[-1]), ()


def _factors(scale: float) -> tuple[float, float]:
    """The factors of keys and of queries whose product is the scale."""
    root = abs(scale) ** 0.5
    return root, -root if scale < 0 else root
