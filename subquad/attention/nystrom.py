"""Nyström attention (Xiong et al., "Nyströmformer", 2021).

    softmax(q kᵀ/√d) v  ≈  F A⁺ (B v)
    F = softmax(q k̃ᵀ/√d),    A = softmax(q̃ k̃ᵀ/√d),    B = softmax(q̃ kᵀ/√d)

where q̃ and k̃ are the landmarks, m rows each. B v is exact attention of the landmark queries to all keys. F (A⁺ B v) is
exact attention of all queries to the m landmark keys, with the values A⁺ B v. So the method is two calls of the kernel
`softmax_attention` and one small matrix, in O((n + n_kv) m (d + d_v)) time. `ridge_fit` has another way to such values.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

from subquad.attention.call import ArrayOptions, AttentionCall, enter
from subquad.attention.checks import check_mask
from subquad.attention.convolution import add_convolution
from subquad.attention.kmeans import MOST, Clusters, find_clusters
from subquad.attention.landmarks import count_visible, segment_means, uniform_rows
from subquad.attention.means import mean_row, self_attention_mask
from subquad.attention.method import Method
from subquad.attention.pseudo_inverse import OPTION_OF, PSEUDO_INVERSES, check_pinv_options, pinv_times
from subquad.attention.ridge_fit import Fit, fit_values, read_values, summary
from subquad.backend import Array
from subquad.core.checks import check_arrays, check_choice, check_count, check_floating, check_given, check_seed
from subquad.core.dtypes import cast
from subquad.core.loading import backend_of
from subquad.core.shapes import check_mask_axes
from subquad.core.states import State, StateSpec, merge_by_shift
from subquad.kernels.feature_attention import feature_summarize
from subquad.kernels.feature_map import Exponential
from subquad.kernels.landmark_attention import finite_queries, landmark_attention, landmark_weights
from subquad.kernels.max_shift import divide_or_zero
from subquad.kernels.softmax_attention import softmax_attention
from subquad.registry import register

LANDMARKS = ("segment-means", "uniform", "kmeans")
DRAWN = ("uniform", "kmeans")  # landmarks that a seed has an effect on


@register(
    "nystrom",
    aliases=("nystromformer",),
    cost="n m (d + d_v)",
    size="num_landmarks",
    defaults=({"num_landmarks": 32}, {"num_landmarks": 64}),
)
@dataclass(frozen=True, repr=False, eq=False)
class Nystrom(Method):
    """Nyström attention: out = F A⁺ (B v), in O((n + n_kv) m (d + d_v)).

        F = softmax(s q k̃ᵀ),    A = softmax(s q̃ k̃ᵀ),    B = softmax(s q̃ kᵀ)

    Parameters
    ----------
    num_landmarks : int, default 64
        The number of landmarks m. With n ≤ m or n_kv ≤ m, and landmarks that are not arrays, the output is exact
        attention.
    landmarks : {"segment-means", "uniform", "kmeans"} or (array, array), default "segment-means"
        How the landmarks are chosen:

        - "segment-means": the means of m consecutive segments of the visible rows;
        - "uniform": one random row from each of m strata of the visible rows;
        - "kmeans": the means of m clusters of the visible rows, found by k-means on a sample of 8 m rows;
        - a pair of arrays: q̃ and k̃, each (..., m, d).
    seed : int, default 0
        Seed of "uniform" landmarks, and of the sample of "kmeans"; raises ValueError with other landmarks.
    kmeans_iterations : int, default 5
        Number of times that the clusters of the sample are found again; raises ValueError without "kmeans".
    pinv : {"iterative", "exact", "ridge", "ridge-fit"}, default "iterative"
        How A⁺ is computed:

        - "iterative": the paper's third-order iteration, with a start value for each matrix;
        - "exact": the singular value decomposition with a cut-off;
        - "ridge": Tikhonov's (AᵀA + λ I)⁻¹ Aᵀ;
        - "ridge-fit": not at all. Each cluster of keys counts as often as it has keys, and its value and a matrix of
          the queries are fitted to exact attention at the clusters of the queries; needs "kmeans". See Notes.
    iterations : int, default 6
        Number of iterations of "iterative". A small number damps small singular values; more iterations amplify noise
        on real attention.
    rcond : float, default 1e-3
        Cut-off of "exact", relative to the largest singular value.
    ridge : float, optional
        λ of "ridge" (0.01 unless given) and of "ridge-fit". Default of the latter: the λ in 10, 1, …, 1e-5 with which
        the other clusters of queries predict each cluster best, for each head.
    conv_weights : array, shape (..., taps), optional
        Weights of a depth-wise convolution of v along the sequence, which is added to the output: an odd number of taps
        for each head. Needs n = n_kv.
    query_mask : array of bool, broadcastable to (..., n), optional
        True = the query enters the landmarks. Default: `key_mask` in self-attention (n = n_kv), otherwise all queries.

    Notes
    -----
    `causal=True` raises NotImplementedError, because a landmark mixes rows of all positions. The output is not a convex
    combination of values: large entries of A⁺ make single rows large. `summarize` and `attend` need landmarks that are
    arrays, such as `with_landmarks` makes; there is no `step`. Kernels: `landmark_attention`, which is
    `softmax_attention` and `iterative_pinv`; `nearest` with "kmeans", and `feature_summarize` in `summarize`.

    "kmeans" compares m centres with the 8 m rows of the sample, `kmeans_iterations` times, and with all rows once
    [2]_. Half of the centres of the keys begin at those of the largest logits to the mean query, if these have more
    than two fifths of its attention, or with "ridge-fit". Clusters are the same on every library as long as no row lies
    between two centres to rounding, and they are constant for gradients, which flow through the means.

    "ridge-fit" reads keys through clusters with means μ, variances σ² in each channel, sizes c and mean values v̄, and
    keeps no state::

        out = F (v̄ + Δ) + s q Γ + (q − r̄) D,    F = softmax(s q μᵀ + s² (q∘q) σ²ᵀ / 2 + log c)
        Δ, D = argmin ‖F̃ (v̄ + Δ) + s q̃ Γ + (q̃ − r̄) D − B v‖² + λ (g ‖Δ‖² + h ‖D‖²)

    where F̃ has the rows of F at the landmark queries q̃ of mean r̄, Γ is the covariance of keys and values inside
    clusters, and g and h are the means of the diagonals of F̃ᵀF̃ and (q̃ − r̄)ᵀ(q̃ − r̄). With a large λ a cluster has the
    mean of its values, and moves with the query to first order; with a small one the output interpolates exact
    attention at the landmarks.

    References
    ----------
    .. [1] Y. Xiong et al., "Nyströmformer", 2021, eqs. (13)–(15), (17) (iteration), section 3.2.
    .. [2] S. Lloyd, "Least squares quantization in PCM", 1982.

    Examples
    --------
    >>> import numpy as np, subquad
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = rng.standard_normal((3, 100, 8)) / 4
    >>> exact = subquad.attention(q, k, v, "exact")
    >>> bool(np.abs(subquad.attention(q, k, v, "nystrom", num_landmarks=100) - exact).max() < 1e-12)
    True
    >>> error = subquad.attention(q, k, v, "nystrom", num_landmarks=20) - exact
    >>> bool(np.linalg.norm(error) < 0.2 * np.linalg.norm(exact))
    True
    """

    causal = (
        "Nyström attention has no causal form: a landmark is made of rows of all positions, so later "
        "tokens would reach earlier rows; use 'favor', 'linear' or 'exact'"
    )
    state = StateSpec({"shift": ("m", 1), "numerator": ("m", "d_v"), "denominator": ("m", 1)}, merge_by_shift)

    num_landmarks: int | None = None
    landmarks: str | tuple[Array, Array] = "segment-means"
    seed: int | None = None
    kmeans_iterations: int | None = None
    pinv: str = "iterative"
    iterations: int | None = None
    rcond: float | None = None
    ridge: float | None = None
    conv_weights: Array | None = None
    query_mask: Array | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("pinv", self.pinv, PSEUDO_INVERSES)
        if isinstance(self.landmarks, str):
            check_choice("landmarks", self.landmarks, LANDMARKS)
        elif not isinstance(self.landmarks, tuple) or len(self.landmarks) != 2:
            msg = (
                f"landmarks must be one of {LANDMARKS} or a pair (q, k) of arrays, got {type(self.landmarks).__name__}"
            )
            raise TypeError(msg)
        else:
            check_given(**{"landmarks[0] (for q)": self.landmarks[0], "landmarks[1] (for k)": self.landmarks[1]})
        if self.num_landmarks is not None:
            check_count("num_landmarks", self.num_landmarks)
        if self.seed is not None:
            check_seed(self.seed)
            if self._chosen_by() not in DRAWN:
                msg = f'seed={self.seed} would have no effect: only landmarks="uniform" and "kmeans" are random'
                raise ValueError(msg)
        if self.kmeans_iterations is not None:
            check_count("kmeans_iterations", self.kmeans_iterations)
            if self._chosen_by() != "kmeans":
                msg = f'kmeans_iterations={self.kmeans_iterations} would have no effect without landmarks="kmeans"'
                raise ValueError(msg)
        if self.pinv == "ridge-fit" and self._chosen_by() != "kmeans":
            msg = (
                f'pinv="ridge-fit" needs landmarks="kmeans", got {self._chosen_by()}: it reads the number of keys in '
                f"the cluster of each landmark, and the mean of their values"
            )
            raise ValueError(msg)
        check_pinv_options(self.pinv, self._tuning())
        if not isinstance(self.landmarks, str) and self.query_mask is not None:
            msg = "query_mask chooses the rows of landmarks, which are given; leave one out"
            raise ValueError(msg)

    def with_landmarks(self, q: Array, k: Array, /, *, key_mask: Array | None = None) -> Nystrom:
        """Fix the landmarks: return this method with the landmarks of these queries and keys as arrays.

        Parameters
        ----------
        q : array, shape (..., n, d)
            Queries that the landmarks are chosen from.
        k : array, shape (..., n_kv, d)
            Keys that the landmarks are chosen from.
        key_mask : array of bool, broadcastable to (..., n_kv), optional
            True = keep.

        Returns
        -------
        Nystrom
            The method with ``landmarks=(q̃, k̃)``: m rows each, or the number of visible rows if it is smaller.

        Raises
        ------
        TypeError, ValueError
            As `subquad.attention`; ValueError also if no row is visible, or if the items of a batch have different
            numbers of visible rows below m.
        NotImplementedError
            With ``pinv="ridge-fit"``, which needs more than the landmarks.
        """
        self._check_no_fit("with_landmarks")
        holds = self._holds_arrays()
        options = self._array_options if holds else None
        call = enter(None, {"q": q, "k": k, "v": k}, key_mask=key_mask, array_options=options)
        query_mask = self._query_mask(call)
        chosen = self if holds else replace(self, num_landmarks=self._fitting(call, query_mask))
        with call.computing():
            q_land, _, k_land, _ = chosen._landmarks(call, query_mask)
        heads = call.arrangement.heads
        pair = heads.unfold(q_land), heads.unfold(k_land)
        return replace(self, landmarks=pair, num_landmarks=None, seed=None, kmeans_iterations=None, query_mask=None)

    def _reads_half(self, *, streaming: bool = False) -> bool:
        is_plain = self.conv_weights is None and self.pinv != "ridge-fit"
        return is_plain and (streaming or self._chosen_by() in ("segment-means", "arrays"))

    def _evaluate(self, call: AttentionCall) -> Array:
        query_mask = self._query_mask(call)
        xp, k, v, key_mask, scale = call.xp, call.k, call.v, call.key_mask, call.scale
        if not call.options and min(call.q.shape[-2], k.shape[-2]) <= self._m():
            call = call.widened()
            out = softmax_attention(call.q, call.k, call.v, scale=scale, key_mask=key_mask)
            if query_mask is not None:  # exact attention needs no landmarks: the mask only adds batch axes
                out = xp.broadcast_to(out, (*call.batch(query_mask=query_mask.shape[:-1]), *out.shape[-2:]))
            return add_convolution(call, out, self.conv_weights)
        if self.pinv == "ridge-fit":
            return add_convolution(call, self._fitted(call, query_mask), self.conv_weights)
        if self._is_plain() and key_mask is None:
            out = call.run(
                self, landmark_attention, call.q, k, v, m=self._m(), iterations=self.iterations or 6, scale=scale
            )
            return add_convolution(call, out, self.conv_weights)
        q_land, q_valid, k_land, k_valid = self._landmarks(call, query_mask)
        at_landmarks = softmax_attention(q_land, k, v, scale=scale, key_mask=key_mask)
        values = self._landmark_values(xp, q_land, q_valid, k_land, k_valid, at_landmarks, scale)
        if k_valid is not None:  # items with at most m visible keys: each key is its own landmark, and F v is exact
            few = count_visible(xp, key_mask)[..., None] <= self._m()
            visible = self._in_order(xp, v, key_mask)
            values = xp.where(few, visible, values)
        out = softmax_attention(call.q, k_land, values, scale=scale, key_mask=k_valid)
        return add_convolution(call, out, self.conv_weights)

    def _fitted(self, call: AttentionCall, query_mask: Array | None) -> Array:
        """The output of "ridge-fit": F(q) W + q L, with W and L fitted to exact attention at clusters of queries."""
        xp, v, key_mask, scale = call.xp, call.v, call.key_mask, call.scale
        q_mask = self._rows_of_landmarks(call, query_mask)
        rows, valid = self._choose_queries(call, q_mask)
        found = self._clusters(xp, call.k, key_mask, values=v, toward=mean_row(xp, call.q, q_mask) * scale)
        at_rows = softmax_attention(rows, call.k, v, scale=scale, key_mask=key_mask)
        fit = fit_values(xp, rows, valid, found, at_rows, scale=scale, ridge=self.ridge)
        if key_mask is not None:  # items with at most m visible keys: each key is its own cluster, and F v is exact
            few = count_visible(xp, key_mask)[..., None] <= self._m()
            fit = Fit(*(xp.where(few, x, y) for x, y in zip(summary(xp, found, scale), fit, strict=True)))
        return read_values(xp, call.q, found, fit, scale=scale)

    def _summarize(self, call: AttentionCall) -> State:
        # attention of landmark queries sums the features exp(s q̃·k) over keys, as a feature method does
        W_k = call.xp.matrix_transpose(call.options["landmarks_q"] * call.scale)
        none = None, None, None
        summary = feature_summarize(call.k, call.v, *none, W_k, None, phi=Exponential(0.0), key_mask=call.key_mask)
        return dict(zip(("shift", "numerator", "denominator"), summary, strict=True))

    def _attend(self, call: AttentionCall) -> Array:
        if self.conv_weights is not None:
            msg = "the convolution of conv_weights reads v, which a state does not hold; add it to the output yourself"
            raise NotImplementedError(msg)
        q_land, k_land, state = call.options["landmarks_q"], call.options["landmarks_k"], call.state
        assert state is not None
        self.state.check_sizes("state", state, m=q_land.shape[-2])
        at_landmarks = divide_or_zero(call.xp, state["numerator"], state["denominator"])
        values = self._landmark_values(call.xp, q_land, None, k_land, None, at_landmarks, call.scale)
        return softmax_attention(call.q, k_land, values, scale=call.scale)

    def _check_streams(self, call: str) -> StateSpec:
        self._check_no_fit(call)
        return super()._check_streams(call)

    def _check_no_fit(self, call: str) -> None:
        if self.pinv == "ridge-fit":
            msg = (
                f'Nystrom has no {call} with pinv="ridge-fit": it counts the keys of clusters of the whole sequence; '
                f'use pinv="ridge"'
            )
            raise NotImplementedError(msg)

    def why_no_matrix(self) -> str | None:
        if self.pinv != "ridge-fit" or self.ridge is not None:
            return None
        return 'weights of pinv="ridge-fit" depend on the values, by which λ is chosen; give it, as ridge'

    def _is_plain(self) -> bool:
        """Whether the kernel `landmark_attention` computes the method, without masks."""
        return self.landmarks == "segment-means" and self.pinv == "iterative" and self.query_mask is None

    def _m(self) -> int:
        return self.num_landmarks or 64

    def _fitting(self, call: AttentionCall, query_mask: Array | None) -> int:
        """m, or the number of visible rows if that is smaller, because an empty segment has no mean.

        Masks that are traced cannot be counted; m is then limited by the lengths alone.
        """
        xp, m = call.xp, min(self._m(), call.q.shape[-2], call.k.shape[-2])
        for name, mask in (("key_mask", call.key_mask), ("query_mask", query_mask)):
            if mask is None or 0 in mask.shape or not backend_of(xp).is_concrete(mask):
                continue
            count = count_visible(xp, mask)
            most = int(xp.max(count))
            if name == "key_mask":  # an item without keys has an output of 0, whatever its landmarks
                most = max(most, 1)
                count = xp.where(count == 0, most, count)
            least = int(xp.min(count))
            if least < min(m, most):
                msg = (
                    f"num_landmarks is {self._m()}, but {name} leaves between {least} and {most} rows to the items "
                    f"of the batch; take num_landmarks={max(least, 1)}, or fix the landmarks of each item on its own"
                )
                raise ValueError(msg)
            m = min(m, least)
        if m == 0:
            msg = "with_landmarks needs at least one visible query and one key, got none"
            raise ValueError(msg)
        return m

    def _tuning(self) -> dict[str, float | None]:
        return {"iterations": self.iterations, "rcond": self.rcond, "ridge": self.ridge}

    def _in_force(self) -> dict[str, Any]:
        options = super()._in_force()
        defaults = {"num_landmarks": 64, "seed": 0, "kmeans_iterations": 5, "iterations": 6, "rcond": 1e-3}
        defaults |= {"ridge": 1e-2} if self.pinv == "ridge" else {}
        unused = {name for name, pinvs in OPTION_OF.items() if self.pinv not in pinvs}
        if self._chosen_by() not in DRAWN:
            unused.add("seed")
        if self._chosen_by() != "kmeans":
            unused.add("kmeans_iterations")
        if not isinstance(self.landmarks, str):
            unused |= {"num_landmarks", "query_mask"}
        options |= {name: value for name, value in defaults.items() if options[name] is None}
        return {name: value for name, value in options.items() if name not in unused and value is not None}

    def _chosen_by(self) -> str:
        """The way in which landmarks are chosen; "arrays" if they are given."""
        return self.landmarks if isinstance(self.landmarks, str) else "arrays"

    def _choose(self, xp: ModuleType, x: Array, mask: Array | None) -> tuple[Array, Array | None]:
        if self._chosen_by() == "kmeans":
            found = self._clusters(xp, x, mask)
            return found.means, found.valid
        if self.landmarks == "uniform":
            return uniform_rows(xp, x, mask, self._m(), self.seed or 0)
        return segment_means(xp, x, mask, self._m())

    def _in_order(self, xp: ModuleType, v: Array, mask: Array) -> Array:
        """The values of at most m visible keys, in the places where these are landmarks."""
        if self.landmarks == "kmeans":
            return segment_means(xp, v, mask, self._m())[0]
        return self._choose(xp, v, mask)[0]

    def _clusters(self, xp: ModuleType, x: Array, mask: Array | None, **others: Any) -> Clusters:
        iterations, seed = self.kmeans_iterations or 5, self.seed or 0
        return find_clusters(xp, x, mask, self._m(), iterations=iterations, seed=seed, **others)

    def _rows_of_landmarks(self, call: AttentionCall, query_mask: Array | None) -> Array | None:
        """The mask of the queries that enter the landmarks."""
        return self_attention_mask(call) if query_mask is None else query_mask

    def _landmarks(
        self, call: AttentionCall, query_mask: Array | None
    ) -> tuple[Array, Array | None, Array, Array | None]:
        """(q̃, which of q̃ hold a row, k̃, which of k̃ hold a row); None in place of a mask: all do."""
        if call.options:
            return call.options["landmarks_q"], None, call.options["landmarks_k"], None
        xp, q_mask = call.xp, self._rows_of_landmarks(call, query_mask)
        q_land, q_valid = self._choose_queries(call, q_mask)
        if self.landmarks == "kmeans":
            toward = mean_row(xp, call.q, q_mask) * call.scale
            found = self._clusters(xp, call.k, call.key_mask, toward=toward, share=MOST)
            return q_land, q_valid, found.means, found.valid
        return q_land, q_valid, *self._choose(xp, call.k, call.key_mask)

    def _choose_queries(self, call: AttentionCall, mask: Array | None) -> tuple[Array, Array | None]:
        """(q̃, which of q̃ hold a row or None: all do)."""
        q_land, valid = self._choose(call.xp, call.q, mask)
        return finite_queries(call.xp, q_land), valid

    def _holds_arrays(self, *, streaming: bool = False) -> bool:
        return streaming or not isinstance(self.landmarks, str)

    def _array_options(self, xp: ModuleType, like: Array) -> ArrayOptions:
        if isinstance(self.landmarks, str):
            msg = (
                "a state needs landmarks that do not depend on the chunk: use method.with_landmarks(q, k), "
                "or pass landmarks=(q, k) as arrays"
            )
            raise ValueError(msg)
        q_land, k_land = self.landmarks
        check_arrays(q=like, landmarks_q=q_land, landmarks_k=k_land)
        check_floating(xp, landmarks_q=q_land, landmarks_k=k_land)
        m = self.num_landmarks
        for name, x in (("q", q_land), ("k", k_land)):
            fits = x.ndim >= 2 and x.shape[-1] == like.shape[-1] and x.shape[-2] == q_land.shape[-2]
            if not fits or (m is not None and x.shape[-2] != m):
                expected = f"(..., {m or 'm'}, {like.shape[-1]})"
                msg = f"landmarks for {name} have shape {tuple(x.shape)}, expected {expected}, as many for q as for k"
                raise ValueError(msg)
        return {"landmarks_q": cast(xp, q_land, like.dtype), "landmarks_k": cast(xp, k_land, like.dtype)}

    def _query_mask(self, call: AttentionCall) -> Array | None:
        """The option `query_mask`, checked and folded; None if it is not given."""
        if self.query_mask is None:
            return None
        check_arrays(q=call.q, query_mask=self.query_mask)
        mask = check_mask(call.xp, "query_mask", self.query_mask, call.q.shape[-2], "queries")
        heads = call.arrangement.heads
        check_mask_axes("query_mask", mask, heads.unfold(call.q).shape[:-2])
        mask = heads.fold(mask, tail=1)
        call.batch(query_mask=mask.shape[:-1])
        return mask

    def _landmark_values(
        self,
        xp: ModuleType,
        q_land: Array,
        q_valid: Array | None,
        k_land: Array,
        k_valid: Array | None,
        at_landmarks: Array,
        scale: float,
    ) -> Array:
        """A⁺ (B v), the values (..., m, d_v) of the landmark keys; `at_landmarks` is B v."""
        a = landmark_weights(xp, q_land, k_land, scale, q_valid, k_valid)
        return pinv_times(xp, a, at_landmarks, self.pinv, self._tuning())
