"""Clustered attention on NumPy arrays, compiled: see `subquad_numpy.compiled.Compiled`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from subquad.backend import Like
from subquad.kernels.balanced_tree import outputs as tree_outputs
from subquad.kernels.cluster_summaries import outputs_of_members, outputs_of_spread
from subquad.kernels.clustered_attention import bands_of, outputs
from subquad_numpy.runtime.arguments import Fix, Forms, Run, fix_items, fixed
from subquad_numpy.runtime.stored import computed, stored_word
from subquad_numpy.runtime.threads import thread_count

Array = np.ndarray[Any, Any]
NAMES = (
    "q", "k", "v", "order", "means", "spread", "mean_values", "counts", "group_means", "group_spread",
    "group_values", "stop", "place", "cluster_of", "before_out", "before_lse",
)  # fmt: skip
INTEGERS = frozenset({"order", "before", "counts", "stop", "place", "cluster_of"})
TREE_ARRAYS = "x", "sketch", "mask", "before"
LARGE = 2**12  # rows of a set that is split on one thread while others wait for its halves


def axes_of(name: str) -> int:
    """How many of the last axes of an array belong to one item."""
    return 1 if name in INTEGERS or name in ("before_lse", "mask") else 2


def cut_work(arrays: Sequence[Any], static: Mapping[str, Any]) -> tuple[dict[str, int], int, float]:
    """(numbers of the argument record, tasks of an item, multiply-adds of an item)."""
    from subquad_numpy.clustered.tiles import ROWS

    given = dict(zip(NAMES, arrays, strict=True))
    (n, d), d_v, clusters, size = (
        given["q"].shape[-2:],
        given["v"].shape[-1],
        given["means"].shape[-2],
        given["k"].shape[-1],
    )
    always, tasks, bands = static.get("always", 0), -(-n // ROWS), given["spread"].shape[-1] - d
    own, of_groups = given["cluster_of"], given["group_means"]
    groups, group, expanded = (
        0 if of_groups is None else of_groups.shape[-2],
        static.get("group", 1),
        static.get("expanded", 0),
    )
    sizes = {
        "n": n, "n_kv": 0 if own is None else own.shape[-1], "d": d, "d_v": d_v, "bands": bands, "clusters": clusters,
        "size": size, "opened": static["opened"], "always": always, "reach": static.get("reach", 0), "groups": groups,
        "group": group, "expanded": expanded, "tasks": tasks, "stored": stored_word((given["q"],)),
    }  # fmt: skip
    weighed = groups + min(clusters, expanded * group) if groups else clusters
    keys = (always + static["opened"]) * size * (d + d_v) + weighed * (2 * d + bands + d_v)
    return sizes, tasks, float(n * keys)


def numbers_of(static: Mapping[str, Any]) -> tuple[float, float]:
    """The scale, and the logarithm of the share: what `numbers` holds."""
    share = static.get("share", 0.0)
    return static["scale"], math.log(share) if share > 0 else -math.inf


def _fix(name: str, x: Array) -> Fix:
    if name in INTEGERS and x.dtype != np.int32:
        return partial(np.ascontiguousarray, dtype=np.int32)
    return fix_items(x, axes_of(name))


def _planned(
    compiled: tuple[Any, Mapping[str, int | None]], work: tuple[dict[str, int], int, float], batch: tuple[int, ...],
    names: Sequence[str], arrays: Sequence[Any], likes: Mapping[str, Like], constants: Mapping[str, Array],
) -> Callable[..., Any]:  # fmt: skip
    """The outputs `likes` of a (kernel, record) on arrays of these names, all by the names of the record's fields."""
    (kernel, record), (numbers, tasks, products) = compiled, work
    fixes = [None if x is None else _fix(name, x) for name, x in zip(names, arrays, strict=True)]
    kinds = {name: (like.shape, like.dtype) for name, like in likes.items()}
    fields = [name for name, axes in record.items() if axes is not None]

    def ready(arrays: Sequence[Any]) -> dict[str, Any]:
        fixed_ones = (x if x is None else fixed(fix, x) for fix, x in zip(fixes, arrays, strict=True))
        return dict(zip(names, fixed_ones, strict=True))

    examples = {name: x for name, x in ready(arrays).items() if x is not None}
    made = {name: np.empty(*kind) for name, kind in kinds.items()}
    run = Run(kernel, record, batch, tasks, products, {**numbers, **examples, **constants, **made})

    def planned(arrays: Sequence[Any], new: Callable[..., Array], threads: Any) -> tuple[tuple[Array, ...], None]:
        outs = {name: new(*kind) for name, kind in kinds.items()}
        every = {**ready(arrays), **constants, **outs}
        run([every[name] for name in fields], threads)
        return tuple(outs.values()), None

    return planned


def _plan(arrays: Sequence[Any], static: Mapping[str, Any], save: bool) -> Callable[..., Any]:
    """The output and the log-sum-exp of the kernel `clustered_attention`."""
    from subquad_numpy.clustered.forward import FORWARD_RECORD, clustered_attention_kernel

    likes, dtype = dict(zip(("out", "lse"), outputs(*arrays, **static), strict=True)), computed(arrays[0].dtype)
    likes["lse"] = Like(likes["lse"].shape, dtype)
    compiled, numbers = (clustered_attention_kernel(dtype), FORWARD_RECORD), np.array(numbers_of(static), dtype)
    work, batch = cut_work(arrays, static), likes["lse"].shape[:-1]
    return _planned(compiled, work, batch, NAMES, arrays, likes, {"numbers": numbers})


clustered_attention = Forms(_plan)


def tree_work(arrays: Sequence[Any], static: Mapping[str, Any], sets: int = 1) -> tuple[dict[str, int], float]:
    """(numbers of the argument record of `balanced_tree`, multiply-adds of an item)."""
    x, sketch = arrays[:2]
    (n, d), directions, size = x.shape[-2:], sketch.shape[-1], static["size"]
    clusters = -(-n // size)
    sizes = {"n": n, "d": d, "directions": directions, "size": size, "slots": slots_of(n, size),
             "places": clusters * size, "sets": sets}  # fmt: skip
    return sizes, float(n * d * (directions + 12 * math.ceil(math.log2(clusters))))


def slots_of(n: int, size: int) -> int:
    """How many rows the clusters of a whole tree hold, of `size` each, that has room for n rows."""
    return size * 2 ** max(0, math.ceil(math.log2(-(-n // size))))


def tree_runs(n: int, size: int, items: int, threads: int) -> list[tuple[int, int]]:
    """Runs of the kernel `balanced_tree`, one after the other: (sets that the rows are in before, rows of a cluster).

    Where there are fewer large sets of rows than threads, a run splits each of them once, and the next run has more.
    """
    runs, sets = [], 1
    while items * sets < threads and n // sets >= max(LARGE, 4 * size) and n == slots_of(n, size):
        runs.append((sets, n // sets // 2))
        sets *= 2
    return [*runs, (sets, size)]


def _plan_tree(arrays: Sequence[Any], static: Mapping[str, Any], save: bool) -> Callable[..., Any]:
    """The output of the kernel `balanced_tree`."""
    from subquad_numpy.clustered.tree import TREE_RECORD, balanced_tree_kernel

    (like,) = tree_outputs(*arrays[:2], **static)
    compiled = balanced_tree_kernel(arrays[0].dtype), TREE_RECORD
    n, batch, runs = arrays[0].shape[-2], like.shape[:-1], dict[tuple[int, int], Callable[..., Any]]()

    def tree(arrays: Sequence[Any], new: Callable[..., Array], threads: Any) -> tuple[tuple[Array, ...], None]:
        found: tuple[Any, ...] = (None,)
        for sets, size in tree_runs(n, static["size"], math.prod(batch), thread_count(threads)):
            given = (*arrays, *found)
            planned = runs.get((sets, size))
            if planned is None:
                numbers, products = tree_work(arrays, {"size": size}, sets)
                work = numbers, sets, products
                planned = runs[sets, size] = _planned(compiled, work, batch, TREE_ARRAYS, given, {"order": like}, {})
            found, _ = planned(given, new, threads)
        return found, None

    return tree


balanced_tree = Forms(_plan_tree)


GIVEN = {"cluster_members": ("x", "order", "counts"), "cluster_spread": ("x", "seen", "order", "counts", "sight")}


def summary_work(kernel: str, given: Mapping[str, Any], static: Mapping[str, Any]) -> tuple[dict[str, int], int, float]:
    """(numbers of the argument record, tasks of an item, multiply-adds of an item) of a kernel of summaries."""
    from subquad_numpy.clustered.summaries import CLUSTERS

    (n, d), clusters, size = given["x"].shape[-2:], given["counts"].shape[-1], static["size"]
    tasks, seen = -(-clusters // CLUSTERS), given.get("seen") is not None
    sizes = {"n": n, "d": d, "clusters": clusters, "size": size, "tasks": tasks,
             "turned": int(static.get("turned", False)), "bands": bands_of(d) if seen else 0,
             "stored": stored_word((given["x"],))}  # fmt: skip
    passes = {"cluster_members": 2, "cluster_spread": 12 if seen else 3}[kernel]
    return sizes, tasks, float(clusters * size * d * passes)


def kernel_of_summary(name: str) -> tuple[Any, Any]:
    """The compiler of a kernel of summaries, and its argument record."""
    from subquad_numpy.clustered import summaries as made

    return {
        "cluster_members": (made.cluster_members_kernel, made.MEMBERS_RECORD),
        "cluster_spread": (made.cluster_spread_kernel, made.SPREAD_RECORD),
    }[name]


def outputs_of_summary(name: str, arrays: Sequence[Any], static: Mapping[str, Any]) -> dict[str, Any]:
    """The outputs of a kernel of summaries by name."""
    if name == "cluster_members":
        return dict(zip(("members", "means"), outputs_of_members(*arrays, **static), strict=True))
    return {"spread": outputs_of_spread(*arrays, **static)[0]}


def _plan_summary(name: str, arrays: Sequence[Any], static: Mapping[str, Any], save: bool) -> Callable[..., Any]:
    """The outputs of a kernel of summaries."""
    likes, names, (kernel, record) = outputs_of_summary(name, arrays, static), GIVEN[name], kernel_of_summary(name)
    work = summary_work(name, dict(zip(names, arrays, strict=True)), static)
    batch = next(iter(likes.values())).shape[:-2]
    dtype = computed(arrays[0].dtype)
    likes = {of: Like(like.shape, dtype) for of, like in likes.items()}
    return _planned((kernel(dtype), record), work, batch, names, arrays, likes, {})


cluster_members, cluster_spread = (Forms(partial(_plan_summary, name)) for name in GIVEN)
