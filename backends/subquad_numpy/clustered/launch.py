"""Clustered attention as launches."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from array_api_compat import array_namespace

from subquad.backend import Array
from subquad.core.dtypes import cast
from subquad.kernels.balanced_tree import outputs as tree_outputs
from subquad.kernels.clustered_attention import outputs as outputs_of
from subquad_numpy.clustered.calls import (
    GIVEN,
    INTEGERS,
    NAMES,
    TREE_ARRAYS,
    cut_work,
    kernel_of_summary,
    numbers_of,
    outputs_of_summary,
    summary_work,
    tree_runs,
    tree_work,
)
from subquad_numpy.runtime.launch import Launch, Run, threads_for


def launch(arrays: Sequence[Any], static: Mapping[str, Any], run: Run) -> tuple[Array, ...]:
    """The outputs of the kernel `clustered_attention`, by one launch."""
    from subquad_numpy.clustered.forward import FORWARD_RECORD, clustered_attention_kernel

    out, lse = outputs_of(*arrays, **static)
    sizes, tasks, products = cut_work(arrays, static)
    batch, xp = tuple(lse.shape[:-1]), array_namespace(arrays[0])
    made = Launch(
        clustered_attention_kernel, (np.dtype(out.dtype),), FORWARD_RECORD, {"out": out, "lse": lse}, sizes, batch,
        tasks, threads_for(int(math.prod(batch) * products)),
    )  # fmt: skip
    given = {
        name: cast(xp, x, xp.int32) if name in INTEGERS and x is not None else x
        for name, x in zip(NAMES, arrays, strict=True)
    }
    numbers = xp.asarray(np.array(numbers_of(static)), dtype=out.dtype)
    found = run(made, {"numbers": numbers, **given})
    return found["out"], found["lse"]


def launch_tree(arrays: Sequence[Any], static: Mapping[str, Any], run: Run) -> tuple[Array, ...]:
    """The output of the kernel `balanced_tree`, by one launch, or by several on large sets of rows."""
    from subquad_numpy.clustered.tree import TREE_RECORD, balanced_tree_kernel

    (order,) = tree_outputs(*arrays[:2], **static)
    batch, found, (_, products) = tuple(order.shape[:-1]), None, tree_work(arrays, static)
    items = math.prod(batch)
    threads = threads_for(int(items * products))
    for sets, size in tree_runs(arrays[0].shape[-2], static["size"], items, threads):
        sizes, _ = tree_work(arrays, {"size": size}, sets)
        made = Launch(
            balanced_tree_kernel, (np.dtype(arrays[0].dtype),), TREE_RECORD, {"order": order}, sizes, batch, sets,
            threads,
        )  # fmt: skip
        found = run(made, dict(zip(TREE_ARRAYS, (*arrays, found), strict=True)))["order"]
    return (found,)


def launch_summary(name: str, arrays: Sequence[Any], static: Mapping[str, Any], run: Run) -> tuple[Array, ...]:
    """The outputs of the kernel `cluster_members` or `cluster_spread`, by one launch."""
    outputs, (kernel, record) = outputs_of_summary(name, arrays, static), kernel_of_summary(name)
    xp, given = array_namespace(arrays[0]), dict(zip(GIVEN[name], arrays, strict=True))
    sizes, tasks, products = summary_work(name, given, static)
    batch = tuple(next(iter(outputs.values())).shape[:-2])
    made = Launch(
        kernel, (np.dtype(arrays[0].dtype),), record, outputs, sizes, batch, tasks,
        threads_for(int(math.prod(batch) * products)),
    )  # fmt: skip
    found = run(made, {of: cast(xp, x, xp.int32) if of in INTEGERS and x is not None else x for of, x in given.items()})
    return tuple(found[of] for of in outputs)
