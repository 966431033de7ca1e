"""When a compiled kernel declines a call: each function returns the reason, or None if the kernel takes the call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from subquad.backend import Call
from subquad.core.beside import namespace_of
from subquad.core.loading import backend_of
from subquad.core.override import PLAIN, dtype_name
from subquad.kernels.feature_map import Elu, Exponential
from subquad_numpy.mamba_step import calls as mamba_step
from subquad_numpy.project import calls as project

REAL = ("float32", "float64")

# Columns of a matrix that is inverted. With more, its five work matrices take over a megabyte and leave the cache.
MAX_COLUMNS = 256


def fused_features(call: Call) -> str | None:
    """The reason why the compiled features cannot take the feature map of a call, or None."""
    known = isinstance(call.static["phi"], Exponential | Elu)
    return stored(call) if known else "the features are neither exponentials nor elu(x) + 1"


KEYS, QUERIES = (16, 512), (16, 256)  # minimum: one vector; maximum: what stays in a core's cache
BOTH = 32, 512  # queries, of which keys may be as many, where nothing is recorded or traced
LONG = 2**15  # keys from which on any small number of queries counts as few: the library's own products lose digits


def few_rows(call: Call, holds: Callable[[Any], bool] = bool) -> str | None:
    """The reason why the compiled attention should not take a call, or None: one side must be small, the other large.

    Nyström attention needs both shapes: many queries to m landmark keys, and m landmark queries to many keys; decoding
    has one query and a long cache. The small side fits in one core's cache. Both may be small in a call that is neither
    recorded nor traced. `holds(condition)` is False for a condition on a size that varies in a compiled program. A
    backend with another good form asks this.
    """
    n, n_kv = call.arrays[0].shape[-2], call.arrays[1].shape[-2]
    for (low, high), few, many in ((KEYS, n_kv, n), (QUERIES, n, n_kv), ((1, QUERIES[0]), n, n_kv)):
        least = LONG if low == 1 else high
        if holds(few >= low) and holds(few <= high) and holds(many > least):
            return None
    if call.conditions == PLAIN and n >= BOTH[0] and n_kv >= KEYS[0] and max(n, n_kv) <= BOTH[1]:
        return None
    return (
        f"it is for {KEYS[0]} to {KEYS[1]} keys and more queries, for {QUERIES[0]} to {QUERIES[1]} queries and more "
        f"keys, for fewer queries and more than {LONG} keys, or for {BOTH[0]} to {BOTH[1]} queries and {KEYS[0]} to "
        f"{BOTH[1]} keys in a call that is neither recorded nor traced"
    )


def small_matrices(call: Call) -> str | None:
    """The reason to decline matrices that do not stay in cache, or None."""
    return small_inverse(0 if call.arrays[0] is None else call.arrays[0].shape[-1])


def small_inverse(m: int) -> str | None:
    """The reason to decline the inverse of a matrix of m columns, or None."""
    return f"matrices of {m} columns do not stay in a core's cache" if m > MAX_COLUMNS else None


MOST_PLACES = 2**24  # places of keys are compared as numbers of the dtype of the logits: float32 has all integers below


def some_key(call: Call) -> str | None:
    """The reason to decline a call without keys, or with too many to count, or None."""
    n, n_kv = (x.shape[-2] for x in call.arrays[:2])
    if n_kv == 0:
        return "there is no key"
    if min(n, n_kv) > 1 and max(n, n_kv) > MOST_PLACES:
        return f"it counts up to {MOST_PLACES} keys"
    return stored(call)


def intervals(call: Call) -> str | None:
    """The reason to decline changed logits, lists of no block, too many places, or no key; None if there is none."""
    q, k = call.arrays[:2]
    if call.kernel == "block_attention":
        blocks, pairs, bias = call.arrays[5], *call.arrays[10:12]
        if pairs is not None or bias is not None:
            return "it takes no mask or bias of queries × keys"
        if blocks is not None and blocks.shape[-1] == 0:
            return "no block is listed"
    if 0 in (q.shape[-2], k.shape[-2]):
        return "there is no query or no key"
    if max(q.shape[-2], k.shape[-2]) > MOST_PLACES:
        return f"it counts up to {MOST_PLACES} keys"
    return stored(call)


def some_row(call: Call) -> str | None:
    """The reason to decline calls without rows, or rows without numbers; None if there is none."""
    return "there is no row, or rows have no numbers" if 0 in call.arrays[0].shape[-2:] else None


def rows_to_hash(call: Call) -> str | None:
    """The reason to decline a call without rows, or with rows and rotations of two precisions, or None."""
    return some_row(call) or stored(call)


def some_centre(call: Call) -> str | None:
    """The reason to decline a call without rows or centres, or None."""
    x, centres = call.arrays[:2]
    return "there is no row or no centre" if 0 in (*x.shape[-2:], centres.shape[-2]) else None


def some_cluster(call: Call) -> str | None:
    """The reason to decline calls without queries or clusters, or None."""
    q, means = call.arrays[0], call.arrays[4]
    return "there is no query or no cluster" if 0 in (q.shape[-2], means.shape[-2]) else stored(call)


def some_cluster_of_rows(call: Call) -> str | None:
    """The reason to decline calls without rows or without clusters, or None."""
    counts = call.arrays[-1] if len(call.arrays) == 3 else call.arrays[3]
    return some_row(call) or ("there is no cluster" if counts.shape[-1] == 0 else stored(call))


def some_number(call: Call) -> str | None:
    """The reason to decline calls without steps, or without states; None if there is none."""
    q, _, v, *_ = call.arrays
    return "there is no step, or states have no numbers" if 0 in (*q.shape, v.shape[-1]) else stored(call)


def some_step(call: Call) -> str | None:
    """The reason to decline a scan without steps or states, or None."""
    q, _, v = call.arrays[:3]
    return "there is no step, or no state" if 0 in (*v.shape, q.shape[-1]) else stored(call)


def stored(call: Call) -> str | None:
    """The reason to decline float16, or arrays of two precisions, or None; half precision is stored float32."""
    names = {dtype_name(x) for x in call.arrays if x is not None}
    for name in names & {"float16"}:
        if (reason := _no_half(name)) is not None:
            return reason
    widths = {"float16": 4, "bfloat16": 4, "float32": 4, "complex64": 4, "float64": 8, "complex128": 8}
    found = {widths.get(name) for name in names} - {None}
    return "it computes in one precision" if len(found) > 1 else None


def converted(call: Call) -> str | None:
    """The reason to decline float16, or None."""
    return _no_half("float16") if "float16" in {dtype_name(x) for x in call.arrays if x is not None} else None


def few_to_project(call: Call) -> str | None:
    """The reason to leave a product to the library, or None."""
    x, W, _ = call.arrays
    if 0 in (*x.shape, W.shape[0]):
        return "there is no row, no input or no output"
    if dtype_name(W) == "float64" != dtype_name(x):
        return "its weights are not of more digits than its rows"
    rows = x.shape[0] * backend_of(namespace_of(x)).items_behind(x)
    if rows > project.MOST_ROWS:
        return f"it is for at most {project.MOST_ROWS} rows"
    return _no_half(dtype_name(W))


def _no_half(stored: str) -> str | None:
    # the reason to decline weights of float16, or None
    if stored == "float16":
        from subquad_numpy.codegen.halves import WIDENS_HALF

        return None if WIDENS_HALF else "this machine has no instruction that converts float16"
    return None


def few_to_step(call: Call) -> str | None:
    """The reason to take a step of blocks apart into their kernels, or None."""
    x, *arrays = call.arrays
    dtype, stored = dtype_name(x), dtype_name(call.arrays[mamba_step.FIRST_MATRIX])
    for i, a in enumerate(call.arrays):
        if a is not None and dtype_name(a) != (stored if mamba_step.is_matrix(i) else dtype):
            return "it takes matrices of one dtype, and all else of one dtype"
    if dtype not in REAL or stored == "float64" != dtype:
        return "it computes in float32 or float64, and in no fewer digits than its matrices have"
    rows = x.shape[0] * backend_of(namespace_of(x)).items_behind(x)
    if rows > mamba_step.MOST_ROWS:
        return f"it is for at most {mamba_step.MOST_ROWS} sequences"
    shapes = [None if a is None else tuple(a.shape) for a in arrays]
    count = mamba_step.OF_BLOCK
    if 0 in x.shape or any(shapes[i : i + count] != shapes[:count] for i in range(count, len(shapes), count)):
        return "there is no sequence, or the blocks have different shapes"
    return _no_half(stored)
