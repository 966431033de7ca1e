"""Clustered attention on NumPy arrays, compiled: see `subquad_numpy.compiled.Compiled`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from subquad.kernels.balanced_tree import outputs as tree_outputs
from subquad.kernels.cluster_summaries import outputs_of_members, outputs_of_spread
from subquad.kernels.clustered_attention import bands_of, outputs
from subquad_numpy.runtime.arguments import Fix, Forms, Run, fix_items, fixed

Array = np.ndarray[Any, Any]
NAMES = (
    "q", "k", "v", "order", "means", "spread", "mean_values", "counts", "group_means", "group_spread",
    "group_values", "stop", "place", "cluster_of", "before_out", "before_lse",
)  # fmt: skip
INTEGERS = frozenset({"order", "counts", "stop", "place", "cluster_of"})


def axes_of(name: str) -> int:
    """How many of the last axes of an array belong to one item."""
    return 1 if name in INTEGERS or name == "before_lse" else 2


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
        "group": group, "expanded": expanded, "tasks": tasks,
    }  # fmt: skip
    weighed = groups + min(clusters, expanded * group) if groups else clusters
    keys = (always + static["opened"]) * size * (d + d_v) + weighed * (2 * d + bands + d_v)
    return sizes, tasks, float(n * keys)


def _fix(name: str, x: Array) -> Fix:
    if name in INTEGERS and x.dtype != np.int32:
        return partial(np.ascontiguousarray, dtype=np.int32)
    return fix_items(x, axes_of(name))


def _plan(arrays: Sequence[Any], static: Mapping[str, Any], save: bool) -> Callable[..., Any]:
    """The output and the log-sum-exp of the kernel `clustered_attention`."""
    from subquad_numpy.clustered.forward import FORWARD_RECORD, clustered_attention_kernel

    of_out, of_lse = outputs(*arrays, **static)
    dtype, sizes = arrays[0].dtype, cut_work(arrays, static)
    numbers, tasks, products = sizes
    fixes = [None if x is None else _fix(name, x) for name, x in zip(NAMES, arrays, strict=True)]

    def ready(arrays: Sequence[Any]) -> list[Any]:
        return [x if x is None else fixed(fix, x) for fix, x in zip(fixes, arrays, strict=True)]

    scale = np.array([static["scale"]], dtype)
    examples = {name: x for name, x in zip(NAMES, ready(arrays), strict=True) if x is not None}
    made = {"numbers": scale, "out": np.empty(of_out.shape, dtype), "lse": np.empty(of_lse.shape, dtype)}
    batch = of_lse.shape[:-1]
    run = Run(clustered_attention_kernel(dtype), FORWARD_RECORD, batch, tasks, products, numbers | examples | made)

    def clustered_attention(
        arrays: Sequence[Any], new: Callable[..., Array], threads: Any
    ) -> tuple[tuple[Array, Array], None]:
        out, lse = new(of_out.shape, dtype), new(of_lse.shape, dtype)
        run((scale, *ready(arrays), out, lse), threads)
        return (out, lse), None

    return clustered_attention


clustered_attention = Forms(_plan)


def tree_work(arrays: Sequence[Any], static: Mapping[str, Any]) -> tuple[dict[str, int], float]:
    """(numbers of the argument record of `balanced_tree`, multiply-adds of an item)."""
    x, sketch, _ = arrays
    (n, d), directions, size = x.shape[-2:], sketch.shape[-1], static["size"]
    clusters = -(-n // size)
    slots = size * 2 ** max(0, math.ceil(math.log2(clusters)))
    sizes = {"n": n, "d": d, "directions": directions, "size": size, "slots": slots, "places": clusters * size}
    return sizes, float(n * d * (directions + 12 * math.ceil(math.log2(clusters))))


def _plan_tree(arrays: Sequence[Any], static: Mapping[str, Any], save: bool) -> Callable[..., Any]:
    """The output of the kernel `balanced_tree`."""
    from subquad_numpy.clustered.tree import TREE_RECORD, balanced_tree_kernel

    (like,) = tree_outputs(*arrays[:2], **static)
    batch, dtype = like.shape[:-1], arrays[0].dtype
    numbers, products = tree_work(arrays, static)
    fixes = [None if x is None else fix_items(x, axes) for x, axes in zip(arrays, (2, 2, 1), strict=True)]

    def ready(arrays: Sequence[Any]) -> list[Any]:
        return [x if x is None else fixed(fix, x) for fix, x in zip(fixes, arrays, strict=True)]

    examples = {name: x for name, x in zip(("x", "sketch", "mask"), ready(arrays), strict=True) if x is not None}
    order = np.empty(like.shape, np.int32)
    run = Run(balanced_tree_kernel(dtype), TREE_RECORD, batch, 1, products, numbers | examples | {"order": order})

    def balanced_tree(arrays: Sequence[Any], new: Callable[..., Array], threads: Any) -> tuple[tuple[Array], None]:
        order = new(like.shape, np.int32)
        run((*ready(arrays), order), threads)
        return (order,), None

    return balanced_tree


balanced_tree = Forms(_plan_tree)


GIVEN = {"cluster_members": ("x", "order", "counts"), "cluster_spread": ("x", "seen", "order", "counts", "sight")}


def summary_work(kernel: str, given: Mapping[str, Any], static: Mapping[str, Any]) -> tuple[dict[str, int], int, float]:
    """(numbers of the argument record, tasks of an item, multiply-adds of an item) of a kernel of summaries."""
    from subquad_numpy.clustered.summaries import CLUSTERS

    (n, d), clusters, size = given["x"].shape[-2:], given["counts"].shape[-1], static["size"]
    tasks, seen = -(-clusters // CLUSTERS), given.get("seen") is not None
    sizes = {"n": n, "d": d, "clusters": clusters, "size": size, "tasks": tasks,
             "turned": int(static.get("turned", False)), "bands": bands_of(d) if seen else 0}  # fmt: skip
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
    likes, dtype, names = outputs_of_summary(name, arrays, static), arrays[0].dtype, GIVEN[name]
    kernel, record = kernel_of_summary(name)
    sizes, tasks, products = summary_work(name, dict(zip(names, arrays, strict=True)), static)
    fixes = [None if x is None else _fix(of, x) for of, x in zip(names, arrays, strict=True)]

    def ready(arrays: Sequence[Any]) -> list[Any]:
        return [x if x is None else fixed(fix, x) for fix, x in zip(fixes, arrays, strict=True)]

    examples = {of: x for of, x in zip(names, ready(arrays), strict=True) if x is not None}
    made = {of: np.empty(like.shape, dtype) for of, like in likes.items()}
    batch = next(iter(likes.values())).shape[:-2]
    run = Run(kernel(dtype), record, batch, tasks, products, sizes | examples | made)

    def summarize(arrays: Sequence[Any], new: Callable[..., Array], threads: Any) -> tuple[tuple[Array, ...], None]:
        given = dict(zip(names, ready(arrays), strict=True))
        outs = {of: new(like.shape, dtype) for of, like in likes.items()}
        every = given | outs
        run([every[of] for of, axes in record.items() if axes is not None], threads)
        return tuple(outs.values()), None

    return summarize


cluster_members, cluster_spread = (Forms(partial(_plan_summary, name)) for name in GIVEN)
