"""Arrays of ndonnx whose shapes hold a `Size`, to compute with, where the graph leaves a length open."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from types import EllipsisType
from typing import Any

import ndonnx as ndx
import spox.opset.ai.onnx.v21 as op
from spox import Var
from spox._internal_op import unsafe_reshape

from subquad_ndonnx.sizes import Size, as_vector, trace

_numbers = itertools.count()


class Graph(ndx.Array):
    """An array of ndonnx whose sizes can be computed with."""

    def __array_namespace__(self, /, *, api_version: str | None = None) -> Any:
        from subquad_ndonnx import array_api

        return array_api

    @property
    def shape(self) -> tuple[Any, ...]:
        return tuple(x if isinstance(x, int) else trace().sizes[x] for x in self._tyarray.shape)

    @property
    def ndim(self) -> int:
        return len(self._tyarray.shape)

    def __getitem__(self, key: Any, /) -> Graph:
        return take_slices(self, key if isinstance(key, tuple) else (key,))

    def __matmul__(self, other: Any) -> Graph:
        return matmul(self, other)

    def __rmatmul__(self, other: Any) -> Graph:
        return matmul(other, self)

    __hash__ = None  # type: ignore[assignment]


def graph(x: Any, sizes: Sequence[Any] | None = None) -> Any:
    """An array or a variable as a `Graph` whose unknown sizes all have names; `sizes` are those that are known."""
    if isinstance(x, tuple):
        return tuple(graph(part) for part in x)
    array = ndx.asarray(x) if isinstance(x, Var) else x
    if not isinstance(array, ndx.Array):
        return x
    if all(isinstance(size, int) for size in array._tyarray.shape):
        return Graph._from_tyarray(array._tyarray)
    own = array._tyarray.shape
    if sizes is not None and all(isinstance(size, int) for size in sizes):
        return Graph._from_tyarray(ndx.asarray(unsafe_reshape(array.unwrap_spox(), tuple(sizes)))._tyarray)
    known = trace().sizes
    names: list[int | str] = []
    for axis, (inferred, size) in enumerate(zip(own, sizes or [None] * len(own), strict=True)):
        if isinstance(inferred, int):
            names.append(inferred)
        elif isinstance(size, int):
            names.append(size)
        elif size is not None:
            names.append(str(size))
            known.setdefault(str(size), size)
        elif inferred in known:
            names.append(inferred)
        else:
            name = f"?{next(_numbers)}"
            names.append(name)
            known[name] = Size.found(name, axis_length(array, axis))
    if tuple(names) != own:
        array = ndx.asarray(unsafe_reshape(array.unwrap_spox(), tuple(names)))
    return Graph._from_tyarray(array._tyarray)


def has_values(*arrays: Any) -> bool:
    """Whether the values of all these arrays are known while the graph is recorded; None does not count."""
    return all(x is None or x._tyarray.is_constant for x in arrays)


def axis_length(x: ndx.Array, axis: int) -> Any:
    """A function that makes the variable (1,) of the length of an axis."""
    return lambda: op.shape(x.unwrap_spox(), start=axis, end=axis + 1)


def broadcast(*arrays: Any) -> list[Any]:
    """The sizes of arrays broadcast against each other, None where they are not known; numbers do not count."""
    return broadcast_shapes(*(tuple(x.shape) for x in arrays if isinstance(x, ndx.Array)))


def broadcast_shapes(*shapes: tuple[Any, ...]) -> list[Any]:
    """The sizes of shapes that are broadcast against each other, None where they are not known."""
    found: list[Any] = []
    for place in range(1, max(map(len, shapes)) + 1):
        sizes = {str(shape[-place]): shape[-place] for shape in shapes if len(shape) >= place}
        sizes = {name: size for name, size in sizes.items() if name != "1"} or sizes
        found.insert(0, next(iter(sizes.values())) if len(sizes) == 1 else None)
    return found


def scalar(size: Any, dtype: Any = ndx.int64) -> Any:
    """A size as an array of shape (); a number stays."""
    if not isinstance(size, Size):
        return size
    return ndx.astype(ndx.asarray(op.squeeze(size.vector())), dtype)


def _lifted(name: str) -> Any:
    # an operator that takes sizes for numbers, and whose result is a `Graph`
    own = getattr(ndx.Array, name)

    def operate(self: Graph, *others: Any) -> Any:
        found = own(self, *(scalar(x, self.dtype) for x in others))
        return found if found is NotImplemented else graph(found, broadcast(self, *others))

    return operate


BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift")
for _name in (
    *BINARY,
    *(f"r{name}" for name in BINARY),
    "eq",
    "ne",
    "lt",
    "le",
    "gt",
    "ge",
    "abs",
    "invert",
    "neg",
    "pos",
):
    setattr(Graph, f"__{_name}__", _lifted(f"__{_name}__"))


def matmul(a: Any, b: Any) -> Graph:
    """The matrix product as one node; ndonnx adds a branch for arrays without entries, which MatMul serves as well."""
    dtype = ndx.result_type(a, b)
    a, b = (x if x.dtype == dtype else ndx.astype(x, dtype) for x in (a, b))
    sizes = None
    if a.ndim > 1 and b.ndim > 1:
        sizes = [*broadcast_shapes(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1]]
    return graph(op.matmul(a.unwrap_spox(), b.unwrap_spox()), sizes)


def take_slices(x: Graph, key: tuple[Any, ...]) -> Graph:
    """x[key] with one Slice for all axes that are cut, and one Unsqueeze or Squeeze where axes come or go."""
    given = [part for part in key if part is not None]
    if not all(isinstance(part, int | slice | EllipsisType) for part in given):
        return graph(ndx.Array.__getitem__(x, key if len(key) > 1 else key[0]))
    fill = x.ndim - sum(part is not Ellipsis for part in given)
    spread: list[Any] = []
    for part in key if Ellipsis in given else (*key, Ellipsis):
        spread += [slice(None)] * fill if part is Ellipsis else [part]
    axes, starts, stops, steps, sizes = [], [], [], [], list(x.shape)
    axis, gone, new = 0, [], []
    place = 0
    for part in spread:
        if part is None:
            new.append(place)
            place += 1
            continue
        size: Any = x.shape[axis]
        start: Any
        stop: Any
        if isinstance(part, int):
            start, stop, step = part, part + 1 if part != -1 else 2**62, 1
            gone.append(axis)
            is_cut = True
            sizes[axis] = 1
        else:
            start, stop, step = part.start, part.stop, 1 if part.step is None else part.step
            is_cut = (start, stop, step) != (None, None, 1)
            if is_cut:
                sizes[axis] = _length(size, start, stop, step)
            place += 1
        if is_cut:
            axes.append(axis)
            starts.append((0 if step > 0 else 2**62) if start is None else start)
            stops.append((2**62 if step > 0 else -(2**62)) if stop is None else stop)
            steps.append(step)
        axis += 1
    var = x.unwrap_spox()
    if axes:
        cut = [as_vector(tuple(list_)) for list_ in (starts, stops)]
        var = op.slice(var, *cut, axes=as_vector(tuple(axes)), steps=as_vector(tuple(steps)))
        for axis, *ends in zip(axes, starts, stops, steps, strict=True):
            if sizes[axis] is None:  # the same slices of equal lengths have equal lengths
                name = f"({x.shape[axis]})[{':'.join(map(str, ends))}]"
                sizes[axis] = trace().sizes.setdefault(name, Size.found(name, axis_length(ndx.asarray(var), axis)))
        var = graph(var, sizes).unwrap_spox()
    if gone:
        var = op.squeeze(var, as_vector(tuple(gone)))
    if new:
        var = op.unsqueeze(var, as_vector(tuple(new)))
    return graph(var)


def _length(size: Any, start: Any, stop: Any, step: int) -> Any:
    """The length of a slice, None if it is not known."""
    if isinstance(size, int) and all(isinstance(x, int) or x is None for x in (start, stop)):
        return len(range(*slice(start, stop, step).indices(size)))
    if step == -1 and start is None and stop is None:
        return size
    if step != 1:
        return None
    if start is None and isinstance(stop, int) and stop == 0:
        return 0

    def edge(x: Any, default: Any) -> Any:
        if x is None:
            return default
        return size + x if isinstance(x, int) and x < 0 else x

    first, last = edge(start, 0), edge(stop, size)
    fits = [first >= 0, last <= size, first <= last]  # for all lengths, or else the slice ends where the array does
    return last - first if all(fit is True for fit in fits) else None
