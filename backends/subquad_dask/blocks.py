"""Blocks of Dask: a layer of tasks, with what makes the blocks of an array read once for all that need them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import dask.array as da
from dask.layers import ArrayBlockIdDep

from subquad.backend import Array
from subquad.chunks.blocks import TIME, Blocks, Index
from subquad.core.beside import namespace_of


class DaskBlocks(Blocks):
    """How Dask runs functions of blocks."""

    unify = staticmethod(da.core.unify_chunks)

    def together(self, x: Array, axes: Sequence[int]) -> Array:
        return x.rechunk(dict.fromkeys(axes, -1))

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
        count = max([len(x.chunks[own.index(TIME)]) for x, own in pairs if TIME in own], default=0)
        number = [(ArrayBlockIdDep(((1,) * count,)), (TIME,))] if count else []

        def call(*blocks: Any) -> Any:
            return function(int(blocks[-1][0]), *blocks[:-1]) if number else function(0, *blocks)

        return da.blockwise(
            call,
            index,
            *itertools.chain(*pairs, *number),
            new_axes=dict(sizes),
            adjust_chunks={TIME: rows} if rows else None,
            concatenate=True,
            align_arrays=False,
            dtype=dtype,
            # an empty block of the kind that the arrays have
            meta=namespace_of(pairs[0][0]._meta).empty((0,) * len(index), dtype=dtype),
        )


BLOCKS = DaskBlocks()
