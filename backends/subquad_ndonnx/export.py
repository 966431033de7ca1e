"""Write a function of arrays to a file of ONNX."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ndonnx as ndx
import numpy as np
import onnx_ir
import spox.opset.ai.onnx.v21 as op
from onnx_ir.passes import Sequential, common

from subquad_ndonnx import array_api as xp
from subquad_ndonnx.graph import axis_length, graph
from subquad_ndonnx.sizes import Size, Trace, tracing

Shape = Sequence[int | str | None]
DTYPES = ("float32", "float64", "float16", "bool", "int8", "int16", "int32", "int64", "uint8")


def export(
    function: Callable[..., Any],
    shapes: Mapping[str, Shape] | Sequence[Shape],
    path: str | os.PathLike[str],
    *,
    dtype: str | Mapping[str, str] = "float32",
) -> dict[str, int]:
    """Write a function of arrays to a file of ONNX, which ONNX Runtime runs without Python.

    Parameters
    ----------
    function : callable
        A function of arrays, given by the names in `shapes`; it calls subquad, and may use operators, methods and
        functions of ndonnx on the arrays. It is called once, with arrays that record what is done to them. Weights and
        other constants are ``ndonnx.asarray(x)``.
    shapes : mapping of str to shape, or sequence of shape
        The shape of each argument; in a sequence, of the arguments of `function` in their order. An entry is a number,
        the name of a length, or None, the length "n": lengths of one name are equal, and known when the file is run.
    path : str or path
        The file to write.
    dtype : str or mapping of str to str, default "float32"
        The dtype of all arguments, or of each one by name; the others are then float32.

    Returns
    -------
    dict of str to int
        The least value of each length that the file serves, where that is above 1, as for `Nystrom` with more landmarks
        than rows; for shorter ones, the outputs are NaN.

    Raises
    ------
    TypeError
        If a shape has an entry that is neither a number, a name nor None, or the function returns no arrays.
    ValueError
        If a dtype or an argument's name is not known, or a size is not positive.
    NotImplementedError
        If the method needs a number that is unknown, such as the number of rows for buckets of `LSH`, or what ONNX has
        no operator for, such as complex numbers and eigenvalues.

    Notes
    -----
    The outputs are called "out", or "out_0", "out_1", … if there are several, or by the keys of a dict. A recurrence is
    one Loop over its steps. Nodes that are equal are written once, and constants are initializers.

    Examples
    --------
    >>> import subquad, subquad_ndonnx
    >>> def attend(q, k, v):
    ...     return subquad.attention(q, k, v, "exact")
    >>> subquad_ndonnx.export(attend, 3 * [(8, None, 64)], "attention.onnx")  # doctest: +SKIP
    {}
    """
    named = _named(function, shapes)
    dtypes = {name: dtype if isinstance(dtype, str) else dtype.get(name, "float32") for name in named}
    if not isinstance(dtype, str) and (odd := dtype.keys() - named.keys()):
        msg = f"dtype names {sorted(odd)}, but the arguments are {list(named)}"
        raise ValueError(msg)
    with tracing() as trace:
        inputs = {name: _input(trace, name, shape, dtypes[name]) for name, shape in named.items()}
        outs = dict(_outputs(_call(function, inputs)))
        if clash := inputs.keys() & outs.keys():
            msg = f"an output is called {min(clash)!r}, as an argument is; give it another name"
            raise ValueError(msg)
        least = {name: trace.least(name) for name in trace.inputs}
        least = {name: bound for name, bound in least.items() if bound > 1}
        for name, bound in least.items():
            outs = {key: _from_length_on(trace.sizes[name], bound, out) for key, out in outs.items()}
        model = onnx_ir.serde.deserialize_model(ndx.build(inputs, outs))
    _fewer_nodes(model)
    model.metadata_props["subquad.least_lengths"] = str(least)
    onnx_ir.save(model, path)
    return least


def _named(function: Callable[..., Any], shapes: Any) -> dict[str, Shape]:
    if isinstance(shapes, Mapping):
        return dict(shapes)
    names = [name for name, p in inspect.signature(function).parameters.items() if p.kind != p.VAR_KEYWORD]
    if len(shapes) > len(names):
        msg = f"shapes has {len(shapes)} entries, but the function takes the arguments {names}; give shapes by name"
        raise ValueError(msg)
    return dict(zip(names, shapes, strict=False))


def _call(function: Callable[..., Any], inputs: dict[str, Any]) -> Any:
    # arguments that have no keyword are given by their place
    given, kinds = dict(inputs), inspect.signature(function).parameters
    first = [given.pop(name) for name, p in kinds.items() if p.kind == p.POSITIONAL_ONLY and name in given]
    return function(*first, **given)


def _input(trace: Trace, name: str, shape: Shape, dtype: str) -> Any:
    if dtype not in DTYPES:
        msg = f"dtype of {name} is {dtype!r}, expected one of {', '.join(DTYPES)}"
        raise ValueError(msg)
    sizes = ["n" if size is None else size for size in shape]
    for size in sizes:
        if isinstance(size, bool) or not isinstance(size, int | str):
            msg = f"the shape of {name} has an entry {size!r}, expected a number, a name, or None for the length 'n'"
            raise TypeError(msg)
        if isinstance(size, int) and size < 1:
            msg = f"the shape of {name} has an entry {size}, expected at least 1"
            raise ValueError(msg)
        if isinstance(size, str) and not size.isidentifier():
            msg = f"the shape of {name} has a length called {size!r}, expected a name such as 'n' or 'n_kv'"
            raise ValueError(msg)
    array = ndx.argument(shape=tuple(sizes), dtype=getattr(ndx, dtype))
    for axis, size in enumerate(sizes):
        if isinstance(size, str):
            trace.sizes.setdefault(size, Size.input(size, axis_length(array, axis)))
            trace.inputs.add(size)
    return graph(array)


def _outputs(out: Any, prefix: str = "out") -> Iterator[tuple[str, Any]]:
    if isinstance(out, ndx.Array):
        yield prefix, graph(out)
    elif isinstance(out, dict):
        for name, part in out.items():
            yield from _outputs(part, name if prefix == "out" else f"{prefix}_{name}")
    elif isinstance(out, tuple | list):
        for number, part in enumerate(out):
            yield from _outputs(part, f"{prefix}_{number}")
    elif out is not None:
        msg = f"the function returned a {type(out).__name__}, expected arrays of ndonnx, in tuples and dicts"
        raise TypeError(msg)


def _from_length_on(size: Size, least: int, out: Any) -> Any:
    # the output, or NaN for lengths that the program does not serve
    if out.dtype not in (ndx.float32, ndx.float64, ndx.float16):
        return out
    serves = graph(op.greater_or_equal(size.vector(), op.const(np.asarray([least]))))
    return xp.where(serves, out, float("nan"))


def _fewer_nodes(model: onnx_ir.Model) -> None:
    # equal nodes once, no node that copies, and constants in the list of initializers
    passes = (
        common.RemoveUnusedNodesPass(),
        common.IdentityEliminationPass(),
        common.CommonSubexpressionEliminationPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.LiftSubgraphInitializersToMainGraphPass(),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
    )
    Sequential(*passes)(model)
