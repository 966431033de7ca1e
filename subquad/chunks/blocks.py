"""One task for each chunk of the sequence: functions of blocks, and what chunks pass on to later ones.

Each chunk of a sequence leaves a *summary*, a small array (..., rows, columns). Summaries lie along the axis of the
sequence, one after the other; those of all chunks together are small, and one task takes them to what stands before
each chunk. A library of arrays in chunks says how its blocks are run, as `Blocks`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any, ClassVar

from subquad.backend import Array
from subquad.core.beside import namespace_of

TIME, WIDTH, OF_EACH = "n", "w", "each"  # indices of the sequence, of an output's channels, of all chunks' states
Index = tuple[str, ...]
Pair = tuple[Array | None, Index | None]  # an array with the names of its axes


class Blocks:
    """What a library of arrays in chunks can do; a base of one class for each library.

    `unify(*arrays and indices)` is the library's function that cuts arrays alike, to (chunks of indices, arrays).
    """

    unify: ClassVar[Callable[..., tuple[Any, list[Array]]]]

    def together(self, x: Array, axes: Sequence[int]) -> Array:
        """The array with each of these axes in one chunk."""
        raise NotImplementedError

    def aligned(self, pairs: Sequence[tuple[Array, Index]]) -> list[tuple[Array, Index]]:
        """The arrays, cut into equal chunks where they share an index."""
        _, cut = self.unify(*chain(*pairs))
        return [(x, index) for x, (_, index) in zip(cut, pairs, strict=True)]

    def run(
        self,
        function: Callable[..., Any],
        index: Index,
        pairs: Sequence[tuple[Array, Index]],
        *,
        sizes: Mapping[str, int],
        rows: int,
        dtype: Any,
    ) -> Array:
        """An array of which `function(number, *blocks)` gives each block.

        The arrays are aligned; an axis whose index the result has not is in one chunk. `number` is that of the block
        along the sequence, 0 without one. `sizes` are those of the axes that the result has alone, in one chunk each.
        If `rows` is not 0, each block has so many rows along the sequence.
        """
        raise NotImplementedError


def batch_axes(count: int) -> Index:
    """The indices of batch axes, numbered from the last, so that they broadcast."""
    return tuple(f"b{i}" for i in range(count - 1, -1, -1))


class Rows:
    """Arrays (..., n, width) cut into the same chunks, with whole channels: what functions of blocks are given.

    `axis` is that of the sequence, counted from the end; an array that has no sequence is given by `whole`.
    """

    def __init__(self, blocks: Blocks, arrays: Sequence[Array | None], axes: Sequence[int]) -> None:
        given = [(x, axis) for x, axis in zip(arrays, axes, strict=True) if x is not None]
        merged = [(blocks.together(x, range(x.ndim + axis + 1, x.ndim)), _index(x, axis)) for x, axis in given]
        pairs = iter(blocks.aligned(merged))
        self.pairs: list[Pair] = [(None, None) if x is None else next(pairs) for x in arrays]


def _index(x: Array, axis: int) -> Index:
    # axes after the sequence are an array's own
    last = x.ndim + axis
    own = [f"own-{x.name}-{i}" for i in range(last + 1, x.ndim)]
    return (*batch_axes(last), TIME, *own)


def of_each(x: Array) -> Pair:
    """What `before_each` found, with its index."""
    return x, (*batch_axes(x.ndim - 2), OF_EACH, "columns")


def whole(blocks: Blocks, x: Array | None, tail: int) -> Pair:
    """An array (..., tail) that every block is given whole but for its batch, with its index."""
    if x is None:
        return None, None
    last = x.ndim - tail
    own = [f"own-{x.name}-{i}" for i in range(last, x.ndim)]
    return blocks.together(x, range(last, x.ndim)), (*batch_axes(last), *own)


def with_new_axes(blocks: Blocks, x: Array, shape: tuple[int, ...]) -> Array | None:
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
    longer = blocks.run(lambda _, block: block[key], tuple(index), [(x, axes)], sizes=new, rows=0, dtype=x.dtype)
    longer.before_new_axes = x  # what takes blocks can do without this layer
    return longer


def by_chunk(
    blocks: Blocks, function: Callable[..., Any], pairs: Sequence[Pair], batch: int, width: int, dtype: Any, *,
    rows: int = 0,
) -> Array:  # fmt: skip
    """An array (..., n, width) of which `function(*blocks)` gives each chunk, with `rows` rows if that is not 0.

    `pairs` are arrays with their indices, (None, None) for one that is not given; `batch` is the number of batch axes.
    An array whose rows are those of all chunks, one chunk after the other, has the index `OF_EACH` there; a block gets
    its own rows of it.
    """
    places = [i for i, pair in enumerate(pairs) if pair[0] is not None]
    given: Any = blocks.aligned([pairs[i] for i in places])  # type: ignore[misc]
    each = [i for i in places if OF_EACH in (pairs[i][1] or ())]
    count = max(len(x.chunks[index.index(TIME)]) for x, index in given if TIME in index)

    def run(number: int, *found: Any) -> Any:
        arguments: list[Any] = [None] * len(pairs)
        for place, block in zip(places, found, strict=True):
            arguments[place] = block
        for place in each:
            x = arguments[place]
            own = x.shape[-2] // count
            arguments[place] = x[..., number * own : (number + 1) * own, :]
        return function(*arguments)

    return blocks.run(run, (*batch_axes(batch), TIME, WIDTH), given, sizes={WIDTH: width}, rows=rows, dtype=dtype)


def before_each(
    blocks: Blocks,
    fold: Callable[[list[Any]], list[Any]],
    first: Callable[..., Any],
    summaries: Array,
    starts: Sequence[Pair],
    *,
    rows: int,
    batch: int,
    reverse: bool,
) -> tuple[Array, Array]:
    """(what stands before each chunk, one after the other in one block, and what stands after the last one).

    `fold(parts)` takes the start and the summaries, each (..., rows, columns), in the order of time, to what stands
    after each of them. `first(summary, *starts)` makes the start from blocks of the arrays that tell it, or None.
    """
    columns, dtype = summaries.shape[-1], summaries.dtype
    places = [i for i, pair in enumerate(starts) if pair[0] is not None]
    pairs = blocks.aligned([whole(blocks, summaries, 2), *(starts[i] for i in places)])  # type: ignore[list-item]
    count = summaries.shape[-2] // rows

    def states(found: Sequence[Any], last: bool) -> Any:
        together, *given = found
        parts = [together[..., i * rows : (i + 1) * rows, :] for i in range(count)]
        start: list[Any] = [None] * len(starts)
        for place, block in zip(places, given, strict=True):
            start[place] = block
        after = fold([first(parts[0], *start), *(parts[::-1] if reverse else parts)])
        if last:
            return after[-1]
        return namespace_of(together).concat(after[-2::-1] if reverse else after[:-1], axis=-2)

    before, after = (
        blocks.run(
            lambda _, *found, last=last: states(found, last), (*batch_axes(batch), "rows", WIDTH), pairs,
            sizes={"rows": size, WIDTH: columns}, rows=0, dtype=dtype,
        )
        for last, size in ((False, count * rows), (True, rows))
    )  # fmt: skip
    return before, after
