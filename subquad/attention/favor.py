"""FAVOR+: softmax attention through random features (Choromanski et al., "Rethinking Attention with Performers", 2021).

    softmax(q kᵀ/√d) v  ≈  φ(q) (φ(k)ᵀ v) / φ(q) (φ(k)ᵀ 1),    E[φ(q)·φ(k)] = exp(q·k/√d)

where x ← x d^(−1/4), ω_1 … ω_m are random directions, and φ(x) is one of four maps (a factor that all features of a row
have in common cancels):

    positive       exp(ω x − |x|²/2)                          eq. (8), lemma 1
    hyperbolic     [exp(ω x), exp(−ω x)] exp(−|x|²/2)         lemma 1
    trigonometric  [cos ω x, sin ω x] exp(|x|²/2)             section 2.3
    generalised    f(ω x) + ε                                 eq. (5), h = 1

O(n m (d + d_v)) time, O(m d_v) extra memory. Peaked attention needs m far beyond n: `subquad compare` shows the error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import Any

import numpy as np

from subquad.attention.call import ArrayOptions, AttentionCall
from subquad.attention.feature_method import FeatureMethod, Mapped
from subquad.attention.means import mean_row, self_attention_mask
from subquad.backend import Array
from subquad.core.beside import place_of
from subquad.core.checks import (
    check_arrays,
    check_choice,
    check_count,
    check_floating,
    check_given,
    check_number,
    check_positive,
    check_seed,
)
from subquad.core.dtypes import cast
from subquad.core.loading import backend_of
from subquad.kernels.feature_map import Elementwise, Exponential, FeatureMap, Trigonometric
from subquad.random import PROJECTIONS, draw_omega
from subquad.registry import register

Host = np.ndarray[Any, Any]
SOFTMAX_FEATURES = ("positive", "hyperbolic", "trigonometric")
FEATURES = (*SOFTMAX_FEATURES, "relu")


@register(
    "favor",
    aliases=("performer",),
    cost="n m (d + d_v)",
    size="num_features",
    defaults=({"num_features": 64}, {"num_features": 256}),
)
@dataclass(frozen=True, repr=False, eq=False)
class Favor(FeatureMethod):
    """FAVOR+ (Performer): softmax attention through random features, in O(n m (d + d_v)).

        out[i] = φ(q[i])ᵀ Σ_j φ(k[j]) v[j]ᵀ / φ(q[i])ᵀ Σ_j φ(k[j])

    Parameters
    ----------
    num_features : int, default 256
        m, the number of random directions ω. The hyperbolic and the trigonometric map have 2 m features.
    seed : int, default 0
        Seed of ω. Equal seeds give equal bits of ω on every library.
    features : {"positive", "hyperbolic", "trigonometric", "relu"} or callable, default "positive"
        The map φ. The first three estimate the softmax kernel. "relu", and a callable f that is applied elementwise to
        ω x, define another kernel (generalised attention).
    projection : {"orthogonal", "hadamard", "givens", "iid"}, default "orthogonal"
        How ω is drawn; see `subquad.draw_omega`.
    omega : array, shape (m, d), optional
        The directions ω, as an array of the library of q or of NumPy. Excludes `num_features`, `seed` and `projection`.
    center : bool or (array, array), default False
        Subtract q̄ from queries and k̄ from keys before the features are taken; each has shape (d,) or (..., d). The
        softmax does not change, and the variance is that of ‖q − q̄ + k − k̄‖² in place of ‖q + k‖². True takes the
        means of the visible rows. Causal and streaming calls need the pair of arrays, since a mean over all rows would
        depend on later ones.
    kernel_epsilon : float, default 0
        ε of the generalised kernel f(ω x) + ε (the Performer's code takes 0.001); must be 0 for the softmax features.

    Notes
    -----
    Sums over keys are kept relative to the largest exponent of each feature, a running maximum if causal: nothing
    overflows, and no row depends on a later key. For positive features, the relative variance of the estimate is about
    exp(‖q + k‖²/√d)/m: good for small logits, useless for peaked attention. O(n m (d + d_v)) operations, O(m d_v) extra
    memory. Kernels: `feature_summarize` and `feature_attend`, or `feature_step` if causal.

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
            check_count("num_features", self.num_features)
        if self.seed is not None:
            check_seed(self.seed)
        if self.projection is not None:
            check_choice("projection", self.projection, PROJECTIONS)
        if not callable(self.features):
            check_choice("features", self.features, FEATURES)
        if self.omega is not None:
            for name in ("num_features", "seed", "projection"):
                if getattr(self, name) is not None:
                    msg = f"omega is given, so {name}={getattr(self, name)!r} would have no effect; leave one out"
                    raise ValueError(msg)
        if not isinstance(self.center, bool | tuple) or (isinstance(self.center, tuple) and len(self.center) != 2):
            msg = f"center must be True, False or a pair (q_mean, k_mean) of arrays, got {self.center!r}"
            raise TypeError(msg)
        if isinstance(self.center, tuple):
            check_given(**{"center[0] (q_mean)": self.center[0], "center[1] (k_mean)": self.center[1]})
        if self.center is not False and self.features not in SOFTMAX_FEATURES:
            msg = f"center leaves only the softmax kernel unchanged; features={self.features!r} is another kernel"
            raise ValueError(msg)
        if check_number("kernel_epsilon", self.kernel_epsilon) != 0:
            check_positive("kernel_epsilon", self.kernel_epsilon)
            if self.features in SOFTMAX_FEATURES:
                msg = f"kernel_epsilon belongs to generalised kernels; {self.features} features need none"
                raise ValueError(msg)

    def draw_omega(self, d: int) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Draw ω for d channels by the options of this method.

        Parameters
        ----------
        d : int
            Number of channels of queries and keys.

        Returns
        -------
        numpy.ndarray, shape (m, d), float64
            The directions, read-only. An option `omega` is not considered.
        """
        return draw_omega(*self._drawing(d))

    def _map(self, call: AttentionCall) -> Mapped:
        center = self._center(call)
        scale, like = call.scale, call.like
        twice = self.features == "hyperbolic"
        if self.omega is None:
            bits = call.xp.finfo(like.dtype).bits
            host = call.arrangement.backend.on_host(
                _weights_on_host, *self._drawing(like.shape[-1]), bits, scale, twice
            )
            W_k = call.xp.asarray(host[0], dtype=like.dtype, device=place_of(like))
            W_q = call.xp.asarray(host[1], dtype=like.dtype, device=place_of(like)) if scale < 0 else W_k
        else:
            omega = self._given_omega(call.xp, like)
            W_k, W_q = _weights(call.xp, call.xp.matrix_transpose(omega), scale, twice)
        return self._feature_map(scale), (W_k, W_q, *center)

    def _feature_map(self, scale: float) -> FeatureMap:
        if self.features in ("positive", "hyperbolic"):
            return Exponential(scale)
        if self.features == "trigonometric":
            return Trigonometric(scale)
        return Elementwise(self.features, float(self.kernel_epsilon))

    def _center(self, call: AttentionCall) -> tuple[Array, ...]:
        """(q̄, k̄), (..., 1, d) each: the pair given, or the means of the visible rows; () without centring."""
        if self.center is not True:
            return tuple(call.options.values())
        if call.causal:
            msg = "center=True would let the mean of later keys into earlier rows; pass center=(q_mean, k_mean)"
            raise NotImplementedError(msg)
        return mean_row(call.xp, call.q, self_attention_mask(call)), mean_row(call.xp, call.k, call.key_mask)

    def _holds_arrays(self, *, streaming: bool = False) -> bool:
        return self.center is not False and (streaming or self.center is not True)

    def _array_options(self, xp: ModuleType, like: Array) -> ArrayOptions:
        if self.center is True:
            msg = "a state needs the same center for every chunk; pass center=(q_mean, k_mean)"
            raise ValueError(msg)
        assert isinstance(self.center, tuple)
        pair = {}
        for name, x in zip(("q_mean", "k_mean"), self.center, strict=True):
            x = _from_host(xp, name, x, like)
            if x.ndim == 0 or x.shape[-1] != like.shape[-1]:
                msg = f"{name} has shape {tuple(x.shape)}, expected ({like.shape[-1]},) or (..., {like.shape[-1]})"
                raise ValueError(msg)
            pair[name] = xp.expand_dims(x, axis=-2)
        return pair

    def _drawing(self, d: int) -> tuple[str, int, int, int]:
        """The arguments (projection, m, d, seed) of `subquad.draw_omega`, with defaults filled in."""
        return self.projection or "orthogonal", self.num_features or 256, d, self.seed or 0

    def _in_force(self) -> dict[str, Any]:
        options = super()._in_force()
        if self.omega is None:
            options["projection"], options["num_features"], _, options["seed"] = self._drawing(0)
            return {name: value for name, value in options.items() if name != "omega"}
        return {name: value for name, value in options.items() if name not in ("num_features", "seed", "projection")}

    def _given_omega(self, xp: ModuleType, like: Array) -> Array:
        """The option `omega`, checked, in the library and dtype and on the device of `like`."""
        d = like.shape[-1]
        omega = _from_host(xp, "omega", self.omega, like)
        if omega.ndim != 2 or omega.shape[1] != d or omega.shape[0] == 0:
            msg = f"omega has shape {tuple(omega.shape)}, expected (m, {d}): one row per feature, as wide as q"
            raise ValueError(msg)
        if backend_of(xp).is_concrete(omega, like) and not bool(xp.all(xp.isfinite(omega))):
            msg = "omega holds NaN or infinite entries; draw it again, for example with subquad.draw_omega"
            raise ValueError(msg)
        return omega


def _weights(xp: ModuleType, directions: Array, scale: float, twice: bool) -> tuple[Array, Array]:
    """(W_k, W_q), both (d, m), or (d, 2 m) with `twice`: the directions times √|scale|, since ω (√s x) = (√s ω) x.

    A negative scale changes the sign of W_q.
    """
    directions = directions * abs(scale) ** 0.5
    if twice:
        directions = xp.concat([directions, -directions], axis=-1)
    return directions, -directions if scale < 0 else directions


def _weights_on_host(*drawing: Any) -> tuple[Host, Host]:
    """`_drawn_weights(*drawing)`: a plain function, because tracers cannot be told to call an `lru_cache` object."""
    return _drawn_weights(*drawing)


@lru_cache(maxsize=128)
def _drawn_weights(
    projection: str, m: int, d: int, seed: int, bits: int, scale: float, twice: bool
) -> tuple[Host, Host]:
    """(W_k, W_q) of drawn directions as NumPy arrays; ω is first rounded to the float dtype with `bits` bits.

    The cached arrays must not be written to. They are not marked as read-only, because PyTorch shares their memory and
    warns of read-only arrays.
    """
    omega = draw_omega(projection, m, d, seed).astype(f"float{bits}")
    return _weights(np, omega.T, scale, twice)


def _from_host(xp: ModuleType, name: str, x: Array, like: Array) -> Array:
    """`x`, of NumPy or of the library of `like`, as an array in the library and dtype and on the device of `like`."""
    from_host = isinstance(x, np.ndarray) and not isinstance(like, np.ndarray)
    own = check_arrays(**({} if from_host else {"q": like}), **{name: x})
    check_floating(own, **{name: x})
    if from_host:
        return xp.asarray(x.astype(f"float{xp.finfo(like.dtype).bits}"), dtype=like.dtype, device=place_of(like))
    return cast(xp, x, like.dtype)
