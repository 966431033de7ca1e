"""The compiled kernels, one `Compiled` each, which NumPy runs and PyTorch and JAX adapt: no kernel has glue of its own.

Numba is imported at the first call of a kernel, not with this module.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from subquad.backend import Accepts, Call, Override, dtype_name
from subquad.core.beside import namespace_of
from subquad.core.loading import backend_of
from subquad.kernels.feature_map import Elu, Exponential
from subquad_numpy.block_attention import calls as block_attention
from subquad_numpy.block_attention import hashed
from subquad_numpy.block_attention import launch as of_block_attention
from subquad_numpy.causal_conv1d import calls as causal_conv1d
from subquad_numpy.causal_conv1d import launch as of_causal_conv1d
from subquad_numpy.clustered import calls as clustered
from subquad_numpy.clustered import launch as of_clustered
from subquad_numpy.delta_scan import calls as delta_scan
from subquad_numpy.delta_scan import launch as of_delta_scan
from subquad_numpy.features import calls as features
from subquad_numpy.features import gradient_launches as launches
from subquad_numpy.features import gradient_runs as gradients
from subquad_numpy.features import launch as of_features
from subquad_numpy.hashed_order import calls as hashed_order
from subquad_numpy.hashed_order import launch as of_hashed_order
from subquad_numpy.iterative_pinv import calls as iterative_pinv
from subquad_numpy.iterative_pinv import launch as of_pinv
from subquad_numpy.linear_scan import calls as linear_scan
from subquad_numpy.linear_scan import launch as of_linear_scan
from subquad_numpy.lti_scan import calls as lti_scan
from subquad_numpy.lti_scan import launch as of_lti_scan
from subquad_numpy.mamba_step import calls as mamba_step
from subquad_numpy.mamba_step import launch as of_mamba_step
from subquad_numpy.nearest import calls as nearest
from subquad_numpy.nearest import launch as of_nearest
from subquad_numpy.outer_scan import calls as outer_scan
from subquad_numpy.outer_scan import launch as of_outer_scan
from subquad_numpy.project import calls as project
from subquad_numpy.project import launch as of_project
from subquad_numpy.runtime.arguments import Forms
from subquad_numpy.runtime.stored import in_float32, widened
from subquad_numpy.selective_scan import calls as selective_scan
from subquad_numpy.selective_scan import launch as of_selective_scan

__all__ = ["COMPILED", "Compiled", "as_override", "few_rows"]

Array = np.ndarray[Any, Any]
Arrays = Sequence[Any]  # arrays, or None where there is none
Static = Mapping[str, Any]

# Columns of a matrix that is inverted. With more, its five work matrices take over a megabyte and leave the cache.
MAX_COLUMNS = 256
REAL = ("float32", "float64")
COMPLEX = (*REAL, "complex64", "complex128")
HALF = ("float16", "bfloat16")


class Forward(Protocol):
    """``forward(arrays, static) -> (outputs, saved)``; `saved` is what the backward pass needs beside the outputs.

    `new(shape, dtype)` allocates an output. `save` says that a backward pass will come. `threads` is the number of
    threads, or a `runtime.threads.Team` of another library's threads.
    """

    def __call__(
        self,
        arrays: Arrays,
        static: Static,
        *,
        new: Callable[[tuple[int, ...], Any], Array] = ...,
        save: bool = ...,
        threads: int | None = ...,
    ) -> tuple[tuple[Array, ...], Any]: ...


class Backward(Protocol):
    """``backward(arrays, static, saved, outputs, grads, need)`` is a gradient for each array.

    It has the array's shape, or the batch axes of the whole call, over which the caller then adds it up.

    `grads` has None for an output that nobody differentiates; `need` says which arrays want a gradient. A returned
    gradient that is None is zero or was not needed. The gradient by a complex array is ∂/∂Re + i ∂/∂Im of a real loss.
    `backward` returns None alone where it cannot be used: then the generic form is differentiated.
    """

    def __call__(
        self,
        arrays: Arrays,
        static: Static,
        saved: Any,
        outputs: Arrays,
        grads: Arrays,
        need: Sequence[bool],
        *,
        threads: int | None = ...,
    ) -> tuple[Array | None, ...] | None: ...


@dataclass(frozen=True)
class Compiled:
    """A kernel on memory of the host.

    `arrays` are the kernel's positional arguments, and last its `key_mask` (or None) if the kernel has that keyword;
    `static` holds the other keywords.

    Attributes
    ----------
    kernel : str
        Name of the kernel of `subquad.kernels`.
    accepts : Accepts
        Which calls the compiled code takes.
    forward : Forward
        Computes the outputs.
    backward : Backward or None
        Computes the gradients; None if the generic form is to be differentiated.
    launch : callable or None
        ``launch(arrays, static, run)`` returns the outputs, for a library that runs compiled code from its own
        programs. The library provides ``run(launch, operands)``: see `runtime.launch`. All else is plain Array API.
        If the kernel `saves`, ``launch(…, save=True)`` returns more outputs, which `launch_backward` reads.
    launch_backward : callable or None
        ``launch_backward(arrays, static, outputs, grads, run)`` returns a gradient for each array, or None alone, as
        `backward`. `run` is a `GradientRun`. `grads` has None for an output of a kernel that `broadcasts` that nobody
        differentiates, else zeros.
    unaided : frozenset of int
        Outputs without gradient, because the kernel is free to choose their value: the shift of a state.
    saves : bool
        Whether `backward` needs what a forward pass with `save` leaves beside its outputs.
    broadcasts : bool
        Whether all arrays and outputs have two axes of their own, a key mask one, and batch axes that broadcast. Then a
        batch of calls is one call with one more batch axis.
    unread : frozenset of int
        What `launch_backward` does not read: places in (*arrays, *outputs).
    constant : bool
        Whether no output has a gradient: all are numbers of rows.
    launches_half : bool
        Whether `launch` and `launch_backward` take half precision too, where `accepts` names it.
    as_stored : callable or None
        ``as_stored(place)`` tells of which arrays half precision is read as it is; others are converted to float32.
    """

    kernel: str
    accepts: Accepts
    forward: Forward
    backward: Backward | None = None
    launch: Callable[..., tuple[Any, ...]] | None = None
    launch_backward: Callable[..., tuple[Any, ...]] | None = None
    unaided: frozenset[int] = frozenset()
    saves: bool = False
    broadcasts: bool = False
    unread: frozenset[int] = frozenset()
    constant: bool = False
    launches_half: bool = True
    as_stored: Callable[[int], bool] | None = None

    def as_read(self, arrays: Sequence[Any], widen: Callable[[Any], Any]) -> tuple[Any, ...]:
        """The arrays as the kernel reads them: `widen(x)`, in float32, of those in half precision that it cannot."""
        if self.as_stored is None:
            return tuple(arrays)
        return tuple([x if x is None or self.as_stored(i) else widen(x) for i, x in enumerate(arrays)])


def _fused_features(call: Call) -> str | None:
    """The reason why the compiled features cannot take the feature map of a call, or None."""
    known = isinstance(call.static["phi"], Exponential | Elu)
    return _stored(call) if known else "the features are neither exponentials nor elu(x) + 1"


KEYS, QUERIES = (16, 512), (16, 256)  # minimum: one vector; maximum: what stays in a core's cache
LONG = 2**15  # keys from which on any small number of queries counts as few: the library's own products lose digits


def few_rows(call: Call, holds: Callable[[Any], bool] = bool) -> str | None:
    """The reason why the compiled attention should not take a call, or None: one side must be small, the other large.

    Nyström attention needs both shapes: many queries to m landmark keys, and m landmark queries to many keys; decoding
    has one query and a long cache. The small side fits in one core's cache. `holds(condition)` is False for a condition
    on a size that varies in a compiled program. A backend with another good form asks this.
    """
    n, n_kv = call.arrays[0].shape[-2], call.arrays[1].shape[-2]
    for (low, high), few, many in ((KEYS, n_kv, n), (QUERIES, n, n_kv), ((1, QUERIES[0]), n, n_kv)):
        least = LONG if low == 1 else high
        if holds(few >= low) and holds(few <= high) and holds(many > least):
            return None
    return (
        f"it is for {KEYS[0]} to {KEYS[1]} keys and more queries, for {QUERIES[0]} to {QUERIES[1]} queries and more "
        f"keys, or for fewer queries and more than {LONG} keys"
    )


def _small_matrices(call: Call) -> str | None:
    # the reason to decline matrices that do not stay in cache, or None
    m = 0 if call.arrays[0] is None else call.arrays[0].shape[-1]
    return f"matrices of {m} columns do not stay in a core's cache" if m > MAX_COLUMNS else None


MOST_PLACES = 2**24  # places of keys are compared as numbers of the dtype of the logits: float32 has all integers below


def _some_key(call: Call) -> str | None:
    # the reason to decline a call without keys, or with too many to count, or None
    n, n_kv = (x.shape[-2] for x in call.arrays[:2])
    if n_kv == 0:
        return "there is no key"
    if min(n, n_kv) > 1 and max(n, n_kv) > MOST_PLACES:
        return f"it counts up to {MOST_PLACES} keys"
    return _stored(call)


def _intervals(call: Call) -> str | None:
    # the reason to decline changed logits, lists of no block, too many places, or no key; None if there is none
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
    return _stored(call)


def _some_row(call: Call) -> str | None:
    # the reason to decline calls without rows, or rows without numbers; None if there is none
    return "there is no row, or rows have no numbers" if 0 in call.arrays[0].shape[-2:] else None


def _rows_to_hash(call: Call) -> str | None:
    # the reason to decline a call without rows, or with rows and rotations of two precisions, or None
    return _some_row(call) or _stored(call)


def _some_centre(call: Call) -> str | None:
    # the reason to decline a call without rows or centres, or None
    x, centres = call.arrays[:2]
    return "there is no row or no centre" if 0 in (*x.shape[-2:], centres.shape[-2]) else None


def _some_cluster(call: Call) -> str | None:
    # the reason to decline calls without queries or clusters, or None
    q, means = call.arrays[0], call.arrays[4]
    return "there is no query or no cluster" if 0 in (q.shape[-2], means.shape[-2]) else None


def _some_number(call: Call) -> str | None:
    # the reason to decline calls without steps, or without states; None if there is none
    q, _, v, *_ = call.arrays
    return "there is no step, or states have no numbers" if 0 in (*q.shape, v.shape[-1]) else _stored(call)


def _some_step(call: Call) -> str | None:
    # the reason to decline a scan without steps or states, or None
    q, _, v = call.arrays[:3]
    return "there is no step, or no state" if 0 in (*v.shape, q.shape[-1]) else _stored(call)


def _stored(call: Call) -> str | None:
    # the reason to decline float16, or arrays of two precisions, or None; half precision is stored float32
    names = {dtype_name(x) for x in call.arrays if x is not None}
    for name in names & {"float16"}:
        if (reason := _no_half(name)) is not None:
            return reason
    widths = {"float16": 4, "bfloat16": 4, "float32": 4, "complex64": 4, "float64": 8, "complex128": 8}
    found = {widths.get(name) for name in names} - {None}
    return "it computes in one precision" if len(found) > 1 else None


def _few_to_project(call: Call) -> str | None:
    # the reason to leave a product to the library, or None
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
        from subquad_numpy.codegen.stored import WIDENS_HALF

        return None if WIDENS_HALF else "this machine has no instruction that converts float16"
    return None


def _few_to_step(call: Call) -> str | None:
    # the reason to take a step of blocks apart into their kernels, or None
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


def _first(count: int) -> Callable[[int], bool]:
    # whether a place is one of the first ones: what comes after rows, states and weights, is read in float32
    return range(count).__contains__


_NUMBA, _MASK = ("numba",), frozenset({"key_mask"})

COMPILED: dict[str, Compiled] = {
    record.kernel: record
    for record in (
        Compiled(
            "feature_summarize",
            Accepts(dtypes=(*HALF, *REAL), one_dtype=False, options=_MASK, needs=_NUMBA, also=_fused_features),
            features.summarize,
            in_float32(gradients.summarize_backward),
            of_features.launch_summarize,
            launches.launch_summarize_backward,
            broadcasts=True,
            as_stored=_first(2),
            launches_half=False,
            unaided=frozenset({0}),
        ),
        Compiled(
            "feature_attend",
            Accepts(dtypes=(*HALF, *REAL), one_dtype=False, needs=_NUMBA, also=_fused_features),
            features.attend,
            in_float32(gradients.attend_backward),
            of_features.launch_attend,
            launches.launch_attend_backward,
            broadcasts=True,
            as_stored=_first(1),
            launches_half=False,
        ),
        Compiled(
            "feature_step",
            Accepts(dtypes=(*HALF, *REAL), one_dtype=False, options=_MASK, needs=_NUMBA, also=_fused_features),
            features.step,
            in_float32(gradients.step_backward),
            of_features.launch_step,
            launches.launch_step_backward,
            broadcasts=True,
            as_stored=_first(3),
            launches_half=False,
            unaided=frozenset({1}),
            saves=True,
        ),
        Compiled(
            "softmax_attention",
            Accepts(dtypes=(*HALF, *REAL), one_dtype=False, options=_MASK | {"visible"}, needs=_NUMBA, also=_some_key),
            features.softmax,
            in_float32(gradients.softmax_backward),
            of_features.launch_softmax,
            launches.launch_softmax_backward,
            broadcasts=True,
            as_stored=_first(3),
            launches_half=False,
            saves=True,
        ),
        Compiled(
            "block_attention",
            Accepts(dtypes=(*HALF, *REAL), one_dtype=False, options=_MASK, needs=_NUMBA, also=_intervals),
            block_attention.block_attention,
            block_attention.block_attention_backward,
            of_block_attention.launch,
            of_block_attention.launch_backward,
            as_stored=_first(3),
        ),
        Compiled(
            "hashed_attention",
            Accepts(dtypes=(*HALF, *REAL), one_dtype=False, options=_MASK, needs=_NUMBA, also=_intervals),
            hashed.hashed_attention,
            hashed.hashed_attention_backward,
            of_block_attention.launch_hashed,
            of_block_attention.launch_hashed_backward,
            as_stored=_first(3),
        ),
        Compiled(
            "hashed_order",
            Accepts(dtypes=(*HALF, *REAL), one_dtype=False, options=_MASK, needs=_NUMBA, also=_rows_to_hash),
            hashed_order.hashed_order,
            launch=of_hashed_order.launch,
            constant=True,
            as_stored=_first(1),
        ),
        Compiled(
            "nearest",
            Accepts(dtypes=REAL, options=_MASK, needs=_NUMBA, also=_some_centre),
            nearest.nearest,
            nearest.nearest_backward,
            of_nearest.launch,
            of_nearest.launch_backward,
            unaided=frozenset({0, 1}),
        ),
        Compiled(
            "balanced_tree",
            Accepts(dtypes=REAL, options=_MASK, needs=_NUMBA, also=_some_row),
            clustered.balanced_tree,
            launch=of_clustered.launch_tree,
            constant=True,
        ),
        Compiled(
            "clustered_attention",
            Accepts(
                dtypes=REAL,
                options=frozenset({"always", "reach", "group", "expanded"}),
                needs=_NUMBA,
                also=_some_cluster,
            ),
            clustered.clustered_attention,
            launch=of_clustered.launch,
        ),
        Compiled(
            "selective_scan",
            Accepts(dtypes=("float16", "bfloat16", *COMPLEX), one_dtype=False, needs=_NUMBA),
            selective_scan.scan,
            in_float32(selective_scan.scan_backward),
            of_selective_scan.launch,
            of_selective_scan.launch_backward,
            unread=frozenset({10, 11}),
            as_stored=frozenset({0, 1, 3, 4, 6}).__contains__,
        ),
        Compiled(
            "linear_scan",
            Accepts(dtypes=(*HALF, *COMPLEX), one_dtype=False, needs=_NUMBA, also=_stored),
            linear_scan.scan,
            linear_scan.scan_backward,
            of_linear_scan.launch,
            of_linear_scan.launch_backward,
            unread=frozenset({1}),
            as_stored=_first(2),
        ),
        Compiled(
            "delta_scan",
            Accepts(dtypes=(*HALF, *REAL), one_dtype=False, needs=_NUMBA, also=_some_number),
            delta_scan.scan,
            delta_scan.scan_backward,
            of_delta_scan.launch,
            of_delta_scan.launch_backward,
            unread=frozenset({9, 10}),
            as_stored=_first(7),
        ),
        Compiled(
            "outer_scan",
            Accepts(dtypes=(*HALF, *REAL), one_dtype=False, needs=_NUMBA, also=_some_step),
            outer_scan.scan,
            outer_scan.scan_backward,
            of_outer_scan.launch,
            of_outer_scan.launch_backward,
            unread=frozenset({9, 10}),
            as_stored=_first(5),
        ),
        Compiled(
            "project",
            Accepts(dtypes=("float16", "bfloat16", *REAL), one_dtype=False, needs=_NUMBA, also=_few_to_project),
            project.project,
            project.project_backward,
            of_project.launch,
            of_project.launch_backward,
            unread=frozenset({3}),
            as_stored=frozenset({1}).__contains__,
        ),
        Compiled(
            "mamba_step",
            Accepts(dtypes=("float16", "bfloat16", *REAL), one_dtype=False, needs=_NUMBA, also=_few_to_step),
            mamba_step.step,
            launch=of_mamba_step.launch,
            as_stored=mamba_step.is_matrix,
        ),
        Compiled(
            "causal_conv1d",
            Accepts(dtypes=(*HALF, *REAL), one_dtype=False, needs=_NUMBA, also=_stored),
            causal_conv1d.conv,
            causal_conv1d.conv_backward,
            of_causal_conv1d.launch,
            of_causal_conv1d.launch_backward,
            unread=frozenset({5, 6}),
            as_stored=_first(1),
        ),
        Compiled(
            "lti_scan",
            Accepts(dtypes=(*HALF, *COMPLEX), one_dtype=False, needs=_NUMBA, also=_stored),
            lti_scan.scan,
            lti_scan.scan_backward,
            of_lti_scan.launch,
            of_lti_scan.launch_backward,
            unread=frozenset({8, 9}),
            as_stored=_first(1),
        ),
        Compiled(
            "iterative_pinv",
            Accepts(dtypes=REAL, needs=_NUMBA, also=_small_matrices),
            iterative_pinv.iterative_pinv,
            iterative_pinv.pinv_backward,
            of_pinv.launch,
            of_pinv.launch_backward,
            broadcasts=True,
            unread=frozenset({1}),
        ),
    )
}
"""Every compiled kernel by the name of its kernel."""


def as_override(compiled: Compiled) -> Override:
    """The override "numba" by which NumPy runs a compiled kernel."""
    forward, masked = compiled.forward, "key_mask" in compiled.accepts.options

    def run(*arrays: Array | None, **static: Any) -> Any:
        if masked:
            arrays = (*arrays, static.pop("key_mask", None))
        outputs, _ = forward(compiled.as_read(arrays, widened), static)
        return outputs if len(outputs) > 1 else outputs[0]

    def bind(arrays: Arrays, static: Static) -> Callable[..., Any] | None:
        if not isinstance(forward, Forms):
            return None
        static = dict(static)
        given = (*arrays, static.pop("key_mask", None)) if masked else arrays
        if any(x is not y for x, y in zip(given, compiled.as_read(given, widened), strict=True)):
            return None
        return forward.bound(given, static, masked=masked)

    return Override(compiled.kernel, "numba", run, compiled.accepts, bind)
