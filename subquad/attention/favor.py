"""FAVOR+: softmax attention through random features (Choromanski et al., "Rethinking Attention with Performers", 2021).

    softmax(q kᵀ/√d) v  ≈  φ(q) (φ(k)ᵀ v) / φ(q) (φ(k)ᵀ 1),    E[φ(q)·φ(k)] = exp(q·k/√d)

where x ← x d^(−1/4), ω_1 … ω_m are random directions, and φ(x) is one of five maps (a factor that all features of a row
have in common cancels):

    positive       exp(ω x − |x|²/2)                          eq. (8), lemma 1
    hyperbolic     [exp(ω x), exp(−ω x)] exp(−|x|²/2)         lemma 1
    trigonometric  [cos ω x, sin ω x] exp(|x|²/2)             section 2.3
    generalised    f(ω x) + ε                                 eq. (5), h = 1
    derf           exp(ω B x' − |x'|²/2 + b(ω))               fitted to q and k: `attention.derf`

O(n m (d + d_v)) time, O(m d_v) extra memory. Peaked attention needs m far beyond n: `subquad compare` shows the error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from types import ModuleType
from typing import Any

import numpy as np

from subquad.attention.call import ArrayOptions, AttentionCall, enter
from subquad.attention.derf import (
    Statistics,
    check_statistics,
    directions,
    find_statistics,
    given_statistics,
    mapped_keys,
    mapped_queries,
)
from subquad.attention.feature_method import FeatureMethod, Mapped
from subquad.attention.given_arrays import from_host
from subquad.attention.means import mean_row, self_attention_mask
from subquad.backend import Array
from subquad.core.beside import place_of
from subquad.core.checks import (
    check_choice,
    check_count,
    check_given,
    check_number,
    check_positive,
    check_seed,
)
from subquad.core.loading import backend_of
from subquad.kernels.feature_map import Elementwise, Exponential, FeatureMap, Trigonometric
from subquad.random import PROJECTIONS, draw_omega
from subquad.registry import register

Host = np.ndarray[Any, Any]
SOFTMAX_FEATURES = ("positive", "hyperbolic", "trigonometric", "derf")
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
    features : {"positive", "hyperbolic", "trigonometric", "derf", "relu"} or callable, default "positive"
        The map φ. The first four estimate the softmax kernel. "derf" are positive features of centred and balanced
        queries and keys, with directions as wide as these are spread, see Notes. "relu", and a callable f that is
        applied elementwise to ω x, define another kernel (generalised attention).
    projection : {"orthogonal", "hadamard", "givens", "iid"}, default "orthogonal"
        How ω is drawn; see `subquad.draw_omega`.
    omega : array, shape (m, d), optional
        The directions ω, as an array of the library of q or of NumPy. Excludes `num_features`, `seed` and `projection`.
    center : bool or (array, array), default False
        Subtract q̄ from queries and k̄ from keys before the features are taken; each has shape (d,) or (..., d). The
        softmax does not change, and the variance is that of ‖q − q̄ + k − k̄‖² in place of ‖q + k‖². True takes the
        means of the visible rows. Causal and streaming calls need the pair of arrays, since a mean over all rows would
        depend on later ones: see `with_statistics`.
    statistics : tuple of array, optional
        What "derf" features are fitted to, (q̄, k̄, M, M⁻¹, B): two means (..., d) and three matrices (..., d, d), as
        `with_statistics` returns them; constants for gradients. Default: those of the visible queries and keys of each
        item and head. Causal and streaming calls need the arrays, since statistics of all rows would depend on later
        ones.
    kernel_epsilon : float, default 0
        ε of the generalised kernel f(ω x) + ε (the Performer's code takes 0.001); must be 0 for the softmax features.

    Notes
    -----
    Sums over keys are kept relative to the largest exponent of each feature, a running maximum if causal: nothing
    overflows, and no row depends on a later key. For positive features, the relative variance of the estimate is about
    exp(‖q + k‖²/√d)/m: good for small logits, useless for peaked attention. O(n m (d + d_v)) operations, O(m d_v) extra
    memory. Kernels: `feature_whole`, or `feature_step` if causal.

    With x = √s (q − q̄) M, y = √s (k − k̄) M⁻¹ and u = ω B, "derf" estimates exp(x·y)/det B, without bias, by

        φ(x) = exp(u·x − ‖x‖²/2 + (‖ω‖² − ‖u‖²)/2),    φ(y) = exp(u·y − ‖y‖²/2),

    times exp(s q̄·(k − k̄)) for centring. M makes the covariances of x and y equal, T; B² = (3 + 2 S + (1 + 12 S +
    4 S²)^½)/4 with S = 2 T minimises the mean log variance in each eigendirection of T ([2]_, [3]_; their A is
    (I − B²)/4). This adds O(n d² + m d² + d³) operations, a copy of q and of k, and features of keys for each query
    head.

    References
    ----------
    .. [1] K. Choromanski et al., "Rethinking Attention with Performers", 2021, eqs. (5)–(8), lemma 1, algorithm 1.
    .. [2] V. Likhosherstov et al., "FAVOR#: Sharp Attention Kernel Approximations via New Classes of Positive Random
       Features", 2023: dense-exponential features, and balancing.
    .. [3] V. Likhosherstov et al., "Chefs' Random Tables: Non-Trigonometric Random Features", 2022: the optimal A.

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
    statistics: tuple[Array, Array, Array, Array, Array] | None = None
    kernel_epsilon: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
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
        if self.center is not False and self.features == "derf":
            msg = 'features="derf" is centred by its statistics; leave center out'
            raise ValueError(msg)
        check_statistics(self.statistics, self.features)
        if check_number("kernel_epsilon", self.kernel_epsilon) != 0:
            check_positive("kernel_epsilon", self.kernel_epsilon)
            if self.features in SOFTMAX_FEATURES:
                msg = f"kernel_epsilon belongs to generalised kernels; {self.features} features need none"
                raise ValueError(msg)

    @property
    def of_logits(self) -> bool:
        return self.features in SOFTMAX_FEATURES

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

    def with_statistics(
        self, q: Array, k: Array, /, *, key_mask: Array | None = None, scale: float | None = None
    ) -> Favor:
        """Fix what is taken from queries and keys: return this method with their `statistics`, or `center`, as arrays.

        Parameters
        ----------
        q : array, shape (..., n, d)
            Queries, of other data than those of causal calls.
        k : array, shape (..., n_kv, d)
            Keys.
        key_mask : array of bool, broadcastable to (..., n_kv), optional
            True = keep.
        scale : float, optional
            Factor of the logits q·k that the variance is minimal for; the estimate has no bias for any other. Default:
            d ** -0.5. Without effect on `center`.

        Returns
        -------
        Favor
            The method with ``statistics`` for ``features="derf"``, with ``center=(q_mean, k_mean)`` for
            ``center=True``: one for each item and head of the queries.

        Raises
        ------
        TypeError, ValueError
            As `subquad.attention`; ValueError also if the method takes nothing from queries and keys.
        """
        if self.features != "derf" and self.center is False:
            msg = f'features={self.features!r} without center has no statistics; take features="derf" or center=True'
            raise ValueError(msg)
        call = enter(None, {"q": q, "k": k, "v": k}, key_mask=key_mask, scale=scale)
        unfold = call.arrangement.heads.unfold
        with call.computing():
            if self.features == "derf":
                found = self._find_statistics(call)
                q_mean, k_mean, *maps = map(unfold, found)
                return replace(self, statistics=(q_mean[..., 0, :], k_mean[..., 0, :], *maps))
            q_mean, k_mean = map(unfold, replace(self, center=True)._center(call))
            return replace(self, center=(q_mean[..., 0, :], k_mean[..., 0, :]))

    def _reads_half(self, *, streaming: bool = False) -> bool:
        return self.features in ("positive", "hyperbolic") and self.center is not True

    def _keeps_map(self) -> bool:
        return self.features != "derf" and self.center is False

    def _prepare(self, call: AttentionCall) -> AttentionCall:
        if self.features != "derf":
            return call
        found = self._find_statistics(call) if self.statistics is None else Statistics(**call.options)
        q = None if call.q is None else mapped_queries(call.xp, found, call.q)
        k = None if call.k is None else mapped_keys(call.xp, found, call.k)
        return call.with_rows(q, k, found._asdict())

    def _map(self, call: AttentionCall) -> Mapped:
        if self.features == "derf":
            found = Statistics(**call.options)
            if self.omega is None:
                omega_t, _ = self._drawn(call.xp, found.q_mean, 1.0)
            else:
                omega_t = call.xp.matrix_transpose(self._given_omega(call.xp, found.q_mean))
            return Exponential(call.scale), directions(call.xp, found, omega_t, call.scale)
        center = self._center(call)
        scale, like = call.scale, call.like
        twice = self.features == "hyperbolic"
        drawn = self.omega is None

        def directions_of_call() -> tuple[Array, Array]:
            if drawn:
                return self._drawn(call.xp, like, scale, twice=twice)
            return _weights(call.xp, call.xp.matrix_transpose(self._given_omega(call.xp, like)), scale, twice)

        W_k, W_q = call.made_of(self, "directions", self.omega, directions_of_call)
        return self._feature_map(scale), (W_k, W_q, *center)

    def _drawn(self, xp: ModuleType, like: Array, scale: float, *, twice: bool = False) -> tuple[Array, Array]:
        """(W_k, W_q) of drawn directions, in the library and dtype and on the device of `like`."""
        bits = xp.finfo(like.dtype).bits
        host = backend_of(xp).on_host(_weights_on_host, *self._drawing(like.shape[-1]), bits, scale, twice)
        W_k = xp.asarray(host[0], dtype=like.dtype, device=place_of(like))
        return W_k, xp.asarray(host[1], dtype=like.dtype, device=place_of(like)) if scale < 0 else W_k

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
        if call.causal or call.q is None or call.k is None:  # without queries or keys: a part of a call with `visible`
            msg = "center=True would let the mean of later keys into earlier rows; pass center=(q_mean, k_mean)"
            raise NotImplementedError(msg)
        return mean_row(call.xp, call.q, self_attention_mask(call)), mean_row(call.xp, call.k, call.key_mask)

    def _find_statistics(self, call: AttentionCall) -> Statistics:
        """The statistics of the visible rows of a call."""
        if call.causal or call.q is None or call.k is None:
            msg = (
                'features="derf" would let later rows into the statistics of earlier ones; '
                "fix them: method.with_statistics(q, k), with rows of other data"
            )
            raise NotImplementedError(msg)
        return find_statistics(call.xp, call.q, call.k, self_attention_mask(call), call.key_mask, call.scale)

    def _holds_arrays(self, *, streaming: bool = False) -> bool:
        if self.features == "derf":
            return streaming or self.statistics is not None
        return self.center is not False and (streaming or self.center is not True)

    def _array_options(self, xp: ModuleType, like: Array) -> ArrayOptions:
        if self.features == "derf":
            return given_statistics(xp, self.statistics, like)
        if self.center is True:
            msg = "a state needs the same center for every chunk; pass center=(q_mean, k_mean)"
            raise ValueError(msg)
        assert isinstance(self.center, tuple)
        pair = {}
        for name, x in zip(("q_mean", "k_mean"), self.center, strict=True):
            x = from_host(xp, name, x, like)
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
        unused = {"center"} if self.features == "derf" else {"statistics"}
        options = {name: value for name, value in options.items() if name not in unused}
        if self.omega is None:
            options["projection"], options["num_features"], _, options["seed"] = self._drawing(0)
            return {name: value for name, value in options.items() if name != "omega"}
        return {name: value for name, value in options.items() if name not in ("num_features", "seed", "projection")}

    def _given_omega(self, xp: ModuleType, like: Array) -> Array:
        """The option `omega`, checked, in the library and dtype and on the device of `like`."""
        d = like.shape[-1]
        omega = from_host(xp, "omega", self.omega, like)
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
