"""The compiled scan of outer products on NumPy arrays, and its gradient: see `subquad_numpy.compiled.Compiled`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from subquad.kernels.outer_scan import Inputs
from subquad_numpy.runtime.arguments import Forms, Run, fix_elements, fix_items, fix_rows, fixed
from subquad_numpy.runtime.stored import common, stored_word, widest
from subquad_numpy.runtime.threads import thread_count

Array = np.ndarray[Any, Any]
SMALL = 1 << 18  # multiply-adds of a call, about 20 µs: below that, waking a second thread costs more than it saves
TASKS = 8  # of a gradient, if so many heads are there
RUNNING = 2  # tasks of a gradient that run at once, as far as its memory is planned
MOST_BYTES = 48 << 20  # of memory of a gradient, beyond its results
OF_THREAD = (
    2  # tasks of a thread at least, if so many panels are there: a thread that other work slows down takes fewer
)
OVER_TIME = ("q", "k", "v", "g", "weight")
WHOLE_ROWS = ("q", "k", "v", "g")  # inputs whose last axis is read in vectors; time, heads and items may be strided
WHOLE = {"bonus": 2, "initial_state": 3}  # inputs of which an item must be contiguous: so many axes


def _plan_scan(arrays: Sequence[Any], static: Mapping[str, Any], save: bool) -> Callable[..., Any]:
    """`outer_scan`: o and the last state; or `gated_outer_scan`, which has one array more."""
    from subquad_numpy.outer_scan.forward import FORWARD_RECORD, forward_kernel

    given, gates = Inputs(*arrays[: len(Inputs._fields)]), arrays[len(Inputs._fields) :]
    (batch, n, heads, d_v), d, dtype = given.v.shape, given.q.shape[-1], dtype_of(given)
    out_dtype = common(given.q, given.k, given.v)
    fix = [None if x is None else fix_for(name, x) for name, x in given._asdict().items()]
    if given.initial_state is not None:
        fix[Inputs._fields.index("initial_state")] = fix_matrices(given.initial_state)
    fix += map(fix_rows, gates)
    must_fix = any(f is not None for f in fix)
    numbers = np.array([static["scale"]], dtype)
    is_small = batch * n * heads * d * d_v < SMALL
    runs: dict[int, Run] = {}  # by the number of threads, on which the size of a task depends
    no_gate = () if gates else (None,)

    def scan(arrays: Sequence[Any], new: Callable[..., Array], threads: Any) -> tuple[tuple[Array, Array], None]:
        o, state = new((batch, n, heads, d_v), out_dtype), new((batch, heads, d, d_v), dtype)
        mine = arrays
        if must_fix:
            mine = [None if x is None else fixed(f, x) for f, x in zip(fix, arrays, strict=True)]
        count = 1 if is_small else thread_count(threads)
        run = runs.get(count)
        if run is None:
            inputs, own_gates = Inputs(*mine[: len(fix) - len(gates)]), mine[len(fix) - len(gates) :]
            sizes = sizes_of(inputs, static, strides_of) | {"stored": stored_of(given, o, *gates)}
            sizes["panels"], tasks = cut_work(batch * heads, d_v, dtype, count)
            for z in own_gates:
                sizes |= dict(zip(("z_item", "z_step", "z_head"), strides_of(z), strict=False))
            kernel = forward_kernel(*kind_of(given))
            run = runs[count] = Run(kernel, FORWARD_RECORD, (), tasks, math.inf, sizes)
        run((*mine, *no_gate, numbers, o, state), count)
        return (o, state), None

    return scan


scan = Forms(_plan_scan)


def scan_backward(
    arrays: Sequence[Array | None], static: Mapping[str, Any], saved: None, outputs: Sequence[Array],
    grads: Sequence[Array | None], need: Sequence[bool], *, threads: int | None = None,
) -> tuple[Array | None, ...]:  # fmt: skip
    """The gradients of `scan`.

    A long sequence is cut into spans: a first pass keeps the state before each of them, and memory beyond the results
    stays below some tens of megabytes. The number of threads does not change the result.
    """
    from subquad_numpy.outer_scan.backward import BACKWARD_RECORD, WRITTEN, backward_kernel

    given = Inputs(*arrays)
    p = Inputs(*(None if x is None else fixed(fix_for(name, x), x) for name, x in given._asdict().items()))
    (batch, n, heads, d_v), (groups, d), dtype = p.v.shape, p.q.shape[-2:], dtype_of(p)
    by_o, by_state = grads
    by_o = np.zeros(p.v.shape, dtype) if by_o is None else fixed(fix_rows(by_o), by_o)
    by_state = None if by_state is None else np.ascontiguousarray(by_state, dtype)
    wanted = dict(zip(Inputs._fields, need, strict=True))
    parts, span = cut_gradient(batch, n, groups, heads // groups, d, d_v, dtype.itemsize)
    # gradients that are written once are rounded then, others when they are added up
    is_once = parts == 1 and heads == groups and d_v <= panel_of_gradient(dtype)
    rounded = {"v"}
    if is_once:
        rounded |= {"q", "k", "g"} if kind_of(p)[1] else {"q", "k"}
    results: dict[str, Any] = {  # over time, but for the sums over it
        f"grad_{name}": np.zeros(x.shape, x.dtype if name in rounded else dtype)
        for name, x in p._asdict().items()
        if x is not None and (name in "qkv" or (name in OVER_TIME and wanted[name]))
    }
    sums = {
        f"grad_{name}": np.zeros((batch, heads, width)) for name, width in (("bonus", d), ("skip", d_v)) if wanted[name]
    }
    numbers, kind = np.array([static["scale"]], dtype), kind_of(p)
    spans = [slice(start, min(start + span, n)) for start in range(0, n, span)]
    if static["reverse"]:
        spans = [slice(max(0, stop - span), stop) for stop in range(n, 0, -span)]
    for steps, start in reversed(list(zip(spans, _states(p, static, spans, numbers, threads), strict=True))):
        mine, count = _cut(p, steps)._replace(initial_state=start), steps.stop - steps.start
        written = sums | {name: x[:, steps] for name, x in results.items()}
        written["grad_initial_state"] = np.empty((batch, heads, d, d_v), dtype)
        if parts > 1:
            written |= {name: np.zeros((parts, batch, count, groups, d), dtype) for name in ("grad_q", "grad_k")}
        sizes = sizes_of(mine, static, strides_of) | {"parts": parts, "total": n}
        sizes["total_of_maps"] = n if parts == 1 else count
        sizes["stored"] = stored_of(p, by_o, *(written.get(f"grad_{name}") for name in OVER_TIME))
        sizes |= dict(zip(("grad_o_item", "grad_o_step", "grad_o_head"), strides_of(by_o), strict=False))
        run = Run(backward_kernel(*kind), BACKWARD_RECORD, (), batch * groups * parts, math.inf, sizes)
        run((*mine, numbers, by_o[:, steps], by_state, *(written.get(name) for name in WRITTEN)), threads)
        for name in ("grad_q", "grad_k") if parts > 1 else ():
            np.sum(written[name], axis=0, out=results[name][:, steps])
        by_state = written["grad_initial_state"]
    results |= sums | {"grad_initial_state": by_state}

    def of(name: str, x: Array | None) -> Array | None:
        """The gradient by input x, with the shape and dtype of x."""
        value = results.get(f"grad_{name}")
        if x is None or value is None or not wanted[name]:
            return None
        if name == "bonus" and x.shape[0] < batch:
            value = value.sum(axis=0, keepdims=True)
        if name == "skip":
            value = value.sum(axis=0)
            value = value.sum(axis=1, keepdims=True) if x.shape[1] < d_v else value
        return value.astype(dtype, copy=False) if name in ("bonus", "skip") else value

    return tuple(of(name, x) for name, x in given._asdict().items())


def _states(
    p: Inputs, static: Mapping[str, Any], spans: Sequence[slice], numbers: Array, threads: int | None
) -> list[Array | None]:
    """The state before each span, in the order of the scan."""
    from subquad_numpy.outer_scan.forward import FORWARD_RECORD, forward_kernel

    batch, _, heads, d_v = p.v.shape
    states = [p.initial_state]
    for steps in spans[:-1]:
        mine = _cut(p, steps)._replace(initial_state=states[-1])
        sizes = sizes_of(mine, static, strides_of) | {"stored": stored_of(mine, None)}
        sizes["panels"], tasks = cut_work(batch * heads, d_v, dtype_of(p), thread_count(threads))
        state = np.empty((batch, heads, p.q.shape[-1], d_v), dtype_of(p))
        run = Run(forward_kernel(*kind_of(p)), FORWARD_RECORD, (), tasks, math.inf, sizes)
        run((*mine, None, numbers, None, state), threads)
        states.append(state)
    return states


def _cut(p: Inputs, steps: slice) -> Inputs:
    """The inputs of some steps, as views."""
    return p._replace(**{
        name: None if (x := getattr(p, name)) is None else x[:, steps] for name in (*OVER_TIME, "resets")
    })  # fmt: skip


def cut_gradient(batch: int, n: int, groups: int, shared: int, d: int, d_v: int, itemsize: int) -> tuple[int, int]:
    """(tasks of a group, steps of a span) of the gradient, the span being the longest within `MOST_BYTES`.

    They do not depend on the number of threads, so the gradient does not either. Memory is that of the states before
    spans, of the parts of the gradients by q and k, and of the states before blocks that `RUNNING` tasks keep.
    """
    from subquad_numpy.outer_scan.layout import BLOCK

    state = batch * groups * shared * d * d_v * itemsize
    kept = RUNNING * d * (min(d_v, 64) + 16) * itemsize / BLOCK  # of a step
    parts = min(shared, -(-TASKS // (batch * groups)))
    while True:
        of_step = kept + (2 * parts * batch * groups * d * itemsize if parts > 1 else 0)
        span = n if n * of_step <= MOST_BYTES else max(BLOCK, int(math.sqrt(n * state / of_step)))
        span = min(n, -(-span // BLOCK) * BLOCK)
        if parts == 1 or span * of_step + (-(-n // span) - 1) * state <= MOST_BYTES:
            return parts, span
        parts //= 2


def fix_for(name: str, x: Array) -> Any:
    """The fix after which the kernels can read an input like x: see `runtime.arguments`."""
    if name in WHOLE_ROWS:
        return fix_rows(x)
    return fix_items(x, WHOLE[name] if name == "bonus" else x.ndim) if name in WHOLE else fix_elements(x)


def fix_matrices(x: Array) -> Any:
    """The fix after which rows or columns of matrices like x are contiguous."""
    has_rows = x.strides[-1] == x.itemsize or x.shape[-1] == 1
    has_columns = x.strides[-2] == x.itemsize or x.shape[-2] == 1
    return fix_elements(x) if has_rows or has_columns else np.ascontiguousarray


def kind_of(given: Inputs) -> tuple[str, bool]:
    """What the kernels are specialised for: (dtype, is there a decay for each channel)."""
    return dtype_of(given).name, given.g is not None and given.g.shape[-1] > 1


def dtype_of(given: Inputs) -> np.dtype[Any]:
    """The dtype that the kernels compute in."""
    return widest(*given[:-1])


def stored_of(given: Inputs, o: Any, *gradients: Any) -> int:
    """How the arrays over time, the output or the gradient by it, and gradients are stored; see `layout.Kinds`."""
    return stored_word((*given[:5], o, *gradients))


def cut_work(heads: int, d_v: int, dtype: Any, threads: int) -> tuple[int, int]:
    """(panels of columns that a task has, tasks) of a scan of so many heads; of a thread, at least `OF_THREAD`.

    The panels of a task share its decays, and rows that are widened. What a cache line of the output holds, two panels
    of half precision where a panel is one vector, is then seldom the work of two threads.
    """
    from subquad_numpy.codegen import lanes_of
    from subquad_numpy.outer_scan.tile import PANEL_VECTORS

    panels = -(-d_v // (PANEL_VECTORS * lanes_of(np.dtype(dtype))))
    parts = max(1, min(panels, -(-OF_THREAD * threads // max(1, heads)) if threads > 1 else 1))
    of_task = max(1, -(-panels // parts))
    return of_task, heads * -(-panels // of_task)


def panel_of_gradient(dtype: Any) -> int:
    """The columns of the state that a task of the gradient takes at once."""
    from subquad_numpy.codegen import lanes_of
    from subquad_numpy.outer_scan.backward import PANEL

    return PANEL * lanes_of(np.dtype(dtype))


def strides_of(x: Array) -> tuple[int, ...]:
    """The strides of an array in elements; axes of length 1 have stride 0, and so an item that all share."""
    return tuple(0 if size == 1 else stride // x.itemsize for size, stride in zip(x.shape, x.strides, strict=True))


def contiguous_strides(x: Any) -> tuple[int, ...]:
    """The strides in elements of a contiguous array of the shape of x."""
    return tuple(0 if size == 1 else math.prod(x.shape[i + 1 :]) for i, size in enumerate(x.shape))


def sizes_of(p: Inputs, static: Mapping[str, Any], strides: Callable[[Any], tuple[int, ...]]) -> dict[str, int]:
    """The numbers of an argument record; an input that is None has none."""
    batch, n, heads, d_v = p.v.shape
    sizes = {"batch": batch, "n": n, "groups": p.q.shape[2], "heads": heads, "d": p.q.shape[3], "d_v": d_v}
    sizes["reverse"] = int(static["reverse"])
    axes = ("item", "step", "head")
    for name in OVER_TIME:
        x = getattr(p, name)
        if x is not None:
            sizes |= {f"{name}_{axis}": stride for axis, stride in zip(axes, strides(x), strict=False)}
    if p.initial_state is not None:
        names = ("state_item", "state_head", "state_row", "state_column")
        sizes |= dict(zip(names, strides(p.initial_state), strict=True))
    if p.bonus is not None:
        sizes["bonus_item"] = strides(p.bonus)[0]
    if p.skip is not None:
        sizes["skip_head"], sizes["skip_column"] = strides(p.skip)
    if p.resets is not None:
        sizes["resets_item"], sizes["resets_step"] = strides(p.resets)
    return sizes
