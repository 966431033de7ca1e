"""The table of kernels: example inputs of each, and backends with a single override whose calls are recorded."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from array_api_compat import array_namespace

from rows.libraries import CuPy, Jax, Library, NumPy, Torch, TorchCuda
from rows.scans import SCANS
from subquad import kernels
from subquad.backend import Backend, Override
from subquad.core import loading
from subquad.core.kernel import Choice, Kernel, listening
from subquad.core.loading import backend_of
from subquad.kernels.clustered_attention import bands_of
from subquad.kernels.feature_map import Elu, Exponential, FeatureMap
from subquad.kernels.visibility import CAUSAL

Array = np.ndarray
HALVES = ("float16", "bfloat16")
Arrays = tuple[Array | None, ...]
KERNELS: dict[str, Kernel] = {name: getattr(kernels, name) for name in kernels.__all__}
D, D_V, M = 8, 3, 12  # channels of rows, of values; features


@dataclass(frozen=True, eq=False)
class Example:
    """Inputs of a kernel; `options` has a value for each optional keyword, of which a call takes some."""

    kernel: str
    name: str
    draw: Callable[[], Arrays]
    static: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    never_half: tuple[int, ...] = ()  # arrays that have float32 where the others have half precision

    def __str__(self) -> str:
        return self.name

    @functools.cached_property
    def arrays(self) -> Arrays:
        """The positional arguments, float64 or complex128; what is integer or bool stays so in every call."""
        return self.draw()

    @property
    def is_complex(self) -> bool:
        return any(x is not None and np.iscomplexobj(x) for x in self.arrays)

    def given(self, library: Library, dtype: str, chosen: Iterable[str] = ()) -> tuple[list[Any], dict[str, Any]]:
        """(arrays of a library, keywords), with the optional keywords that are chosen."""
        wide = "float32" if dtype in HALVES else dtype
        arrays = [None if x is None else library.array(x, wide if i in self.never_half else dtype)
                  for i, x in enumerate(self.arrays)]  # fmt: skip
        keywords = {name: self.options[name] for name in chosen}
        if "key_mask" in keywords:
            keywords["key_mask"] = library.array(keywords["key_mask"], dtype)
        return arrays, {**self.static, **keywords}


def normal(*shapes: tuple[int, ...], seed: int = 0) -> list[Array]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape) for shape in shapes]


def some_hidden(*shape: int) -> Array:
    """A mask in which every item has hidden keys and visible keys."""
    return np.random.default_rng(1).random(shape) < 0.7


def landmark_attention(name: str, q: tuple[int, ...], kv: tuple[int, ...], m: int, d_v: int = D_V) -> Example:
    return Example(
        "landmark_attention", name, lambda: tuple(normal((*q, D), (*kv, D), (*kv, d_v))),
        {"m": m, "iterations": 6, "scale": D**-0.5},
    )  # fmt: skip


def softmax_attention(name: str, q: tuple[int, ...], kv: tuple[int, ...], d: int = D, d_v: int = D_V) -> Example:
    return Example(
        "softmax_attention", name, lambda: tuple(normal((*q, d), (*kv, d), (*kv, d_v))),
        {"scale": 0.3}, {"visible": CAUSAL, "key_mask": some_hidden(*kv)},
    )  # fmt: skip


def block_attention(
    name: str, q: tuple[int, ...], kv: tuple[int, ...], d: int = D, d_v: int = D_V, size: int = 16
) -> Example:
    """Causal rows with what the name says besides; `places` are those of sorted keys, as after hashing."""
    n, n_kv, rng = q[-1], kv[-1], np.random.default_rng(2)
    count, total = -(-n // size), -(-n_kv // size)
    keys = dict.fromkeys(("blocks", "place", "avoid", "met_q", "met_k", "pairs", "bias"))
    start, stop = np.maximum(np.arange(n) - 20, 0), np.minimum(np.arange(n) + 1, n_kv)
    if "items" in name:  # intervals of each item, some of them empty
        start, stop = np.sort(rng.integers(0, n_kv + 1, (2, *q[:-1], n)), axis=0)
    if "lists" in name:
        shape = q[:-1] if "items" in name else ()
        order = np.argsort(rng.random((*shape, count, total)), axis=-1)
        keys["blocks"] = np.where(np.arange(total) % 3 == 1, -1, order)[..., : total - 1]
    if "places" in name:
        order = np.argsort(rng.random((2, *q[:-1], max(n, n_kv))), axis=-1)
        keys["place"] = order[0, ..., :n_kv] if n_kv >= n else rng.permutation(n_kv)
        keys["avoid"] = order[1, ..., :n]
        start, stop = np.zeros((*q[:-1], n), int), order[1, ..., :n] + 30
    if "met" in name:
        keys["met_q"], keys["met_k"] = rng.integers(0, 6, (*q[:-1], n, 2)), rng.integers(0, 6, (n_kv, 2))
    if "pairs" in name:
        keys["pairs"], keys["bias"] = rng.random((n, n_kv)) < 0.6, rng.standard_normal((*q[:-1], 1, n_kv))
        keys["bias"] = np.broadcast_to(keys["bias"], (*q[:-1], n, n_kv)).copy()
    whole = [
        None if x is None else x.astype(np.int32) if x.dtype.kind == "i" else x for x in (start, stop, *keys.values())
    ]
    return Example(
        "block_attention", name, lambda: (*normal((*q, d), (*kv, d), (*kv, d_v)), *whole), {"scale": 0.3, "size": size},
        {"softcap": 1.5, "wide": True, "key_mask": some_hidden(*kv)},
    )  # fmt: skip


def sampled_attention(name: str, q: tuple[int, ...], kv: tuple[int, ...], *, d_v: int = D_V, every: int = 1) -> Example:
    """Rows that see all keys or, with the words, intervals of each item, some of them empty; or picked among others."""
    n, n_kv, rng = q[-1], kv[-1], np.random.default_rng(2)
    sight = np.stack([np.zeros(n), np.full(n, n_kv)])
    if "items" in name:
        sight = np.sort(rng.integers(0, n_kv + 1, (2, *q[:-1], n)), axis=0)
    start, stop = sight.astype(np.int32)
    numbers = (3 * np.arange(n) + rng.integers(0, 3, n)).astype(np.int32) if "picked" in name else None
    rows = n if numbers is None else 3 * n
    return Example(
        "sampled_attention", name,
        lambda: (*normal((*q[:-1], rows, D), (*kv, D), (*kv, d_v)), start, stop, numbers),
        {"scale": 0.3, "every": every}, {"key_mask": some_hidden(*kv)},
    )  # fmt: skip


def sampled_errors(
    name: str, rows: tuple[int, ...], outs: tuple[int, ...], *, d_v: int = D_V, out_of: int = 999
) -> Example:
    """Rows of an output with some batch axes, about half of which count; with the word "picked", among other rows."""

    def draw() -> Arrays:
        rng = np.random.default_rng(3)
        exact, mean, off = normal((*rows, d_v), (*rows, d_v), (*outs, d_v))
        seeing, out, numbers = rng.random(rows) < 0.5, exact + off / 5, None
        if "picked" in name:
            whole, numbers = rng.standard_normal((*outs[:-1], 3 * outs[-1], d_v)), np.arange(outs[-1], dtype=np.int32)
            numbers = 3 * numbers + rng.integers(0, 3, outs[-1], dtype=np.int32)
            whole[..., numbers, :] = out
            out = whole
        return exact, mean, out, seeing, np.where(seeing, 1 + 9 * rng.random(rows), 0)[..., ::3], numbers

    return Example("sampled_errors", name, draw, {"tolerance": 0.2, "out_of": out_of})


def hashed_attention(
    name: str, q: tuple[int, ...], kv: tuple[int, ...], *, d_v: int = D_V, size: int = 16, rounds: int = 3
) -> Example:
    """Rows and keys that meet by chance; with the words, causal rows, and rows that do not see their own place."""
    n, n_kv, rng = q[-1], kv[-1], np.random.default_rng(2)
    place = np.arange(n) + n_kv - n
    stop = np.minimum(place + 1, n_kv) if "causal" in name else np.full(n, n_kv)
    of_rows, of_keys = (np.argsort(rng.random((*x[:-1], rounds, x[-1])), axis=-1) for x in (q, kv))
    chunks = [
        np.swapaxes(np.argsort(x, axis=-1) // size, -1, -2)[..., : max(rounds - 1, 1)] for x in (of_rows, of_keys)
    ]
    avoid = place if "avoid" in name else None
    whole = [None if x is None else x.astype(np.int32) for x in (np.zeros(n), stop, avoid, of_rows, of_keys, *chunks)]
    return Example(
        "hashed_attention", name, lambda: (*normal((*q, D), (*kv, D), (*kv, d_v)), *whole),
        {"scale": 0.3, "size": size}, {"key_mask": some_hidden(*kv)},
    )  # fmt: skip


def hashed_order(
    name: str, x: tuple[int, ...], *, rounds: int = 3, first: int = 8, second: int = 0, size: int = 16, d: int = D
) -> Example:
    return Example(
        "hashed_order", name, lambda: tuple(normal((*x, d), (rounds, d, (first + second) // 2))),
        {"first": first, "second": second, "size": size}, {"key_mask": some_hidden(*x)},
    )  # fmt: skip


def nearest(
    name: str, x: tuple[int, ...], centres: tuple[int, ...], *, d: int = D, values: tuple[int, ...] | None = None
) -> Example:
    """Rows, some of which are not finite where the name says so, and centres."""

    def draw() -> Arrays:
        rows, middles = normal((*x, d), (*centres, d))
        if "finite" in name:
            rows[..., 3, -1], rows[..., 5, 0] = np.nan, np.inf
        return rows, middles, None if values is None else normal((*values, D_V), seed=4)[0]

    return Example("nearest", name, draw, {}, {"key_mask": some_hidden(*x)})


def balanced_tree(*shape: int, size: int) -> Example:
    """Rows of several centres, which no split cuts at a tie."""

    def draw() -> Arrays:
        rows, centres, sketch = normal((*shape, D), (5, D), (D, 32))
        return 0.5 * rows + centres[np.arange(shape[-1]) * 7 % 5], sketch

    name = "×".join(map(str, shape)) + f" by {size}"
    return Example("balanced_tree", name, draw, {"size": size}, {"key_mask": some_hidden(*shape)})


def clusters_of(*batch: int, n: int, size: int) -> tuple[np.ndarray[Any, Any], ...]:
    """An order of n rows in clusters, and their numbers of rows: few in some, none in the last but one."""
    clusters = -(-n // size)
    rng = np.random.default_rng(3)
    order = np.stack([rng.permutation(clusters * size) % n for _ in range(math.prod(batch))])
    counts = np.full((*batch, clusters), size, np.int32)
    counts[..., ::3] = size // 2 + 1  # of two rows, both are as far from their mean
    counts[..., -2:-1] = 0
    return order.astype(np.int32).reshape(*batch, clusters * size), counts


def cluster_members(*shape: int, size: int, batch: tuple[int, ...] = ()) -> Example:
    """Rows in clusters, for orders of a batch of their own."""

    def draw() -> Arrays:
        return normal((*shape, D))[0], *clusters_of(*batch or shape[:-1], n=shape[-1], size=size)

    name = "×".join(map(str, shape)) + f" by {size}" + (f" for {batch}" if batch else "")
    return Example("cluster_members", name, draw, {"size": size}, {"turned": True})


def cluster_spread(*shape: int, size: int, seen: bool = True, d: int = D) -> Example:
    """How far the rows of clusters spread, as queries see them or of each channel."""

    def draw() -> Arrays:
        x, metric = normal((*shape, d), (d, d))
        order, counts = clusters_of(*shape[:-1], n=shape[-1], size=size)
        sight = np.exp(normal((*counts.shape, d), seed=5)[0])
        return x, x @ metric if seen else None, order, counts, sight if seen else None

    name = "×".join(map(str, shape)) + f" by {size}, {d} wide" + (", as seen" if seen else "")
    return Example("cluster_spread", name, draw, {"size": size}, {})


def clustered_attention(
    name: str, q: tuple[int, ...], kv: tuple[int, ...], *, size: int = 8, opened: int = 2, d_v: int = D_V
) -> Example:
    """C · size keys in clusters, some of them not full, with what the name says: a prefix of clusters for each
    row, the near keys of which each row leaves out, what it has seen before."""
    n, count, rng = q[-1], kv[-1] // size, np.random.default_rng(2)
    counts = np.where(rng.random((*kv[:-1], count)) < 0.7, size, rng.integers(0, size, (*kv[:-1], count)))
    stop = rng.integers(0, count + 1, n) if "prefix" in name else np.full(n, count)
    order = np.argsort(rng.random(kv), axis=-1)
    holds = np.arange(size) < counts[..., None]
    cluster_of = np.where(holds.reshape(kv), np.arange(kv[-1]) // size, -1)
    cluster_of = np.take_along_axis(cluster_of, np.argsort(order, axis=-1), axis=-1)
    near = [order, np.arange(n) + kv[-1] - n, cluster_of] if "near" in name else [None] * 3
    near = [None if x is None else x.astype(np.int32) for x in near]
    groups, options = (count - 1) // 3, {"always": 1, "reach": 2, "group": 3, "expanded": 2, "share": 0.1}

    def draw() -> Arrays:
        rows, k, v, *before = normal((*q, D), (*kv, D), (*kv, d_v), (*q, d_v), q)
        share = (holds / np.maximum(counts, 1)[..., None])[..., None]
        of_clusters = [x.reshape(*kv[:-1], count, size, -1) for x in (k, v)]
        means, mean_values = ((x * share).sum(axis=-2) for x in of_clusters)
        spread = (of_clusters[0] - means[..., None, :]) ** 2 * share
        spread = np.concatenate([means[..., ::-1] / 3, spread.sum(axis=-2)[..., : bands_of(D)]], axis=-1)
        columns = np.swapaxes(of_clusters[0], -1, -2).reshape(*kv[:-1], count * D, size)
        of_groups = [x[..., 1 : 1 + 3 * groups, :].reshape(*kv[:-1], groups, 3, -1).mean(axis=-2)
                     for x in (means, spread, mean_values)] if "groups" in name else [None] * 3  # fmt: skip
        return (rows, columns, v, near[0], means, spread, mean_values, counts.astype(np.int32), *of_groups,
                stop.astype(np.int32), *near[1:], *(before if "before" in name else (None, None)))  # fmt: skip

    return Example("clustered_attention", name, draw, {"scale": 0.3, "opened": opened}, options)


def centroid_attention(name: str, q: tuple[int, ...], kv: tuple[int, ...], *, size: int = 8, d_v: int = D_V) -> Example:
    """Four clusters of at most four of sixteen keys in each block; rows that have read blocks, intervals in them, or
    keys that they met."""
    n, n_kv, rng = q[-1], kv[-1], np.random.default_rng(2)
    blocks = -(-n_kv // 16)
    order = np.argsort(rng.random((*kv[:-1], blocks, 16)), axis=-1) + 16 * np.arange(blocks)[:, None]
    members = order.reshape(*kv[:-1], blocks * 4, 4)
    members = np.where((members < n_kv) & (rng.random(members.shape) < 0.8), members, -1)
    clusters, place = blocks * 4, np.arange(n) + n_kv - n
    of_rows = dict.fromkeys(("start", "stop", "met_q", "met_k"))
    first = np.maximum(np.arange(-(-n // size)) * size + n_kv - n - 9, -1) // 16
    listed = first[:, None] + np.arange(2)
    if "intervals" in name:
        of_rows |= {"start": place - 9, "stop": np.minimum(place + 1, n_kv)}
        listed = first[:, None] + np.arange(-(-(size + 25) // 16) + 1)
    if "met" in name:
        shape = (*kv[:-1], clusters * 4, 2)
        of_rows |= {"met_q": rng.integers(0, 6, (*q[:-1], n, 2)), "met_k": rng.integers(0, 6, shape)}
    listed = np.where((listed >= 0) & (listed < blocks), listed, -1)
    ends = place if "causal" in name else None
    whole = [None if x is None else x.astype(np.int32) for x in (members, ends, listed, *of_rows.values())]

    def draw() -> Arrays:
        shape = (*kv[:-1], clusters)
        rows, means, spread, values = normal((*q, D), (*shape, D), (*shape, D), (*shape, d_v))
        return (rows, means, spread**2, values, *whole)

    return Example("centroid_attention", name, draw, {"scale": 0.3, "size": size, "per_block": 4, "length": 16})


# name → map and its weights
PHI: dict[str, tuple[FeatureMap, Callable[[], tuple[Array | None, ...]]]] = {
    "exponential": (Exponential(-(D**-0.5)), lambda: directions()),
    "centred": (Exponential(D**-0.5), lambda: (*directions(), *normal((1, D), (2, 1, D), seed=5))),
    "elu": (Elu(0.7, -1.3), lambda: ()),
    "directions of items": (Exponential(D**-0.5), lambda: tuple(normal((2, D, M), (2, D, M), seed=6))),
}
LANDMARKS = Exponential(0.0), lambda: (normal((2, D, M), seed=3)[0] / 3, None)  # of summaries alone


def directions() -> tuple[Array, Array]:
    W = normal((D, M), seed=2)[0] * D**-0.25
    return W, -W


def state_of(phi: FeatureMap, weights: tuple[Array | None, ...], batch: tuple[int, ...]) -> tuple[Array, ...]:
    """The state of 20 other keys."""
    k, v = normal((*batch, 20, D), (*batch, 20, D_V), seed=4)
    return KERNELS["feature_summarize"].generic(k, v, None, None, None, *weights, phi=phi)


def features(
    kernel: str, map_: str, rows: tuple[tuple[int, ...], ...], state: tuple[int, ...] | None, name: str = ""
) -> Example:
    """Inputs of a feature kernel: q, k and v as far as it takes them; `state` is the batch shape of the state before."""
    phi, weights = LANDMARKS if map_ == "landmarks" else PHI[map_]
    whole = D, D, D_V
    widths = {"feature_summarize": (D, D_V), "feature_attend": (D,)}.get(kernel, whole)

    def draw() -> Arrays:
        before: Arrays = () if kernel == "feature_whole" else (None, None, None)
        before = before if state is None else state_of(phi, weights(), state)
        given = normal(*((*shape, width) for shape, width in zip(rows, widths, strict=True)))
        return (*given, *before, *weights())

    options = {"key_mask": some_hidden(*rows[-1])} if kernel != "feature_attend" else {}
    return Example(kernel, name or map_, draw, {"phi": phi}, options)


def matrices(*shape: int) -> Example:
    """Nearly stochastic matrices, as in Nyström attention; one row has the largest sum, so the norm is differentiable."""

    def draw() -> Arrays:
        weights = np.exp(normal(shape)[0])
        return (weights / weights.sum(axis=-1, keepdims=True) * np.linspace(1, 1.5, shape[-1])[:, None],)

    return Example("iterative_pinv", "×".join(map(str, shape)), draw, {"iterations": 6})


def resets(*shape: int) -> Array:
    """Starts of documents of some ten steps, the first step among them."""
    drawn = np.random.default_rng(5).random(shape) < 0.1
    drawn[..., 0] = True
    return drawn


def selective_scan(name: str, n: int = 63, *, anew: bool = False) -> Example:
    scan = next(scan for scan in SCANS if scan.name == name)
    names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state", "resets")

    def draw() -> Arrays:
        drawn = scan.draw(n)
        if anew:
            drawn["resets"] = resets(*scan.batch, n)
        for key in ("B", "C"):
            drawn[key] = drawn[key][..., None, :] if drawn[key].ndim == 3 else drawn[key]
        return tuple(drawn.get(key) for key in names)

    return Example("selective_scan", name + " anew" * anew, draw, {"delta_softplus": scan.softplus, "reverse": scan.reverse},
                   never_half=(2, 5, 7, 8))  # fmt: skip


def linear_scan(
    name: str, n: int, *, state: bool = False, complex_: bool = False, reverse: bool = False, anew: bool = False
) -> Example:
    def draw() -> Arrays:
        a, b, h, turn = normal((2, n, 5), (2, n, 5), (2, 5), (2, n, 5))
        turn = np.exp(1j * turn) if complex_ else np.ones(())
        before = h * turn[:, 0] if complex_ else h if state else None
        return np.tanh(a) * turn, b * turn, before, resets(2, n) if anew else None

    return Example("linear_scan", name, draw, {"reverse": reverse})


def delta_scan(name: str, n: int, *, heads: int = 2, d: int = D, d_v: int = D_V, reverse: bool = False) -> Example:
    """A scan of the delta rule, or of the general form where the name says so; with a decay by head or by channel, a
    state and resets where it says so."""

    def draw() -> Arrays:
        q, k, v, a, b, gate, state = normal(*(5 * [(2, n, heads, d)]), (2, n, heads, d), (2, heads, d, d_v))
        v, rng = normal((2, n, heads, d_v), seed=1)[0], np.random.default_rng(2)
        k, a, b = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (k, a, b))
        g = -np.exp(2 * gate - 3) if "channel" in name else -np.exp(2 * gate[..., :1] - 3)
        resets = rng.random((2, n)) < 0.1
        of_steps = (None, a, b / 2) if "general" in name else (1 / (1 + np.exp(-a[..., 0])), None, None)
        return (q, k, v, g if "decay" in name else None, *of_steps, state if "state" in name else None,
                resets if "resets" in name else None)  # fmt: skip

    return Example("delta_scan", name, draw, {"scale": 0.7, "reverse": reverse})


def outer_scan(
    name: str, n: int, *, sizes: tuple[int, ...] = (2, 1, 3, 7, 5), decay: str = "", given: str = "",
    reverse: bool = False, gated: bool = False,
) -> Example:  # fmt: skip
    """Sizes are batch, groups, heads of a group, d and d_v; decay "head" or "channel"; `given` names other inputs."""
    batch, groups, shared, d, d_v = sizes
    heads = groups * shared

    def draw() -> Arrays:
        rng = np.random.default_rng(5)
        q, k, v, start = normal(*2 * [(batch, n, groups, d)], (batch, n, heads, d_v), (batch, heads, d, d_v))
        g = -np.exp(rng.uniform(-7, 2, (batch, n, heads, d if decay == "channel" else 1))) if decay else None
        weight, bonus, skip = normal((batch, n, heads), (1, heads, d), (heads, d_v), seed=7)
        resets = rng.random((batch, n)) < 0.1
        others = {"weight": weight, "bonus": bonus, "skip": skip, "state": start, "resets": resets}
        return q, k, v, g, *(x if key in given.split() else None for key, x in others.items())

    def draw_gated() -> Arrays:
        return *draw(), *normal((batch, n, heads, d_v), seed=9)

    static = {"scale": 0.3, "reverse": reverse}
    return Example("gated_outer_scan", name, draw_gated, static) if gated else Example("outer_scan", name, draw, static)


def causal_conv1d(
    name: str, n: int, *, width: int = 4, d: int = 5, silu: bool = True, bare: bool = False, reverse: bool = False
) -> Example:
    """With bias and initial state, unless bare; with resets where the name says so."""

    def draw() -> Arrays:
        x, weight, bias, state = normal((2, n, d), (d, width), (d,), (2, width - 1, d))
        resets = np.random.default_rng(1).random((2, n)) < 0.1 if "resets" in name else None
        return x, weight, *((None, None) if bare else (bias, state)), resets

    return Example("causal_conv1d", name, draw, {"silu": silu, "reverse": reverse})


def project(name: str, rows: int, inputs: int, outputs: int, *, bare: bool = False) -> Example:
    """Rows by a matrix, which alone may be stored in half precision."""

    def draw() -> Arrays:
        x, W, bias = normal((rows, inputs), (outputs, inputs), (outputs,))
        return x, W, None if bare else bias

    return Example("project", name, draw, never_half=(0, 2))


def mamba_step(
    name: str, batch: int, d_model: int, d_inner: int, d_state: int, rank: int, *, width: int = 4, layers: int = 1
) -> Example:
    """A step of blocks whose matrices alone may be stored in half precision, with norms and without biases where the
    name says so."""
    low = rank + 2 * d_state

    def block(seed: int) -> Arrays:
        in_proj, taps, x_proj, dt_proj, A_log, out_proj, conv, ssm = normal(
            (2 * d_inner, d_model), (d_inner, width), (low, d_inner), (d_inner, rank), (d_inner, d_state),
            (d_model, d_inner), (batch, width - 1, d_inner), (batch, d_inner, d_state), seed=seed,
        )  # fmt: skip
        norm, in_bias, taps_bias, dt_bias, D, out_bias = normal(
            *[(size,) for size in (d_model, 2 * d_inner, *[d_inner] * 3, d_model)], seed=seed + 50
        )
        in_proj, x_proj, dt_proj, out_proj = (W * W.shape[1] ** -0.5 for W in (in_proj, x_proj, dt_proj, out_proj))
        if "bare" in name:
            in_bias = taps_bias = out_bias = None
        return (norm if "norm" in name else None, in_proj, in_bias, taps, taps_bias, x_proj, dt_proj, dt_bias - 2,
                A_log, D, out_proj, out_bias, conv, ssm)  # fmt: skip

    def draw() -> Arrays:
        return (*normal((batch, d_model)), *(a for i in range(layers) for a in block(i)))

    matrices = {1 + 14 * i + k for i in range(layers) for k in (1, 5, 6, 10)}
    others = tuple(i for i in range(1 + 14 * layers) if i not in matrices)
    return Example("mamba_step", name, draw, {"eps": 1e-2}, never_half=others)


def lti_scan(name: str, n: int, *, d: int = 5, d_state: int = 3, bare: bool = False, reverse: bool = False) -> Example:
    """A complex model, resets and padded steps where the name says so; skip connection and state, unless bare."""

    def draw() -> Arrays:
        u, D, decay, turn, *maps = normal((2, n, d), (d,), *[(d, d_state)] * 6)
        B, C, state = maps[0], maps[1], normal((2, d, d_state), seed=1)[0]
        rate = np.expm1(-np.exp(decay) / 10)
        if "complex" in name:
            rate, B, C, state = (
                np.expm1(-np.exp(decay) / 10 + 1j * turn),
                B + 1j * maps[2],
                C + 1j * maps[3],
                state * (1 - 0.5j),
            )
        padded = np.random.default_rng(3).random((1 if "shared" in name else 2, n)) < 0.8 if "padded" in name else None
        given = (None, None) if bare else (D, state)
        return u, rate, B, C, *given, resets(2, n) if "anew" in name else None, padded

    return Example("lti_scan", name, draw, {"reverse": reverse})


EXAMPLES: dict[str, list[Example]] = {name: [] for name in KERNELS}
for example in [
    softmax_attention("square", (2, 3, 40), (2, 1, 40), d_v=D),
    softmax_attention("few keys", (2, 600), (1, 40)),
    softmax_attention("few queries", (2, 40), (1, 600)),
    softmax_attention("more queries", (2, 70), (2, 33), d_v=D),
    softmax_attention("many keys", (2, 100), (2, 2100), d_v=D),
    softmax_attention("chunks of keys", (2, 3), (1, 8300)),
    softmax_attention("tiles", (2, 1, 600), (2, 700)),
    block_attention("intervals", (2, 3, 40), (2, 1, 40)),
    block_attention("intervals of items", (2, 3, 40), (2, 3, 33), d_v=D),
    block_attention("many keys", (2, 100), (2, 2100)),
    block_attention("lists", (2, 70), (2, 70), d_v=D),
    block_attention("lists of items", (2, 3, 70), (2, 1, 90)),
    block_attention("lists, places, met", (2, 70), (2, 70), size=8),
    block_attention("places, met", (2, 40), (1, 90)),
    block_attention("pairs and bias", (2, 2, 40), (2, 1, 50)),
    block_attention("one row", (2, 1), (2, 70)),
    centroid_attention("blocks", (2, 3, 70), (2, 1, 90)),
    centroid_attention("causal intervals", (2, 70), (2, 90), size=16, d_v=D),
    centroid_attention("intervals, more rows", (2, 70), (1, 40)),
    centroid_attention("met", (2, 2, 40), (2, 2, 70), size=7),
    sampled_attention("rows", (2, 40), (2, 300)),
    sampled_attention("items", (2, 3, 40), (2, 1, 300), every=3),
    sampled_attention("items, wide values", (2, 100), (2, 150), d_v=37, every=7),
    sampled_attention("one row", (1,), (2, 70), every=4),
    sampled_attention("items, picked", (2, 90), (2, 300), every=4),
    sampled_errors("rows", (2, 40), (2, 40)),
    sampled_errors("more outputs, all rows", (2, 1, 33), (2, 3, 33), d_v=37, out_of=33),
    sampled_errors("one item", (40,), (40,), d_v=D),
    sampled_errors("picked", (2, 1, 40), (2, 3, 40), d_v=17),
    hashed_attention("rounds", (2, 70), (2, 70)),
    hashed_attention("one round", (2, 3, 40), (2, 3, 40), rounds=1, size=8),
    hashed_attention("causal rounds, avoid", (2, 150), (1, 150), size=70, d_v=D),
    hashed_attention("more keys, avoid", (2, 2, 40), (2, 1, 90), rounds=2),
    hashed_attention("more rows", (90,), (40,), rounds=4),
    hashed_order("rounds", (2, 3, 70)),
    hashed_order("one round", (2, 33), rounds=1, d=5),
    hashed_order("many buckets", (2, 700), rounds=2, first=74, size=7),
    hashed_order("two factors", (300,), first=24, second=38, rounds=4),
    hashed_order("one row", (2, 1), first=2),
    nearest("rows", (2, 3, 70), (2, 3, 5)),
    nearest("values", (2, 3, 40), (2, 1, 17), values=(2, 3, 40), d=16),
    nearest("not finite", (2, 33), (40,), values=(33,), d=3),
    nearest("many rows", (2, 2100), (2, 33), values=(2, 2100), d=37),
    nearest("one row", (1,), (1,), d=1),
    *(features("feature_summarize", phi, ((2, 63), (2, 63)), None) for phi in (*PHI, "landmarks")),
    *(features("feature_summarize", phi, ((2, 70), (1, 70)), (2,), f"{phi} goes on") for phi in (*PHI, "landmarks")),
    balanced_tree(2, 70, size=4),
    balanced_tree(2, 3, 300, size=16),
    balanced_tree(7, size=8),
    cluster_members(2, 70, size=4),
    cluster_members(3, 300, size=16, batch=(2, 1)),
    cluster_members(40, size=7),
    cluster_spread(2, 70, size=4),
    cluster_spread(2, 3, 600, size=16, d=17),
    cluster_spread(70, size=8, seen=False),
    clustered_attention("clusters", (2, 40), (2, 72)),
    clustered_attention("prefix, before", (2, 3, 40), (2, 1, 80), d_v=D),
    clustered_attention("near, before", (2, 2, 64), (2, 2, 64), opened=3),
    clustered_attention("near", (70,), (40,), opened=0),
    clustered_attention("prefix of many", (2, 300), (2, 1600), size=16, opened=8, d_v=D),
    clustered_attention("groups", (2, 40), (2, 200), size=4),
    clustered_attention("groups, prefix, before", (2, 70), (2, 608), opened=3),
    clustered_attention("groups, near", (2, 64), (2, 208), size=4),
    clustered_attention("all opened", (2, 1), (2, 24), opened=5),
    features("feature_summarize", "exponential", ((2100,), (2100,)), None, "many keys"),
    *(features("feature_attend", phi, ((2, 63),), (2,)) for phi in PHI),
    features("feature_attend", "exponential", ((2, 3, 1100),), (1, 1), "many queries"),
    *(features("feature_whole", phi, ((2, 63), (2, 70), (2, 70)), None) for phi in PHI),
    features("feature_whole", "exponential", ((300,), (2, 1100), (1100,)), None, "many rows"),
    landmark_attention("plain", (2, 63), (2, 70), 5),
    landmark_attention("equal segments, shared keys", (2, 3, 64), (3, 96), 16, d_v=37),
    landmark_attention("as many as rows", (2, 7), (2, 7), 7),
    landmark_attention("many rows", (2, 1000), (2, 12300), 16),
    *(features("feature_step", phi, 3 * ((2, 63),), None) for phi in PHI),
    *(features("feature_step", phi, ((2, 3, 70), (2, 1, 70), (2, 1, 70)), (2, 1), f"{phi} goes on")
      for phi in ("exponential", "elu")),
    features("feature_step", "elu", 3 * ((2, 1),), (2,), "one token"),
    *(matrices(*shape) for shape in ((1, 1), (3, 7, 7), (2, 2, 16, 16), (33, 33), (2, 100, 100), (256, 256))),
    *(selective_scan(name) for name in ("plain", "gated", "groups", "constant", "complex", "reverse")),
    causal_conv1d("bare", 63, silu=False, bare=True),
    causal_conv1d("state", 70, d=37),
    causal_conv1d("resets", 70, d=16),
    causal_conv1d("reverse, resets", 40, width=7, reverse=True),
    causal_conv1d("longer than the sequence, resets", 5, width=9),
    causal_conv1d("one tap", 9, width=1),
    *(selective_scan(name, anew=True) for name in ("state", "constant", "reverse-complex")),
    outer_scan("plain", 63),
    outer_scan("head", 130, sizes=(1, 2, 2, 16, 40), decay="head", given="weight skip state"),
    outer_scan("channel", 70, sizes=(2, 2, 1, 19, 18), decay="channel", given="bonus state", reverse=True),
    outer_scan("resets", 90, sizes=(2, 1, 2, 9, 33), decay="head", given="weight bonus skip resets state"),
    outer_scan("resets by channel", 40, decay="channel", given="weight resets state", reverse=True),
    outer_scan("resets alone", 33, sizes=(1, 1, 1, 4, 16), given="resets bonus"),
    outer_scan("one step", 1, sizes=(3, 1, 2, 8, 16), decay="channel", given="weight state skip"),
    outer_scan("plain", 40, gated=True),
    outer_scan("head", 70, sizes=(2, 2, 1, 16, 40), decay="head", given="weight skip state", gated=True, reverse=True),
    outer_scan("resets", 40, decay="channel", given="bonus resets state", gated=True),
    outer_scan("one step", 1, sizes=(3, 1, 2, 8, 16), given="weight skip state", gated=True),
    project("one row", 1, 50, 37),
    project("fewer inputs than lanes", 1, 5, 3, bare=True),
    project("few rows", 7, 70, 131),
    project("most rows", 32, 32, 2, bare=True),
    project("too many rows", 33, 20, 9),
    mamba_step("one sequence", 1, 24, 48, 16, 3),
    mamba_step("a few, bare, norm", 5, 19, 37, 5, 2, layers=2),
    mamba_step("one tap, many states", 2, 40, 33, 33, 7, width=1),
    mamba_step("norm", 2, 9, 18, 16, 2, layers=3),
    mamba_step("too many", 33, 8, 16, 4, 1),
    lti_scan("bare", 63, bare=True),
    lti_scan("state", 70, d=19, d_state=4),
    lti_scan("complex", 130, d_state=5),
    lti_scan("anew, padded", 70),
    lti_scan("complex anew", 40, d=17, reverse=True),
    lti_scan("complex, padded, shared", 40, d_state=2, reverse=True),
    lti_scan("one step", 1, d_state=1),
    linear_scan("plain", 63),
    linear_scan("state", 257, state=True),
    linear_scan("reverse", 63, state=True, reverse=True),
    linear_scan("complex", 63, state=True, complex_=True),
    linear_scan("reverse-complex", 63, complex_=True, reverse=True),
    linear_scan("anew", 63, state=True, anew=True),
    linear_scan("reverse-complex anew", 63, complex_=True, reverse=True, anew=True),
    delta_scan("plain", 63),
    delta_scan("decay of heads, state, resets", 130, d=19, d_v=37),
    delta_scan("decay of channels", 70, heads=1, d_v=16),
    delta_scan("general", 40, d_v=70),
    delta_scan("general, decay of channels, state, resets", 63, reverse=True),
    delta_scan("reverse, decay of heads, state", 1, heads=3, reverse=True),
]:  # fmt: skip
    EXAMPLES[example.kernel].append(example)


def observed(kernel: str, outputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Outputs in a form that does not depend on the shift: of a state, numerator / denominator. A log-sum-exp of no
    keys, −∞, is 0. Integers have no gradient, and are left out."""
    if kernel in ("nearest", "hashed_order", "balanced_tree"):
        return outputs[2:]
    if kernel == "sampled_errors":
        return outputs[:4]
    if kernel in ("block_attention", "centroid_attention", "clustered_attention", "hashed_attention"):
        out, lse = outputs
        return out, array_namespace(lse).where(lse == -np.inf, 0.0, lse)
    if kernel not in ("feature_summarize", "feature_step"):
        return outputs
    *out, _, numerator, denominator = outputs
    xp = array_namespace(numerator)
    return *out, numerator / xp.where(denominator == 0, 1.0, denominator)


def as_tuple(outputs: Any) -> tuple[Any, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def choice_of(kernel: Kernel, arrays: list[Any], keywords: Mapping[str, Any]) -> Choice:
    """The name of the implementation that a call takes; nothing is computed."""
    with listening() as (choices, _):
        kernel(*arrays, **keywords)
    return choices[0]


@contextlib.contextmanager
def overrides_replaced(backend: Backend, kernel: str, *overrides: Override) -> Iterator[None]:
    """A backend whose only overrides of a kernel are these."""
    before = backend.overrides
    others = [x for x in before if x.kernel != kernel]
    backend.overrides = (*others, *overrides)  # type: ignore[misc]  of the object, which is asked before its class
    KERNELS[kernel].forget()
    try:
        yield
    finally:
        backend.overrides = before  # type: ignore[misc]
        KERNELS[kernel].forget()


def without_overrides(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every kernel of every library take its generic form, until the test ends."""
    for library in ("numpy", "torch", "jax"):
        monkeypatch.setattr(type(getattr(loading, f"of_{library}")), "overrides", ())
    for kernel in KERNELS.values():
        monkeypatch.setattr(kernel, "chosen", {})


@contextlib.contextmanager
def watched(backend: Backend, override: Override) -> Iterator[list[Any]]:
    """(backend with this override alone for its kernel, list of the keywords of each call that reaches it)."""
    calls: list[Any] = []

    def run(*arrays: Any, **keywords: Any) -> Any:
        calls.append(keywords)
        return override.run(*arrays, **keywords)

    with overrides_replaced(backend, override.kernel, dataclasses.replace(override, run=run, bind=None)):
        yield calls


def backend_for(library: Library) -> Backend:
    return backend_of(array_namespace(library.array(np.zeros(1), "float32")))


def overrides() -> Iterator[Any]:
    """(library, override) for all overrides of installed libraries; those of a GPU have the mark `gpu`."""
    for library in (NumPy(), Torch(), Jax(), TorchCuda(), CuPy()):
        try:
            backend = backend_for(library)
        except pytest.skip.Exception:
            continue
        kind = "cuda" if isinstance(library, TorchCuda | CuPy) else "cpu"
        for override in backend.overrides:
            if kind in override.accepts.devices:
                marks = [pytest.mark.gpu] if kind == "cuda" else []
                name = f"{library}-{override.kernel}-{override.name}"
                yield pytest.param(library, override, id=name, marks=marks)


OVERRIDES = list(overrides())
