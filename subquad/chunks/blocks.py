"""One task for each chunk of the sequence: functions of blocks, and what chunks pass on to later ones.

Each chunk of a sequence leaves a *summary*, a small array (..., rows, columns). Summaries lie along the axis of the
sequence, one after the other; those of all chunks together are small, and one task takes them to what stands before
each chunk.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import dask.array as da
from dask.layers import ArrayBlockIdDep

from subquad.backend import Array

TIME, WIDTH, OF_EACH = "n", "w", "each"  # indices of the sequence, of an output's channels, of all chunks' states


def batch_axes(count: int) -> tuple[str, ...]:
    """The indices of batch axes, numbered from the last, so that they broadcast."""
    return tuple(f"b{i}" for i in range(count - 1, -1, -1))


class Rows:
    """Arrays (..., n, width) cut into the same chunks, with whole channels: what functions of blocks are given.

    `axis` is that of the sequence, counted from the end; an array that has no sequence is given by `whole`.
    """

    def __init__(self, arrays: Sequence[Array | None], axes: Sequence[int]) -> None:
        given = [(x, axis) for x, axis in zip(arrays, axes, strict=True) if x is not None]
        indices = [_index(x, axis) for x, axis in given]
        merged = [
            x.rechunk(dict.fromkeys(range(x.ndim + axis + 1, x.ndim), -1)) for x, axis in given
        ]  # channels in one chunk
        pairs = iter(_aligned(zip(merged, indices, strict=True)))
        self.pairs = [(None, None) if x is None else next(pairs) for x in arrays]

    @property
    def chunks(self) -> tuple[int, ...]:
        """The lengths of the chunks of the sequence."""
        x, index = next((x, index) for x, index in self.pairs if x is not None and index is not None)
        return x.chunks[index.index(TIME)]


def _index(x: Array, axis: int) -> tuple[Any, ...]:
    # axes after the sequence are an array's own
    last = x.ndim + axis
    own = [f"own-{x.name}-{i}" for i in range(last + 1, x.ndim)]
    return (*batch_axes(last), TIME, *own)


def of_each(x: Array) -> tuple[Array, Any]:
    """What `before_each` found, with its index."""
    return x, (*batch_axes(x.ndim - 2), OF_EACH, "columns")


def whole(x: Array | None, tail: int) -> tuple[Array | None, Any]:
    """An array (..., tail) that every block is given whole but for its batch, with its index."""
    if x is None:
        return None, None
    last = x.ndim - tail
    own = [f"own-{x.name}-{i}" for i in range(last, x.ndim)]
    return x.rechunk(dict.fromkeys(range(last, x.ndim), -1)), (*batch_axes(last), *own)


def _aligned(pairs: Iterable[tuple[Array, Any]]) -> list[tuple[Array, Any]]:
    """Arrays with their indices, cut into equal chunks where they share an index."""
    pairs = list(pairs)
    _, cut = da.core.unify_chunks(*itertools.chain(*pairs))
    return [(x, index) for x, (_, index) in zip(cut, pairs, strict=True)]


def with_new_axes(x: Array, shape: tuple[int, ...]) -> Array | None:
    """The array with axes of length 1 more, in one layer of blocks; None if the shape differs in another way."""
    index: list[str] = []
    own = 0
    for size in shape:
        kept = own < x.ndim and size == x.shape[own]
        if not kept and size != 1:
            return None
        index.append(f"a{own}" if kept else f"new{len(index)}")
        own += kept
    if own != x.ndim:
        return None
    key = tuple(slice(None) if name[0] == "a" else None for name in index)
    new = {name: 1 for name in index if name[0] != "a"}
    axes = tuple(f"a{i}" for i in range(x.ndim))
    meta = _meta(x, len(shape), x.dtype)
    longer = da.blockwise(_getitem, tuple(index), x, axes, key=key, new_axes=new, dtype=x.dtype, meta=meta)
    longer.before_new_axes = x  # what takes blocks can do without this layer
    return longer


def _getitem(block: Any, key: tuple[Any, ...]) -> Any:
    return block[key]


def by_chunk(
    function: Callable[..., Any], pairs: Sequence[tuple[Any, Any]], batch: int, width: int, dtype: Any, *, rows: int = 0
) -> Array:
    """An array (..., n, width) of which `function(*blocks)` gives each chunk, with `rows` rows if that is not 0.

    `pairs` are arrays with their indices, (None, None) for one that is not given; `batch` is the number of batch axes.
    An array whose rows are those of all chunks, one chunk after the other, has the index `OF_EACH` there; a block gets
    its own rows of it.
    """
    given = _aligned([pair for pair in pairs if pair[0] is not None])
    places = [i for i, pair in enumerate(pairs) if pair[0] is not None]
    each = [i for i in places if OF_EACH in pairs[i][1]]
    chunks = next(x.chunks[index.index(TIME)] for x, index in given if TIME in index)
    if each:
        given = [*given, (ArrayBlockIdDep(((1,) * len(chunks),)), (TIME,))]

    def run(*blocks: Any) -> Any:
        arguments: list[Any] = [None] * len(pairs)
        for place, block in zip(places, blocks, strict=False):
            arguments[place] = block
        for place in each:
            x, number = arguments[place], blocks[-1][0]
            count = x.shape[-2] // len(chunks)
            arguments[place] = x[..., number * count : (number + 1) * count, :]
        return function(*arguments)

    return da.blockwise(
        run,
        (*batch_axes(batch), TIME, WIDTH),
        *itertools.chain(*given),
        new_axes={WIDTH: width},
        adjust_chunks={TIME: rows} if rows else None,
        concatenate=True,
        align_arrays=False,
        dtype=dtype,
        meta=_meta(given[0][0], batch + 2, dtype),
    )


def before_each(fold: Callable[[list[Any]], list[Any]], summaries: Array, start: Array, *, reverse: bool) -> Any:
    """(what stands before each chunk, one after the other in one block, and what stands after the last one).

    `fold(parts)` takes the start and the summaries, each (..., rows, columns), in the order of time, to what stands
    after each of them. The start is (..., rows, columns).
    """
    rows = start.shape[-2]
    together = summaries.rechunk({summaries.ndim - 2: -1})
    start = start.rechunk({start.ndim - 2: -1, start.ndim - 1: -1})
    batch = max(start.ndim, together.ndim) - 2
    pairs = _aligned([whole(x, 2) for x in (start, together)])

    def states(start: Any, together: Any, last: bool) -> Any:
        from subquad.core.beside import namespace_of

        count = together.shape[-2] // rows
        parts = [together[..., i * rows : (i + 1) * rows, :] for i in range(count)]
        found = fold([start, *(parts[::-1] if reverse else parts)])
        if last:
            return found[-1]
        xp = namespace_of(together)
        return xp.concat(found[-2::-1] if reverse else found[:-1], axis=-2)

    made = []
    for last, count in ((False, together.shape[-2]), (True, rows)):
        made.append(
            da.blockwise(
                states,
                (*batch_axes(batch), "rows", WIDTH),
                *itertools.chain(*pairs),
                last=last,
                new_axes={"rows": count, WIDTH: start.shape[-1]},
                concatenate=True,
                align_arrays=False,
                dtype=start.dtype,
                meta=_meta(start, batch + 2, start.dtype),
            )
        )
    before, after = made
    return before, after


def _meta(x: Array, ndim: int, dtype: Any) -> Any:
    # an empty block of the kind that x has
    from subquad.core.beside import namespace_of

    return namespace_of(x._meta).empty((0,) * ndim, dtype=dtype)
