"""FAVOR+: softmax attention through random features (Choromanski et al., "Rethinking Attention with Performers", 2021).

    softmax(q kᵀ/√d) v  ≈  φ(q) (φ(k)ᵀ v) / φ(q) (φ(k)ᵀ 1),    E[φ(q)·φ(k)] = exp(q·k/√d)

with x ← x d^(−1/4), directions ω_1 … ω_m, and φ(x) one of (factors common to all features cancel)

    positive       exp(ω x − |x|²/2)                          eq. (8), lemma 1
    hyperbolic     [exp(ω x), exp(−ω x)] exp(−|x|²/2)         lemma 1
    trigonometric  [cos ω x, sin ω x] exp(|x|²/2)             section 2.3
    generalised    f(ω x) + ε                                 eq. (5), h = 1

O(n m d) time, O(m d) extra memory. Peaked attention needs m far beyond n: see `subquad compare` for the error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from array_api_compat import device

from subquad import _arrays
from subquad._dispatch import Array, backend_of
from subquad._draw import PROJECTIONS, draw_omega
from subquad.attention._door import Inputs
from subquad.attention._features import FeatureMethod
from subquad.attention._heads import Pair
from subquad.attention._rows import mean_row, self_attention_mask
from subquad.kernels._feature_map import (
    Center,
    Exponential,
    FeatureMap,
    Features,
    RowMap,
    batch_of,
    centred_keys,
    exponential_map,
)

SOFTMAX_FEATURES = ("positive", "hyperbolic", "trigonometric")
FEATURES = (*SOFTMAX_FEATURES, "relu")


@dataclass(frozen=True)
class Favor(FeatureMethod):
    """FAVOR+ (Performer): attention through random features, in O(n m d).

        out[i] = φ(q[i])ᵀ Σ_j φ(k[j]) v[j]ᵀ / φ(q[i])ᵀ Σ_j φ(k[j])

    Parameters
    ----------
    num_features : int, default 256
        m, the number of random directions ω. Hyperbolic and trigonometric maps have 2 m features.
    seed : int, default 0
        Seed of ω; the same seed gives the same bits on every library.
    features : {"positive", "hyperbolic", "trigonometric", "relu"} or callable, default "positive"
        The first three estimate the softmax kernel. "relu" and a callable f, applied elementwise to ω x, define a
        kernel of their own (generalised attention).
    projection : {"orthogonal", "hadamard", "givens", "iid"}, default "orthogonal"
        How ω is drawn; see `subquad.draw_omega`.
    omega : array, shape (m, d), optional
        ω itself, of the library of q or NumPy's, in place of `num_features`, `seed` and `projection`.
    center : bool or (array, array), default False
        Subtract (q̄, k̄), each of shape (d,) or (..., d), from queries and keys before the features are taken. The
        softmax does not change, the variance falls with ‖q − q̄ + k − k̄‖². True takes the means of the visible rows;
        causal and streaming use needs the pair itself, since a mean would know the future.
    kernel_epsilon : float, default 0
        ε of the generalised kernel f(ω x) + ε (the Performer's code takes 0.001). Not for softmax features,
        which need none.

    Notes
    -----
    Sums are stabilised per feature over the keys, by a running maximum in causal use: nothing overflows, and no
    row depends on a later key. The estimate's relative variance is about exp(‖q + k‖²/√d)/m for positive features:
    good for small logits, useless for peaked ones.

    References
    ----------
    .. [1] K. Choromanski et al., "Rethinking Attention with Performers", 2021, eqs. (5)–(8), lemma 1, algorithm 1.

    Examples
    --------
    >>> import numpy as np, subquad
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = rng.standard_normal((3, 512, 16)) / 2
    >>> exact = subquad.attention(q, k, v, "exact")
    >>> error = subquad.attention(q, k, v, "favor", num_features=1024) - exact
    >>> bool(np.linalg.norm(error) < 0.25 * np.linalg.norm(exact))
    True
    """

    num_features: int | None = None
    seed: int | None = None
    features: str | Callable[[Array], Array] = "positive"
    projection: str | None = None
    omega: Array | None = None
    center: bool | tuple[Array, Array] = False
    kernel_epsilon: float = 0.0

    def __post_init__(self) -> None:
        if self.num_features is not None:
            _arrays.check_count("num_features", self.num_features)
        if self.seed is not None:
            _arrays.check_seed(self.seed)
        if self.projection is not None:
            _arrays.check_choice("projection", self.projection, PROJECTIONS)
        if not callable(self.features):
            _arrays.check_choice("features", self.features, FEATURES)
        if self.omega is not None:
            for name in ("num_features", "seed", "projection"):
                if getattr(self, name) is not None:
                    msg = f"omega is given, so {name}={getattr(self, name)!r} would have no effect; leave one out"
                    raise ValueError(msg)
        if not isinstance(self.center, bool | tuple) or (isinstance(self.center, tuple) and len(self.center) != 2):
            msg = f"center must be True, False or a pair (q_mean, k_mean) of arrays, got {self.center!r}"
            raise TypeError(msg)
        if self.center is not False and self.features not in SOFTMAX_FEATURES:
            msg = f"center leaves only the softmax kernel unchanged; features={self.features!r} is another kernel"
            raise ValueError(msg)
        if _arrays.check_number("kernel_epsilon", self.kernel_epsilon) != 0:
            _arrays.check_positive("kernel_epsilon", self.kernel_epsilon)
            if self.features in SOFTMAX_FEATURES:
                msg = f"kernel_epsilon belongs to generalised kernels; {self.features} features need none"
                raise ValueError(msg)

    def draw_omega(self, d: int) -> np.ndarray[Any, np.dtype[np.float64]]:
        """ω for d channels, as drawn: shape (m, d), NumPy, float64."""
        return draw_omega(*self._drawing(d))

    def choose_center(self, inputs: Inputs) -> Center:
        if self.center is not True:
            return super().choose_center(inputs)
        if inputs.causal:
            msg = "center=True would let the mean of later keys into earlier rows; pass center=(q_mean, k_mean)"
            raise NotImplementedError(msg)
        q_mask = self_attention_mask(inputs)
        return mean_row(inputs.xp, inputs.q, q_mask), mean_row(inputs.xp, inputs.k, inputs.key_mask)

    def given_rows(self, xp: ModuleType, like: Array) -> Pair:
        if self.center is False:
            return None
        if self.center is True:
            msg = "a state needs the same center for every chunk; pass center=(q_mean, k_mean)"
            raise ValueError(msg)
        pair = []
        for name, x in zip(("q_mean", "k_mean"), self.center, strict=True):
            x = _from_host(xp, name, x, like)
            if x.ndim == 0 or x.shape[-1] != like.shape[-1]:
                msg = f"{name} has shape {tuple(x.shape)}, expected ({like.shape[-1]},) or (..., {like.shape[-1]})"
                raise ValueError(msg)
            pair.append(xp.expand_dims(x, axis=-2))
        return pair[0], pair[1]

    def map_rows(self, xp: ModuleType, like: Array, *, scale: float, center: Center) -> FeatureMap:
        # ω (root x) = (root ω) x; a negative scale turns the queries round
        directions = xp.matrix_transpose(self._omega(xp, like)) * abs(scale) ** 0.5
        if self.features == "hyperbolic":
            directions = xp.concat([directions, -directions], axis=-1)
        turned = -directions if scale < 0 else directions
        m = directions.shape[-1]

        def trigonometric_keys(k: Array) -> Features:
            k, half_norm, own = centred_keys(xp, k, scale, center)
            return waves(k @ directions), half_norm + own

        def trigonometric_queries(_: Array) -> RowMap:
            return lambda q: (waves((q if center is None else q - center[0]) @ turned), None)

        def waves(projected: Array) -> Array:
            return xp.concat([xp.cos(projected), xp.sin(projected)], axis=-1)

        if self.features in ("positive", "hyperbolic"):
            return exponential_map(xp, Exponential(directions, turned, scale, center))
        if self.features == "trigonometric":
            return FeatureMap(trigonometric_keys, trigonometric_queries, 2 * m, 1, batch_of(center))
        return FeatureMap(
            lambda k: (self._elementwise(xp, k @ directions), None),
            lambda _: lambda q: (self._elementwise(xp, q @ turned), None),
            m,
            1,
        )

    def _elementwise(self, xp: ModuleType, projected: Array) -> Array:
        if self.features == "relu":
            value = xp.where(projected < 0, 0.0, projected)
        else:
            value = self.features(projected)  # type: ignore[operator]
            if getattr(value, "shape", None) != projected.shape:
                got = getattr(value, "shape", type(value).__name__)
                msg = f"features must map elementwise: given shape {tuple(projected.shape)}, it returned {got}"
                raise ValueError(msg)
        return value + self.kernel_epsilon if self.kernel_epsilon else value

    def _drawing(self, d: int) -> tuple[str, int, int, int]:
        """Arguments of `draw_omega`."""
        return self.projection or "orthogonal", self.num_features or 256, d, self.seed or 0

    def _omega(self, xp: ModuleType, like: Array) -> Array:
        d = like.shape[-1]
        if self.omega is None:
            bits = xp.finfo(like.dtype).bits
            host = backend_of(xp).host(_cast_on_host, *self._drawing(d), bits)
            return xp.asarray(host, dtype=like.dtype, device=device(like))
        omega = _from_host(xp, "omega", self.omega, like)
        if omega.ndim != 2 or omega.shape[1] != d or omega.shape[0] == 0:
            msg = f"omega has shape {tuple(omega.shape)}, expected (m, {d}): one row per feature, as wide as q"
            raise ValueError(msg)
        if backend_of(xp).concrete(omega, like) and not bool(xp.all(xp.isfinite(omega))):
            msg = "omega holds NaN or infinite entries; draw it again, for example with subquad.draw_omega"
            raise ValueError(msg)
        return omega


def _cast_on_host(projection: str, m: int, d: int, seed: int, bits: int) -> np.ndarray[Any, Any]:
    return draw_omega(projection, m, d, seed).astype(f"float{bits}")


def _from_host(xp: ModuleType, name: str, x: Array, like: Array) -> Array:
    """An array of the library of `like`, or of NumPy, as an array beside `like`."""
    from_host = isinstance(x, np.ndarray) and not isinstance(like, np.ndarray)
    own = _arrays.check_arrays(**({} if from_host else {"q": like}), **{name: x})
    _arrays.check_floating(own, **{name: x})
    if from_host:
        return xp.asarray(x.astype(f"float{xp.finfo(like.dtype).bits}"), dtype=like.dtype, device=device(like))
    return _arrays.cast(xp, x, like.dtype)
