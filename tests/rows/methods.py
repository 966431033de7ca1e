"""The table of methods with options, and the table of shapes on which they are tested."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

import subquad
from rows import definitions
from subquad.attention.rest import centroids
from subquad.core.beside import namespace_of, place_of

Array = np.ndarray
D = 8  # channels of q and k


@dataclass(frozen=True)
class Case:
    """Shapes and mask of one call."""

    q: tuple[int, ...]
    k: tuple[int, ...]
    v: tuple[int, ...]
    mask: str = ""  # "", "random", "left", "right", "heads" (one mask per key head), "query-heads"
    small_blocks: bool = False

    def draw(self) -> dict[str, Array | None]:
        """Draw q, k, v and key_mask; rows follow eight centres in turn, so landmarks differ and A is well conditioned."""
        rng = np.random.default_rng(7)
        centres = 1.5 * rng.standard_normal((8, D))

        def rows(shape: tuple[int, ...]) -> Array:
            place = np.arange(shape[-2]) * 8 // max(shape[-2], 1)
            return centres[place] + 0.5 * rng.standard_normal(shape)

        drawn = {"q": rows(self.q), "k": rows(self.k), "v": 1 + rng.standard_normal(self.v), "key_mask": None}
        if self.mask:
            drawn["key_mask"] = self.draw_mask(rng)
        return drawn

    def draw_mask(self, rng: np.random.Generator) -> Array:
        n_kv = self.k[-2]
        batch = self.k[:-2] if self.mask == "heads" or len(self.k) < 4 else (*self.k[:-3], 1)
        batch = self.q[:-2] if self.mask == "query-heads" else batch
        mask = rng.random((*batch, n_kv)) < 0.7
        if self.mask in ("left", "right"):
            hidden = np.arange(n_kv) < n_kv // 3
            mask[...] = ~(hidden if self.mask == "left" else hidden[::-1])
        mask.reshape(-1, n_kv)[0] &= np.arange(n_kv) > 0  # the first query sees nothing when causal
        if len(batch) and batch[0] > 1:
            mask[-1] = False  # an item without any key
        return mask


CASES = {
    "n=1": Case((1, D), (1, D), (1, 3)),
    "n=2": Case((3, 2, D), (3, 2, D), (3, 2, D)),
    "n=63": Case((2, 63, D), (2, 63, D), (2, 63, 5), mask="random"),
    "n=257": Case((257, D), (257, D), (257, 4)),
    "blocks": Case((2, 1, 257, D), (2, 1, 257, D), (2, 1, 257, 4), mask="left", small_blocks=True),
    "n<n_kv": Case((2, 33, D), (2, 70, D), (2, 70, 5), mask="right"),
    "n>n_kv": Case((70, D), (33, D), (33, 5), mask="random"),
    "grouped": Case((2, 4, 37, D), (2, 2, 37, D), (2, 2, 37, 5), mask="heads"),
    "grouped-masks": Case((2, 4, 37, D), (2, 2, 37, D), (2, 2, 37, 5), mask="query-heads"),
    "shared": Case((2, 3, 33, D), (1, 33, D), (3, 33, 5)),
    "no-batch": Case((0, 4, D), (0, 4, D), (0, 4, 5)),
    "no-queries": Case((2, 0, D), (2, 5, D), (2, 5, 3)),
    "no-keys": Case((2, 4, D), (2, 0, D), (2, 0, 3)),
}


@dataclass(frozen=True)
class Row:
    """A method with options, and its definition. `arrays` makes the options that are arrays, from the case."""

    name: str
    method: str
    options: dict[str, Any] = field(default_factory=dict)
    arrays: Callable[[Case], dict[str, Any]] = lambda case: {}
    causal: bool = True
    fits: Callable[[Case], bool] = lambda case: True
    reference_options: dict[str, Any] = field(default_factory=dict)  # where the definition needs other words
    constants: Callable[[Case], dict[str, Any]] = lambda case: {}  # options whose values are read: never traced
    # what decides which keys a row sees: "nothing" (it sees all), its "place" relative to theirs, "places" of the whole
    # sequence, or a "hash" of all keys; "arrays" if there are other keys and values among the options
    by: str = "nothing"

    def __str__(self) -> str:
        return self.name

    @property
    def forms(self) -> tuple[bool, ...]:
        """The values of `causal` that the method supports."""
        return (False, True) if self.causal else (False,)

    def call(self, *, causal: bool = False, **given: Any) -> Callable[..., Any]:
        """`attention` as a function of arrays alone: q, k, v, key_mask, arrays of the options; `given` goes with them."""

        def attend(q: Any, k: Any, v: Any, key_mask: Any, arrays: dict[str, Any]) -> Any:
            case = Case(*(tuple(x.shape) for x in (q, k, v)))
            constants = self.constants(case)
            if "global_mask" in constants:
                mask = constants["global_mask"]
                constants = {"global_mask": namespace_of(q).asarray(mask, device=place_of(q))}
            options = self.options | constants | arrays | given
            return subquad.attention(q, k, v, self.method, causal=causal, key_mask=key_mask, **options)

        return attend

    def object(self, **arrays: Any) -> Any:
        """The method object."""
        options = {name: x for name, x in (self.options | arrays).items() if name != "scale"}
        return subquad.METHODS[self.method](**options)

    def reference(self, drawn: dict[str, Any], arrays: dict[str, Any], *, causal: bool) -> Array:
        """The output by definition, in float64."""
        options = {**self.options, **self.reference_options, **arrays}
        if self.method == "favor":
            projection = options.pop("projection", "orthogonal")
            m, seed = options.pop("num_features", 256), options.pop("seed", 0)
            if "omega" not in arrays:
                options["omega"] = subquad.draw_omega(projection, m, D, seed)
        options.pop("implementation", None)
        if self.method == "auto":
            options = {name: x for name, x in options.items() if name not in ("ladder", "choice")}
        definition = getattr(definitions, self.method)
        q, k, v, key_mask = (drawn[name] for name in ("q", "k", "v", "key_mask"))
        options |= self.constants(Case(q.shape, k.shape, v.shape))
        if self.method == "lsh":
            rounds, seed = options.pop("num_rounds", 4), options.pop("seed", 0)
            if "rotations" not in arrays:
                method = subquad.LSH(bucket_size=options.get("bucket_size", 64), num_rounds=rounds, seed=seed)
                options["rotations"] = method.with_rotations(q, k).rotations
        if self.method == "bigbird" and "plan" not in options:
            options["plan"] = drawn_plan(q, k, causal, options)
            del options["num_random_blocks"], options["seed"]
        if options.get("rest") is not None:
            size = options["rest_size"] if self.method == "window" else options.pop("rest_size")
            options["rest"] = functools.partial(clusters_of, size=size)
        if self.method == "clustered":
            options["queries"] = queries_of_keys(q, k, key_mask)
        return definitions.over_heads(definition, q, k, v, key_mask, causal=causal, **options)


def square(x: Any) -> Any:
    """A function f that a user may give: x², which is positive on every library."""
    return x * x


def two_squares(x: Any) -> Any:
    """A feature map that a user may give, with twice as many features as channels."""
    xp = namespace_of(x)
    return xp.concat([x * x, (x - 1) * (x - 1)], axis=-1)


def given_omega(case: Case) -> dict[str, Any]:
    return {"omega": np.random.default_rng(3).standard_normal((12, D))}


def given_center(case: Case) -> dict[str, Any]:
    """One centre for q and one for k, in each head."""
    rng = np.random.default_rng(4)
    q, k = ((*case.q[-3:-2], D), (*case.k[-3:-2], D))
    return {"center": (rng.standard_normal(q), rng.standard_normal(k))}


def given_statistics(case: Case) -> dict[str, Any]:
    """Means, maps M and M⁻¹, and directions wider than ω, of each query head."""
    rng = np.random.default_rng(4)
    q_mean, k_mean = rng.standard_normal((2, *case.q[-3:-2], D))
    M, B = rng.standard_normal((2, *case.q[-3:-2], D, D)) / 4
    M, B = M @ np.swapaxes(M, -1, -2) + np.eye(D), B @ np.swapaxes(B, -1, -2) + np.eye(D)
    return {"statistics": (q_mean, k_mean, M, np.linalg.inv(M), B)}


def given_landmarks(case: Case) -> dict[str, Any]:
    """Landmarks of each head: the centres of the rows, and some more rows."""
    rng = np.random.default_rng(7)
    centres = 1.5 * rng.standard_normal((8, D))
    shape = (*case.q[-3:-2], 8, D)
    return {"landmarks": tuple(centres + 0.1 * rng.standard_normal(shape) for _ in range(2))}


def given_projection(case: Case) -> dict[str, Any]:
    """E and F of each head, with another number of rows than any case has keys."""
    shape = (*case.q[-3:-2], 6, case.k[-2])
    return {"projection": tuple(np.random.default_rng(9).standard_normal((2, *shape)) / 4)}


def given_convolution(case: Case) -> dict[str, Any]:
    return {"conv_weights": np.random.default_rng(5).standard_normal((*case.q[-3:-2], 5)) / 4}


def given_long_convolution(case: Case) -> dict[str, Any]:
    return {"conv_weights": np.random.default_rng(5).standard_normal(101) / 8}  # longer than a tile


def given_query_mask(case: Case) -> dict[str, Any]:
    return {"query_mask": np.arange(case.q[-2]) % 5 < 4}


def given_global(case: Case) -> dict[str, Any]:
    """Global keys, several in one head and one in another."""
    mask = np.arange(case.k[-2]) % 17 == 3
    if len(case.q) < 3:
        return {"global_mask": mask}
    per_head = np.broadcast_to(mask, (case.q[-3], len(mask))).copy()
    per_head[:1, 20:] = False
    return {"global_mask": per_head}


def given_global_qkv(case: Case) -> dict[str, Any]:
    rng = np.random.default_rng(6)
    return {"global_qkv": tuple(rng.standard_normal(shape) for shape in (case.q, case.k, case.v))}


def given_plan(case: Case) -> dict[str, Any]:
    """Blocks of eight for each head: some that are near or global besides, and none for some."""
    heads, blocks, total = case.q[-3:-2], -(-case.q[-2] // 8), -(-case.k[-2] // 8)
    drawn = np.random.default_rng(8).integers(-1, total, (*heads, blocks, 2))
    drawn[..., 1] = np.where(drawn[..., 1] == drawn[..., 0], -1, drawn[..., 1])
    return {"plan": drawn}


def given_rotations(case: Case) -> dict[str, Any]:
    return {"rotations": np.random.default_rng(9).standard_normal((2, D, 3))}


def drawn_plan(q: Array, k: Array, causal: bool, options: dict[str, Any]) -> Array:
    """All blocks that each block of queries reads on NumPy, (heads, q_blocks, blocks): queries of 0 weigh them alike.

    Whether the draw is a good one is for tests/test_bigbird.py to say.
    """
    size, n_kv = options["block_size"], k.shape[-2]
    heads = max([x.shape[-3:-2] for x in (q, k)])
    one = np.broadcast_to(np.eye(n_kv), (*heads, n_kv, n_kv))
    options = {name: x for name, x in options.items() if name not in ("scale", "plan", "rest", "rest_size")}
    seen = subquad.attention(
        np.zeros((*one.shape[:-2], *q.shape[-2:])), np.zeros(k.shape[-2:]), one, "bigbird", causal=causal, **options
    )
    blocks, total = -(-q.shape[-2] // size), -(-n_kv // size)
    plan = np.full((*one.shape[:-2], blocks, max(total, 1)), -1)
    for *head, i, j in np.argwhere(seen):
        plan[(*head, i // size, j // size)] = j // size
    return plan


def clusters_of(k: Array, keep: Array, block: int, size: int) -> list[tuple[int, list[int]]]:
    """The clusters of one head as the library makes them: (block, places of the keys); tests/test_rest.py looks at them."""
    found = centroids(np, k, k, keep, block, size, "generic")
    members = [[int(place) for place in row if place >= 0] for row in found.members]
    return [(c // found.per_block, places) for c, places in enumerate(members) if places]


def queries_of_keys(q: Array, k: Array, mask: Array | None) -> Array:
    """For each query head the queries of all heads that have its keys and its mask, (..., heads, of one, n, d)."""
    heads = max(q.shape[-3:-2], default=1)
    kinds = max([1, *k.shape[-3:-2], *(() if mask is None else mask.shape[-2:-1])])
    if kinds >= heads:
        return q[..., None, :, :]
    together = q.reshape(*q.shape[:-3], kinds, heads // kinds, *q.shape[-2:])
    return np.repeat(together, heads // kinds, axis=-4)


def is_self_attention(case: Case) -> bool:
    return case.q[-2] == case.k[-2]


def has_batch(case: Case) -> bool:
    return 0 not in case.q[:-2]


def has_rows(case: Case) -> bool:
    return 0 not in (*case.q[:-1], *case.k[:-1])


favor = functools.partial(Row, method="favor")
linformer = functools.partial(Row, method="linformer", causal=False)
nystrom = functools.partial(Row, method="nystrom", causal=False)
window = functools.partial(Row, method="window", by="place")
bigbird = functools.partial(Row, method="bigbird", by="places")
lsh = functools.partial(Row, method="lsh", by="hash")
clustered = functools.partial(Row, method="clustered", by="places")

OPTIONS = [
    Row("exact", "exact"),
    Row("exact-generic", "exact", {"implementation": "generic"}),
    Row("exact-scale", "exact", {"scale": -0.2}),
    Row("auto", "auto"),
    Row("auto-choice", "auto", {"ladder": (subquad.Favor(num_features=3), subquad.Window(left=6)), "choice": 1},
        by="place", reference_options={"left": 6}),
    favor("favor", options={}),
    favor("favor-scale", options={"num_features": 20, "scale": -0.1}),
    favor("favor-hyperbolic", options={"num_features": 12, "features": "hyperbolic"}),
    # many features and short vectors: the denominator of cosines can vanish
    favor("favor-trigonometric", options={"num_features": 64, "features": "trigonometric", "scale": 0.05}),
    favor("favor-relu", options={"num_features": 12, "features": "relu", "kernel_epsilon": 1e-3}),
    favor("favor-function", options={"num_features": 12, "features": square}),
    favor("favor-function-epsilon", options={"num_features": 12, "features": square, "kernel_epsilon": 0.5}),
    favor("favor-center", options={"num_features": 12, "center": True}, causal=False, fits=has_rows),
    favor("favor-center-hyperbolic", options={"num_features": 12, "features": "hyperbolic"}, arrays=given_center),
    favor("favor-center-trigonometric",
          options={"num_features": 64, "features": "trigonometric", "scale": 0.05}, arrays=given_center),
    favor("favor-derf", options={"num_features": 12, "features": "derf"}, causal=False),
    favor("favor-derf-scale", options={"num_features": 20, "features": "derf", "scale": -0.1}, causal=False),
    favor("favor-derf-statistics", options={"num_features": 12, "features": "derf"}, arrays=given_statistics),
    favor("favor-omega", options={}, arrays=given_omega),
    favor("favor-seed", options={"num_features": 12, "seed": 5}),
    favor("favor-hadamard", options={"num_features": 12, "projection": "hadamard"}),
    favor("favor-givens", options={"num_features": 12, "projection": "givens"}),
    favor("favor-iid", options={"num_features": 12, "projection": "iid"}),
    Row("linear", "linear"),
    Row("linear-scale", "linear", {"scale": 0.3}),
    Row("linear-function", "linear", {"feature_map": two_squares}),
    Row("linear-function-scale", "linear", {"feature_map": two_squares, "scale": 3.0}),
    linformer("linformer", options={"rank": 8}),
    linformer("linformer-default", options={}),
    linformer("linformer-scale", options={"rank": 5, "scale": -0.4}),
    linformer("linformer-random", options={"rank": 7, "projection": "random"}),
    linformer("linformer-random-seed", options={"rank": 12, "projection": "random", "seed": 5, "scale": 0.2}),
    linformer("linformer-arrays", options={}, arrays=given_projection, fits=has_batch),
    nystrom("nystrom", options={"num_landmarks": 8}),
    nystrom("nystrom-default", options={}),
    nystrom("nystrom-iterations", options={"num_landmarks": 5, "iterations": 12}),
    nystrom("nystrom-exact", options={"num_landmarks": 8, "pinv": "exact"}),
    nystrom("nystrom-rcond", options={"num_landmarks": 8, "pinv": "exact", "rcond": 0.2}),
    nystrom("nystrom-ridge", options={"num_landmarks": 8, "pinv": "ridge"}),
    nystrom("nystrom-ridge-scale", options={"num_landmarks": 7, "pinv": "ridge", "ridge": 0.3, "scale": 0.5}),
    nystrom("nystrom-uniform", options={"num_landmarks": 6, "landmarks": "uniform"}),
    nystrom("nystrom-uniform-seed", options={"num_landmarks": 6, "landmarks": "uniform", "seed": 3, "pinv": "ridge"}),
    nystrom("nystrom-kmeans", options={"num_landmarks": 6, "landmarks": "kmeans"}),
    nystrom("nystrom-kmeans-seed", options={"num_landmarks": 4, "landmarks": "kmeans", "seed": 3,
                                            "kmeans_iterations": 2, "pinv": "ridge"}),
    nystrom("nystrom-ridge-fit", options={"num_landmarks": 6, "landmarks": "kmeans", "pinv": "ridge-fit"}),
    nystrom("nystrom-ridge-fit-scale", options={"num_landmarks": 8, "landmarks": "kmeans", "pinv": "ridge-fit",
                                                "ridge": 0.2, "scale": -0.3}),
    nystrom("nystrom-kmeans-query-mask", options={"num_landmarks": 6, "landmarks": "kmeans", "pinv": "ridge-fit"},
            arrays=given_query_mask),
    nystrom("nystrom-arrays", options={}, arrays=given_landmarks, fits=has_batch),
    nystrom("nystrom-convolution", options={"num_landmarks": 8}, arrays=given_convolution, fits=is_self_attention),
    nystrom("nystrom-long-convolution", options={"num_landmarks": 8}, arrays=given_long_convolution,
            fits=is_self_attention),
    nystrom("nystrom-query-mask", options={"num_landmarks": 6}, arrays=given_query_mask),
    Row("window-default", "window"),
    window("window", options={"left": 6}),
    window("window-scale", options={"left": 11, "scale": -0.3}),
    window("window-sides", options={"left": 2, "right": 70}, causal=False),
    window("window-dilated", options={"left": 3, "dilation": 4}),
    window("window-global", options={"left": 6}, constants=given_global, by="places"),
    window("window-global-dilated", options={"left": 2, "dilation": 3}, constants=given_global, by="places"),
    window("window-global-qkv", options={"left": 6}, constants=given_global, arrays=given_global_qkv,
           fits=is_self_attention, by="arrays"),
    window("window-rest", options={"left": 6, "rest": "centroids", "rest_size": 4}, by="places"),
    window("window-rest-sides", options={"left": 2, "right": 30, "rest": "centroids", "rest_size": 16, "scale": 0.5},
           causal=False, by="places"),
    window("window-global-rest", options={"left": 9, "rest": "centroids", "rest_size": 5}, constants=given_global,
           by="places"),
    bigbird("bigbird", options={"block_size": 8, "num_random_blocks": 2, "seed": 3}),
    bigbird("bigbird-default", options={"block_size": 64, "num_random_blocks": 3, "seed": 0}),
    bigbird("bigbird-ends", options={"block_size": 5, "window_blocks": 5, "global_blocks": (2, 0),
                                     "num_random_blocks": 1, "seed": 1}),
    bigbird("bigbird-plan", options={"block_size": 8, "window_blocks": 1, "scale": 0.6}, constants=given_plan),
    bigbird("bigbird-rest", options={"block_size": 8, "num_random_blocks": 1, "seed": 3, "rest": "centroids",
                                     "rest_size": 4}),
    lsh("lsh", options={"bucket_size": 9, "num_rounds": 3}),
    lsh("lsh-default", options={}),
    lsh("lsh-one-round", options={"bucket_size": 8, "num_rounds": 1, "seed": 2, "scale": -0.4}),
    lsh("lsh-unit-keys", options={"bucket_size": 8, "num_rounds": 2, "unit_keys": True}),
    lsh("lsh-others", options={"bucket_size": 6, "num_rounds": 2, "allow_self": False}),
    lsh("lsh-rotations", options={"bucket_size": 8, "num_rounds": 2}, arrays=given_rotations),
    lsh("lsh-rest", options={"bucket_size": 8, "num_rounds": 1, "rest": "centroids", "rest_size": 4}, causal=False),
    lsh("lsh-rest-rounds", options={"bucket_size": 6, "num_rounds": 3, "rest": "centroids", "rest_size": 3},
        causal=False),
    lsh("lsh-two-factors", options={"bucket_size": 1, "num_rounds": 3}),
    clustered("clustered", options={"cluster_size": 4, "opened": 2, "chunk": 8, "sinks": 3, "window": 2}),
    clustered("clustered-spans", options={"cluster_size": 3, "opened": 2, "chunk": 7, "sinks": 2, "spans": 2}),
    clustered("clustered-once", options={"cluster_size": 4, "opened": 2, "chunk": 8, "spans": 1}),
    clustered("clustered-default", options={}),
    clustered("clustered-bare", options={"cluster_size": 5, "opened": 1, "chunk": 12, "sinks": 0, "window": 0,
                                         "scale": -0.3}),
    clustered("clustered-centroids", options={"cluster_size": 4, "opened": 0, "chunk": 10, "sinks": 5, "window": 1}),
    clustered("clustered-single-keys", options={"cluster_size": 1, "opened": 3, "chunk": 9, "sinks": 1, "seed": 2}),
]  # fmt: skip


def has_own(row: Row, name: str) -> bool:
    """Whether the class of the row's method implements this function."""
    return getattr(subquad.METHODS[row.method], name) is not getattr(subquad.Method, name)


# what is registered has a row with its default options, also where nobody wrote one
METHODS = [
    *(Row(name, name, causal=cls.causal is True) for name, cls in subquad.METHODS.items()
      if name not in {row.method for row in OPTIONS}),
    *OPTIONS,
]  # fmt: skip
CAUSAL = [row for row in METHODS if row.causal]
FITTED = ("favor-center", "favor-derf", "favor-derf-scale")  # to the queries and keys of each call
# whose states sum up keys in a fixed size, and which process tokens one after the other
STREAMING = [row for row in METHODS if has_own(row, "_summarize") and row.name not in FITTED and row.method not in ("linformer", "clustered") and (row.method != "nystrom" or row.name == "nystrom-arrays")]  # fmt: skip
STEPPING = [
    row for row in METHODS if row.causal and has_own(row, "_step") and not {"global", "rest"} & set(row.name.split("-"))
]


def rows(table: list[Row]) -> Any:
    """The mark `pytest.mark.parametrize` over a table."""
    return pytest.mark.parametrize("row", [pytest.param(row, id=row.name) for row in table])


def seeing(table: list[Row], *by: str) -> list[Row]:
    """The rows of a table that see keys by one of these."""
    return [row for row in table if row.by in by]


def named(*names: str) -> list[Row]:
    by_name = {row.name: row for row in METHODS}
    return [by_name[name] for name in names]


# one row of each way through the code, for properties that do not depend on options
MAIN = [
    *METHODS[: len(METHODS) - len(OPTIONS)],
    *named("exact", "exact-generic", "favor-hyperbolic", "favor-trigonometric", "favor-relu", "favor-derf", "favor-seed", "linear",
           "linear-function", "linformer", "linformer-random", "nystrom", "nystrom-ridge", "nystrom-uniform",
           "nystrom-kmeans", "nystrom-ridge-fit", "window", "window-dilated", "window-rest", "bigbird", "bigbird-rest",
           "lsh", "lsh-rest-rounds", "clustered"),
]  # fmt: skip
MAIN_CAUSAL = [row for row in MAIN if row.causal]
