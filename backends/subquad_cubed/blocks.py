"""Blocks of Cubed: an operation in which each task is told the one block of each array that it reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from cubed.core.ops import general_blockwise, unify_chunks
from cubed.primitive.blockwise import ChunkKey, FunctionArgs

from subquad.backend import Array
from subquad.chunks.blocks import TIME, Blocks, Index

TEMPORARIES = 4  # arrays of the size of those that a task reads and writes, which it makes on the way


class CubedBlocks(Blocks):
    """How Cubed runs functions of blocks."""

    unify = staticmethod(unify_chunks)

    def together(self, x: Array, axes: Sequence[int]) -> Array:
        sizes = tuple(x.shape[axis] if axis in axes else size for axis, size in enumerate(x.chunksize))
        return x if sizes == x.chunksize else x.rechunk(sizes)

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
        chunks: dict[str, tuple[int, ...]] = {name: (size,) for name, size in sizes.items()}
        for x, own in pairs:
            for name, cut in zip(own, x.chunks, strict=True):
                if name in index and (
                    name not in chunks or (len(cut), sum(cut)) > (len(chunks[name]), sum(chunks[name]))
                ):
                    chunks[name] = cut
        if rows:
            chunks[TIME] = (rows,) * len(chunks[TIME])
        time = index.index(TIME) if TIME in index else None

        def places(out: Any) -> Any:
            at = dict(zip(index, out.coords, strict=True))
            keys = [
                ChunkKey(
                    x.name,
                    tuple(at.get(name, 0) if count > 1 else 0 for name, count in zip(own, x.numblocks, strict=True)),
                )
                for x, own in pairs
            ]
            return FunctionArgs(*keys, output_name=out.name)

        def call(*blocks: Any, block_id: Any) -> Any:
            return function(0 if time is None else block_id[time], *blocks)

        cut = tuple(chunks[name] for name in index)
        shape = tuple(map(sum, cut))
        largest = [max(x) for x in cut]
        return general_blockwise(
            call,
            places,
            *(x for x, _ in pairs),
            shapes=[shape],
            dtypes=[dtype],
            chunkss=[cut],
            num_input_blocks=(1,) * len(pairs),
            extra_projected_mem=TEMPORARIES * max([x.chunkmem for x, _ in pairs] + [_bytes(largest, dtype)]),
        )


BLOCKS = CubedBlocks()


def _bytes(shape: Sequence[int], dtype: Any) -> int:
    size = np.dtype(dtype).itemsize
    for length in shape:
        size *= length
    return size
